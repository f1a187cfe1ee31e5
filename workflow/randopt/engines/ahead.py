"""The next candidate's tensors, made while the present one answers.

vLLM on a CPU leaves a core idle for as long as Python takes between two operations. A thread of the lowest priority
makes noise in these gaps: setting the weights then costs a quarter less (benchmarks/engine.py). Engine `transformers`
has no such gaps and does without; on a GPU the noise is one fused pass.
"""

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from randopt import noise
from randopt.requests import Perturbation


class Ahead:
    """Buffers on the host for every perturbed tensor, and the thread that may fill them early."""

    def __init__(self, base: Mapping[str, torch.Tensor], perturbed: Sequence[str], law: str) -> None:
        self.buffers = {name: torch.empty_like(base[name]) for name in perturbed}
        self._base = base
        self._law = law
        self._expected: Perturbation | None = None
        self._made: set[str] = set()
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def expect(self, perturbation: Perturbation) -> None:
        """Begin to fill the buffers for `perturbation`; whoever took tensors before must be done with them."""
        self._settle()
        self._expected, self._made = perturbation, set()
        self._stop.clear()
        self._thread = threading.Thread(target=self._fill, name="next weights", daemon=True)
        self._thread.start()

    def tensors(self, perturbation: Perturbation) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and perturbed tensor, in order; what is not there yet is made now, on all threads."""
        self._settle()
        made = self._made if perturbation == self._expected else set()
        self._expected = None  # the buffers are given away
        for name, out in self.buffers.items():
            yield name, out if name in made else self._make(name, perturbation)

    def _settle(self) -> None:
        """Stop the thread after the tensor that it is at."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _fill(self) -> None:
        if sys.platform == "linux":  # where priorities are each thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        try:
            assert self._expected is not None
            for name in self.buffers:
                if self._stop.is_set():
                    return
                self._make(name, self._expected, threads=1)
                self._made.add(name)
        except BaseException as error:
            self._failure = error

    def _make(self, name: str, perturbation: Perturbation, threads: int | None = None) -> torch.Tensor:
        out = self.buffers[name]
        return noise.perturb(self._base[name], name, perturbation, law=self._law, out=out, threads=threads)
