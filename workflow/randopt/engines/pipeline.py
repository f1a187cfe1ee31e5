"""Perturbed tensors on a CPU, made by one core while another loads those before.

vLLM's loader works in Python for half of its time, on one core. So the tensors are made in groups, from the first on: a
helper thread is some groups ahead, without the GIL, and leaves the other cores to the loader. Where the loader has
caught up, all cores make its group. On two cores, with the demo's model, weights are set in a tenth less time than with
all tensors made before the first is loaded. The groups go into buffers: new memory for each candidate costs 5 %.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from randopt import noise
from randopt.requests import Term

GROUP_BYTES = 16 << 20  # 32 took as long


class Pipeline:
    """The tensors of a base, of which `perturbed` are made for one perturbation after another."""

    def __init__(self, base: Mapping[str, torch.Tensor], perturbed: Sequence[str], law: str) -> None:
        self._base = base
        chosen = frozenset(perturbed)
        self._buffers = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in base.items() if name in chosen
        }
        self._groups = []
        for names in _in_groups(base):
            bases = {name: base[name] for name in names if name in chosen}
            self._groups.append((names, noise.Together(bases, law=law, out=self._buffers)))
        self._helper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")
        self._stop = np.zeros(1, np.int64)
        self._held: tuple[Term, ...] | None = None  # what all buffers hold
        self._running: Future[None] | None = None

    def tensors(self, perturbation: Sequence[Term]) -> Generator[tuple[str, torch.Tensor], None, None]:
        """Name and tensor, in the base's order, to be read until tensors is called again; what is held is not remade.

        Until the iterator is exhausted or closed, torch may have one thread less than before.
        Raises UserError for a term out of range.
        """
        if self._held != tuple(perturbation):
            yield from self._made(perturbation)
            self._held = tuple(perturbation)
        else:
            for name, base in self._base.items():
                yield name, self._buffers.get(name, base)

    def _made(self, perturbation: Sequence[Term]) -> Generator[tuple[str, torch.Tensor], None, None]:
        self._held = None
        threads = torch.get_num_threads()
        for _, made in self._groups:
            made.begin(perturbation)
        try:
            for position, (names, made) in enumerate(self._groups):
                if not made.done:
                    self._settle(threads)
                    made.finish()
                    if threads > 1:
                        self._go_ahead(position + 1, threads - 1)
                for name in names:
                    if self._running and self._running.done():
                        self._settle(threads)
                    yield name, self._buffers.get(name, self._base[name])
        finally:
            self._settle(threads)

    def _go_ahead(self, position: int, others: int) -> None:
        """Have the helper make the groups from `position` on, and torch do with the other threads."""

        def make() -> None:
            for _, made in self._groups[position:]:
                made.run_until(self._stop)

        self._stop[0] = 0
        self._running = self._helper.submit(make)
        _set_threads(others)

    def _settle(self, threads: int) -> None:
        """Stop the helper, which takes tens of microseconds, and give torch all threads again."""
        if self._running:
            self._stop[0] = 1
            running, self._running = self._running, None
            _set_threads(threads)
            running.result()


def _in_groups(base: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of neighbours that are made at once: one tensor, or several of GROUP_BYTES in all."""
    group: list[str] = []
    size = 0
    for name, tensor in base.items():
        if group and size + tensor.nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += tensor.nbytes
    yield group


def _set_threads(threads: int) -> None:
    """torch.set_num_threads, which vLLM replaces by a function that does nothing."""
    torch._C.set_num_threads(threads)
