"""What every vLLM worker is extended with: the pristine base, and loading perturbations of it.

vLLM fuses, shards and packs weights, so nothing is written into its tensors here. Each rank makes the perturbed
tensors under their checkpoint names, whole, and hands them to vLLM's own checkpoint reload, which fuses, shards and
packs them as it did at the start.
"""

import inspect
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.model_loader.reload import layerwise
from vllm.v1.kv_cache_interface import KVCacheConfig

from randopt import noise
from randopt.engines import reuse_memory
from randopt.engines.base_weights import base_tensors
from randopt.engines.pipeline import Pipeline
from randopt.models import checkpoint
from randopt.requests import Term

# Blocks of the key-value cache are zeroed before they are used, as vLLM does for some models alone. What an earlier
# candidate left behind is masked by a factor of 0, which does not help against the NaN of a broken one: without this,
# every later candidate, and the base, answered differently. Set by import, in every process before the cache is made.
KVCacheConfig.needs_kv_cache_zeroing = True


def _counted_once(measure: Callable[..., tuple[int, Any]]) -> Callable[..., tuple[int, Any]]:
    """vLLM's count of how much of a parameter a tensor fills, taken at its first reload alone.

    To know when a layer is complete vLLM loads every tensor twice, the first time without data under a dispatch mode
    in Python. What that finds depends on shapes and shards alone, and is kept with the parameter.
    """

    def count(loader: Callable[..., Any], bound: inspect.BoundArguments) -> tuple[int, Any]:
        given = dict(bound.arguments)
        parameter = given.pop("param", None)
        if parameter is None or not parameter.is_meta:
            return measure(loader, bound)
        shapes = tuple(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in given.values())
        known = parameter.__dict__.setdefault("randopt_counts", {})
        try:
            if shapes not in known:
                known[shapes] = measure(loader, bound)
            return known[shapes]
        except TypeError:  # an argument that cannot be looked up
            return measure(loader, bound)

    return count


layerwise.get_numel_loaded = _counted_once(layerwise.get_numel_loaded)


class WorkerExtension:
    """Mixed into vLLM's worker class by name (worker_extension_cls); `self` is the worker of one rank."""

    model_runner: Any
    reload_weights: Any
    device: torch.device

    def randopt_hold_base(
        self,
        folder: str,
        table: Sequence[Sequence[Any]],
        perturbed: Sequence[str],
        dtype: str,
        law: str,
        resident: bool,
    ) -> None:
        """Read the base (`table`: name, file, dtype, shape of each tensor) and keep it at hand.

        On an accelerator it lies in device memory if `resident`, else in page-locked host memory. On the CPU it stays
        memory-mapped, and a pipeline makes the tensors.
        """
        reuse_memory()  # for ranks that are processes of their own
        # It warns at each reload of layers that load nothing; randopt_shift_all finds those that should.
        logging.getLogger("vllm.model_executor.model_loader.reload").setLevel(logging.ERROR)
        infos = [checkpoint.TensorInfo(name, file, kind, tuple(shape)) for name, file, kind, shape in table]
        base = base_tensors(Path(folder), infos, getattr(torch, dtype))
        self._randopt_law = law
        self._randopt_perturbed = frozenset(perturbed)
        self._randopt_pipeline = Pipeline(base, perturbed, law) if self.device.type == "cpu" else None
        if resident:
            base = {name: tensor.to(self.device) for name, tensor in base.items()}
        elif self.device.type != "cpu":
            base = {name: tensor.pin_memory() for name, tensor in base.items()}
        self._randopt_base = base

    @torch.inference_mode()
    def randopt_set_weights(self, perturbation: Sequence[Term]) -> None:
        """Make this rank's weights those of base + Σ coefficient·ε(seed)."""
        with closing(self._randopt_tensors(perturbation)) as tensors:
            self._randopt_load(tensors)

    @torch.inference_mode()
    def randopt_shift_all(self) -> None:
        """Load ones added to the whole base, excluded tensors too: whatever then is as before was not reached."""
        self._randopt_load(
            (name, base + 1 if base.is_floating_point() else base) for name, base in self._randopt_base.items()
        )

    def randopt_checkpoint_digest(self, perturbation: Sequence[Term]) -> str:
        """Digest of the checkpoint tensors of `perturbation`, which this rank holds or makes."""
        return checkpoint.weights_digest((name, t.cpu()) for name, t in self._randopt_tensors(perturbation))

    @torch.inference_mode()
    def randopt_live_digests(self) -> dict[str, str]:
        """Name -> digest of every parameter and buffer, and of what packed linear layers hold outside of both."""
        model = self.model_runner.get_model()
        held = [*_kind("parameter", model.named_parameters()), *_kind("buffer", model.named_buffers())]
        return {name: checkpoint.weights_digest([(name, t)]) for name, t in [*held, *_packed_weights(model)]}

    def _randopt_load(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.reload_weights(weights_iterator=tensors)
        for layer, owner in self._randopt_tied:
            if hasattr(owner, "cpu_linear"):
                layer.cpu_linear = owner.cpu_linear
            else:
                layer.quant_method.process_weights_after_loading(layer)

    def _randopt_tensors(self, perturbation: Sequence[Term]) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Every checkpoint tensor under its name, perturbed; on this rank's device but for those left as they are."""
        if not perturbation:
            yield from self._randopt_base.items()
        elif self._randopt_pipeline:
            yield from self._randopt_pipeline.tensors(perturbation)
        else:
            for name, base in self._randopt_base.items():
                if name in self._randopt_perturbed:
                    here = base.to(self.device, non_blocking=True)
                    yield name, noise.perturb(here, name, perturbation, law=self._randopt_law)
                else:
                    yield name, base

    @cached_property
    def _randopt_tied(self) -> list[tuple[Any, Any]]:
        """Layers of the CPU backend that use a weight, packed, which another layer has loaded: a tied output head.

        With each the layer that loads it, for which alone the reload packs the weight again.
        """
        owners: dict[int, Any] = {}
        tied = []
        for layer in self.model_runner.get_model().modules():
            weight = layer._parameters.get("weight")
            if weight is None:
                continue
            owner = owners.setdefault(id(weight), layer)
            if owner is not layer and hasattr(layer, "cpu_linear"):
                tied.append((layer, owner))
        return tied


def _kind(kind: str, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"{kind} {name}", tensor) for name, tensor in named if tensor.numel())


def _packed_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights [inputs, outputs] inside the packed linear layers of vLLM's CPU backend, by name.

    The packed form is opaque, so it is read by what it does: the identity times the weight is the weight exactly.
    """
    for name, layer in model.named_modules():
        linear = getattr(layer, "cpu_linear", None)
        if linear is not None:
            whole = layer.weight.dim() == 2  # a packed weight may leave an empty one behind
            # a layer that is not split over the ranks has its input size alone
            width = layer.weight.shape[1] if whole else getattr(layer, "input_size_per_partition", layer.input_size)
            yield f"packed {name}", linear(torch.eye(width, dtype=layer.weight.dtype), layer.weight, None)
