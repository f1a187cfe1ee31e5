"""Engine `transformers`: batched generation on the CPU or one CUDA device, of language and vision-language models.

The decoding loop is ours rather than `model.generate`, for three things that the search needs:
the prompts' common prefix is computed once per candidate, finished rows leave the batch, and
completions are handed out as they finish and can be abandoned. Decoding is plain greedy or
temperature sampling: penalties in a model's generation_config are not applied.
"""

import copy
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import conversion_mapping, core_model_loading

from randopt import noise
from randopt.engines import Completion, EngineSettings, Item, vision
from randopt.engines.base_weights import base_tensors, perturbed_names
from randopt.engines.prompts import batches, completion, end_tokens, shared_prefix, token_ids
from randopt.engines.sampling import next_tokens
from randopt.errors import UserError
from randopt.models import checkpoint
from randopt.models.prepare import Manifest
from randopt.models.vision import is_vision_language
from randopt.requests import Decoding, Perturbation

log = logging.getLogger(__name__)

COMPACT_AT = 0.875  # finished rows leave once an eighth of the batch is done; each removal copies the cache


class TransformersEngine:
    """One language model, or vision-language model, with its pristine base beside it."""

    def __init__(self, manifest: Manifest, settings: EngineSettings) -> None:
        torch.set_num_threads(settings.threads)
        transformers.utils.logging.disable_progress_bar()
        self.settings = settings
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, settings.dtype)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(manifest.folder, local_files_only=True)
        self._vision = None
        loader: Any = transformers.AutoModelForCausalLM
        if is_vision_language(manifest.folder):
            self._vision = vision.Prompts(vision.load_processor(manifest.folder), settings.chat_template)
            loader = transformers.AutoModelForImageTextToText
        self._model = loader.from_pretrained(manifest.folder, dtype=dtype, local_files_only=True, use_safetensors=True)
        # requires_grad stays on (inference_mode records nothing anyway): without it torch's matmul does not fold the
        # last token's strided hidden states into one product but copies the output matrix once per row, 3.6 GB and
        # half of the time at batch 64 on the demo's model.
        self._model.eval().to(self.device)
        self._base = base_tensors(manifest.folder, manifest.tensors, dtype)
        self._live = _live_tensors(self._model, self._base)
        if self.device == "cuda" and noise.runs_on(self._model.device):
            self._base = _beside_the_model(self._base)
        perturbed = perturbed_names(manifest.tensors, settings.exclude)
        self._weights = noise.Together({name: self._base[name] for name in perturbed}, law=settings.law, out=self._live)
        self._current: Perturbation = ()
        self._end = end_tokens(self._model.generation_config, self._tokenizer)
        self._prompts: dict[Item, list[int]] = {}
        # a sliding window counts cache slots, padding included, so there only whole prompts are safe
        kinds = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        self._share_prefix = kinds == {"full_attention"}

    @torch.inference_mode()
    def set_weights(self, perturbation: Perturbation) -> None:
        """Make the weights base + Σ coefficient·ε(seed); nothing is done when they already are."""
        if perturbation == self._current:
            return
        self._current = ((0, float("nan")),)  # equals nothing: a failure half-way is never mistaken for done
        self._weights.begin(perturbation)
        self._weights.finish()
        self._current = perturbation

    def weights_digest(self) -> str:
        """Digest of the live tensors under their checkpoint names."""
        return checkpoint.weights_digest(self._live.items())

    @torch.inference_mode()
    def generate(self, items: Sequence[Item], decoding: Decoding) -> Generator[Completion, None, None]:
        """Completions of the items as they finish. Equal calls give equal texts on one machine."""
        prompts = [self._tokens(item) for item in items]
        # the same tokens stand for different pictures
        share = self._share_prefix and len(prompts) > 1 and not any(item.images for item in items)
        prefix = shared_prefix(prompts) if share else 0
        cache = transformers.DynamicCache(config=self._model.config)
        if prefix:
            ids = torch.tensor([prompts[0][:prefix]], device=self.device)
            self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        lengths = [len(prompt) for prompt in prompts]
        for batch in self._batches(items, lengths):
            chosen = [prompts[index] for index in batch]
            with _memory_told(len(batch)):
                rows = copy.deepcopy(cache)
                if prefix:
                    rows.batch_repeat_interleave(len(batch))
                yield from self._generate_batch([items[index] for index in batch], chosen, prefix, rows, decoding)

    def _generate_batch(
        self,
        items: Sequence[Item],
        prompts: Sequence[list[int]],
        prefix: int,
        cache: transformers.Cache,
        decoding: Decoding,
    ) -> Generator[Completion, None, None]:
        """One batch: left padding between the shared prefix and the prompt's rest, then a token a step.

        Pictures are seen at the first step, in which the whole prompt is read.
        """
        ids, mask = _left_padded([prompt[prefix:] for prompt in prompts], prefix, self._end[0], self.device)
        positions = (mask.cumsum(dim=1) - 1).clamp_(min=0)[:, prefix:]
        seen = self._seen(items, ids.shape[1])
        if seen:
            own = vision.positions(self._model, ids, mask, seen)
            positions = positions if own is None else own
        texts: list[list[int]] = [[] for _ in items]
        live = list(range(len(items)))  # row of the cache -> position in `items`
        running = list(live)  # the same, finished rows taken out
        end = torch.tensor(self._end, device=self.device)
        for step in range(self.settings.max_tokens):
            logits = self._model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **seen,
            ).logits[:, -1]
            seen = {}
            tokens = next_tokens(logits, decoding, [items[row].item_id for row in live], step)
            # a NaN is taken for the largest logit, so whoever has one has picked one; all that follows would be NaN too
            broken = logits.gather(-1, tokens[:, None])[:, 0].isnan()
            states = (torch.isin(tokens, end) + 2 * broken).tolist()
            still = set(running)
            for row, token, state in zip(live, tokens.tolist(), states, strict=True):
                if row not in still:
                    continue
                texts[row].append(token)
                if state or step + 1 == self.settings.max_tokens:
                    still.discard(row)
                    reason = ("length", "stop", "nan", "nan")[state]
                    yield completion(self._tokenizer, items[row], len(prompts[row]), texts[row], reason)
            running = [row for row in running if row in still]
            if not running:
                return
            if len(running) <= COMPACT_AT * len(live):
                keep = torch.tensor([i for i, row in enumerate(live) if row in still], device=self.device)
                cache.batch_select_indices(keep)
                tokens, mask, positions = tokens[keep], mask[keep], positions.index_select(-2, keep)
                live = list(running)
            ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            positions = positions[..., -1:] + 1

    def _tokens(self, item: Item) -> list[int]:
        """The item's prompt; tokenised once, not once per candidate."""
        if item not in self._prompts:
            self._prompts[item] = (
                self._vision.tokens(item)
                if self._vision
                else token_ids(self._tokenizer, item, self.settings.chat_template)
            )
        return self._prompts[item]

    def _batches(self, items: Sequence[Item], lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indices of the items in batches; a batch of pictures is parted where their shapes differ."""
        for batch in batches(lengths, self.settings.batch_size, self.settings.ordered):
            groups = self._vision.alike([items[index] for index in batch]) if self._vision else [range(len(batch))]
            yield from ([batch[place] for place in group] for group in groups)

    def _seen(self, items: Sequence[Item], width: int) -> vision.Inputs:
        """What the model is given of a batch's pictures."""
        found = self._vision.batch(items, width) if self._vision else {}
        dtype = self._model.dtype
        return {
            name: tensor.to(self.device, dtype if tensor.is_floating_point() else None)
            for name, tensor in found.items()
        }


@contextmanager
def _memory_told(batch: int) -> Iterator[None]:
    """Turn torch's refusal of memory into a message that says what to change."""
    try:
        yield
    except RuntimeError as error:  # torch has a class of its own for GPUs alone
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"memory ran out while {batch} items were generated at once ({str(error).splitlines()[0]}). Finished "
            "requests are kept: lower engine.batch_size, or let the job ask for more memory, and run again."
        ) from error


def _left_padded(
    rests: Sequence[Sequence[int]], prefix: int, pad: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, S] and attention mask [B, prefix + S] of prompts without their shared prefix."""
    width = max(len(rest) for rest in rests)
    ids = torch.full((len(rests), width), pad, dtype=torch.long)
    mask = torch.ones((len(rests), prefix + width), dtype=torch.long)
    for row, rest in enumerate(rests):
        ids[row, width - len(rest) :] = torch.tensor(rest)
        mask[row, prefix : prefix + width - len(rest)] = 0
    return ids.to(device), mask.to(device)


def _beside_the_model(base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The base on the GPU if that leaves as much of its memory free as it takes, else in pinned host memory.

    What is left is for the cache and the activations. From pinned memory each candidate's weights pass the bus once.
    """
    free, _ = torch.cuda.mem_get_info()
    if 2 * sum(tensor.nbytes for tensor in base.values()) <= free:
        return {name: tensor.cuda() for name, tensor in base.items()}
    return {name: tensor.pin_memory() for name, tensor in base.items()}


def _live_tensors(model: Any, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors under the checkpoint's names; UserError where the two do not correspond."""
    state = model.state_dict(keep_vars=True)
    prefix = getattr(model, "base_model_prefix", "") + "."
    conversions = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [rule for rule in conversions if isinstance(rule, core_model_loading.WeightRenaming)]
    live = {}
    for name, tensor in base.items():
        # a checkpoint of the bare backbone lacks the prefix that the language-model class adds
        found = state.get(name, state.get(prefix + name))
        if found is None:  # vision-language checkpoints keep the names of older versions
            found = state.get(core_model_loading.apply_renamings(name, renamings))
        if found is None and not tensor.is_floating_point():
            continue
        if found is None or found.shape != tensor.shape:
            held = "no tensor of that name" if found is None else f"shape {tuple(found.shape)}"
            raise UserError(
                f"engine.name: transformers holds {type(model).__name__} in another layout than its checkpoint "
                f"({name}: checkpoint {tuple(tensor.shape)}, in memory {held}); it cannot be perturbed faithfully."
            )
        live[name] = found.data
    covered = {tensor.data_ptr() for tensor in live.values()}
    strangers = [name for name, p in model.named_parameters() if p.data_ptr() not in covered]
    if strangers:
        raise UserError(f"the checkpoint has no weights for {strangers[:5]} of {type(model).__name__}.")
    return live
