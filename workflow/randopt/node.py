"""Several engines for one shard: a worker process for each, on devices of its own, all writing the shard's parts.

The parent slices the missing requests, starts the workers through submitit's local executor, adds up what they say of
themselves and tells it to `randopt status`. A worker that dies costs its slice alone. Workers never outlive their
parent, however that ends.

SHARD.parts/workers-*/N.json        progress of worker N
SHARD.parts/workers-*/PID_0_log.out its log, repeated in the parent's
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import submitit
from tqdm import tqdm

from randopt import parts
from randopt.errors import UserError
from randopt.files import last_words
from randopt.parts import Parts, Progress
from randopt.requests import Request

log = logging.getLogger(__name__)

# Generates requests with an engine of its own: (requests, parts, progress, CPU threads). It is pickled.
Work = Callable[[Sequence[Request], Parts, Progress, int], None]

LOOK_SECONDS = 0.5  # between two looks at the workers, or at the parent
SAVE_SECONDS = 2.0  # between two states that are written for `randopt status`
GRACE_SECONDS = 10.0  # for a worker that is told to stop, before it is killed
FOR_EVER_MINUTES = 60 * 24 * 365  # submitit interrupts what takes longer; time limits are the scheduler's


def slices(requests: Sequence[Request], workers: int) -> list[Sequence[Request]]:
    """`requests` in contiguous slices, one for each worker, whose sizes differ by at most 1; none is empty.

    Contiguous, since a plan repeats its σ in turn: a worker with every n-th request could get the longest answers.
    """
    workers = min(workers, len(requests))
    bounds = [len(requests) * index // workers for index in range(workers + 1)] if workers else []
    return [requests[start:stop] for start, stop in pairwise(bounds)]


def parse_devices(visible: str) -> list[str]:
    """The devices that a value of CUDA_VISIBLE_DEVICES names, as numbers or UUIDs.

    As CUDA reads it: whatever follows an entry that is none ("-1", SLURM's NoDevFiles) does not count.
    """
    found = []
    for entry in visible.split(","):
        name = entry.strip()
        if not (name.isdecimal() or name.startswith(("GPU-", "MIG-"))):
            break
        found.append(name)
    return found


def device_groups(devices: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Consecutive groups of `size` devices, each for one engine; one empty group, the CPU, where there is no device.

    Raises UserError when there are too few devices for a single engine.
    """
    if not devices:
        return [()]
    if len(devices) < size:
        raise UserError(
            f"each engine needs {size} devices, this job sees {len(devices)} ({', '.join(devices)}); "
            "ask for more (gpu) or lower engine.tensor_parallel."
        )
    return [tuple(devices[start : start + size]) for start in range(0, len(devices) - size + 1, size)]


def assign(groups: Sequence[tuple[str, ...]], workers: int) -> list[tuple[str, ...]]:
    """The devices of each worker: worker i has group i mod groups, so that more workers than groups share them."""
    return [groups[index % len(groups)] for index in range(workers)]


def visible_devices(environment: Mapping[str, str]) -> list[str]:
    """The accelerators of this job: those that the scheduler or a person named, else all of the machine."""
    if "CUDA_VISIBLE_DEVICES" in environment:
        return parse_devices(environment["CUDA_VISIBLE_DEVICES"])
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def add_up(progress: Progress, before: Progress, workers: Sequence[tuple[tuple[str, ...], Progress]]) -> None:
    """Set `progress` to what was there before plus what (devices, progress) of each worker say."""
    states = [state for _, state in workers]
    for name in parts.SUMS:
        setattr(progress, name, getattr(before, name) + sum(getattr(state, name) for state in states))
    progress.digests = before.digests | {key: value for state in states for key, value in state.digests.items()}
    named = Counter(f"{state.device} {'+'.join(devices)}".strip() for devices, state in workers if state.device)
    progress.device = ", ".join(name if n == 1 else f"{n} × {name}" for name, n in named.items()) or before.device
    if any(state.state == "running" for state in states):
        progress.state = "running"


def generate(
    work: Work,
    requests: Sequence[Request],
    kept: Parts,
    progress: Progress,
    workers: int,
    threads: int,
    devices_each: int = 1,
) -> None:
    """`work` on all `requests`, sliced over worker processes that share the devices and CPU threads of this job.

    Each engine takes `devices_each` devices. Raises UserError that names the workers which failed, after all others
    have come to their end.
    """
    shares = slices(requests, workers)
    groups = device_groups(visible_devices(os.environ), devices_each)
    if len(groups) > len(shares):
        log.warning("%d groups of devices for %d workers: the rest stays idle", len(groups), len(shares))
    before = replace(progress)
    progress.workers = len(shares)
    os.environ["TQDM_DISABLE"] = "1"  # inherited: one bar is enough
    folder = _folder(kept)
    crew: list[_Worker] = []
    bar = progress.bar(f", {len(shares)} workers")
    try:
        for index, (share, devices) in enumerate(zip(shares, assign(groups, len(shares)), strict=True)):
            own = replace(kept, progress_file=f"{folder.name}/{index}.json")
            state = Progress(progress.run_id, progress.stage, progress.start, progress.stop)
            job = _submit(folder, work, share, own, state, max(1, threads // len(shares)), devices)
            crew.append(_Worker(index, devices, own, job))
        saved = 0.0
        while any([worker.runs() for worker in crew]):
            time.sleep(LOOK_SECONDS)
            _look(crew, progress, before, bar)
            if time.monotonic() - saved >= SAVE_SECONDS:
                kept.save_progress(progress)
                saved = time.monotonic()
    finally:
        _stop(crew)
        _look(crew, progress, before, bar)
        bar.close()
    failed = [worker for worker in crew if not worker.succeeded()]
    if failed and not kept.completions.exists():  # else a faster copy of this job has removed what they wrote
        raise UserError(
            f"{len(failed)} of {len(crew)} workers failed, {sum(not kept.path(r).exists() for r in requests)} requests "
            f"are missing: {'; '.join(worker.obituary() for worker in failed)}. What the others finished is kept: run "
            "the same command again."
        )


@dataclass
class _Worker:
    """The parent's view of one worker."""

    index: int
    devices: tuple[str, ...]
    kept: Parts
    job: submitit.Job
    told: int = 0  # bytes of its log that were repeated

    @property
    def name(self) -> str:
        where = f"device {', '.join(self.devices)}" if self.devices else "CPU"
        return f"worker {self.index} ({where})"

    @property
    def log(self) -> Path:
        return Path(self.job.paths.stdout)

    def runs(self) -> bool:
        return not self.job.done()

    def succeeded(self) -> bool:
        # without a result submitit would wait for a slow file system, which cannot be between two local processes
        return self.job.paths.result_pickle.exists() and self.job.exception() is None

    def obituary(self) -> str:
        return f"{self.name}: {last_words(self.log) or 'it ended without a word (killed?)'} (log {self.log})"

    def repeat_log(self) -> None:
        """Put new whole lines of the worker's log into ours, but for submitit's own."""
        try:
            with open(self.log, "rb") as stream:
                stream.seek(self.told)
                text = stream.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.told += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            if line and not line.startswith("submitit INFO"):  # said before `_run` could quiet it
                tqdm.write(f"worker {self.index}: {line}", file=sys.stderr)


def _folder(kept: Parts) -> Path:
    """A new folder for the workers of this attempt. Logs of earlier ones stay until the shard is done."""
    try:
        kept.folder.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="workers-", dir=kept.folder))
    except OSError as error:
        raise UserError(
            f"no worker can be started: {kept.folder} cannot be written ({error}). Free space or make the folder "
            "writable, then run the same command again."
        ) from error


def _submit(
    folder: Path,
    work: Work,
    requests: Sequence[Request],
    kept: Parts,
    progress: Progress,
    threads: int,
    devices: tuple[str, ...],
) -> submitit.Job:
    executor = submitit.LocalExecutor(folder=folder)
    executor.update_parameters(timeout_min=FOR_EVER_MINUTES, stderr_to_stdout=True)
    # Inherited by submitit's controller and the worker: a terminal's Ctrl-C is for the parent alone, which ends them.
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_run, work, requests, kept, progress, threads, devices, os.getpid())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _run(
    work: Work,
    requests: Sequence[Request],
    kept: Parts,
    progress: Progress,
    threads: int,
    devices: tuple[str, ...],
    parent: int,
) -> None:
    """A worker's whole life."""
    signal.signal(signal.SIGTERM, _interrupt)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # before anything has looked for a device. Not submitit's visible_gpus, which takes no UUIDs
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("submitit").setLevel(logging.WARNING)
    progress.pid = os.getpid()
    kept.save_progress(progress)
    try:
        work(requests, kept, progress, threads)
    except UserError as error:
        sys.exit(f"error: {error}")  # without a traceback, and without a result
    finally:
        kept.save_progress(progress)


def _interrupt(number: int, frame: object) -> None:
    sys.exit(f"interrupted ({signal.Signals(number).name})")


def _end_with(parent: int) -> None:
    """End this worker as soon as its parent, or submitit's controller between the two, is no more."""
    while _grandparent() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def _grandparent() -> int:
    """Process id of the parent's parent; another one as soon as either has ended (0: just now)."""
    try:
        status = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])  # the name in brackets may hold anything


def _look(crew: Sequence[_Worker], progress: Progress, before: Progress, bar: tqdm) -> None:
    """What the workers have done and said since the last look."""
    states = [(worker.devices, state) for worker in crew if (state := worker.kept.load_progress()) is not None]
    add_up(progress, before, states)
    for worker in crew:
        worker.repeat_log()
    if progress.done > bar.n:  # else the log would get a line each second
        bar.update(progress.done - bar.n)


def _stop(crew: Sequence[_Worker]) -> None:
    """End what still runs. Asked again and again: submitit drops signals while it starts."""
    end = time.monotonic() + GRACE_SECONDS
    while running := [worker for worker in crew if worker.runs()]:
        number = signal.SIGTERM if time.monotonic() < end else signal.SIGKILL
        for worker in running:
            os.kill(int(worker.job.job_id), number)  # the controller; a worker ends with it
        time.sleep(0.1)
