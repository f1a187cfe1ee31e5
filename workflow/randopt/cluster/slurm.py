"""The queue as SLURM tells it, asked of squeue and sinfo, which every cluster has; sacct is not needed."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from randopt.errors import UserError

_FORMAT = "%i|%T|%P|%N|%r|%j|%Z|%k"  # the fields of Job, in order
_ANSWER_SECONDS = 60.0
BROKEN = ("FAILED", "NODE_FAIL", "BOOT_FAIL")  # states that speak against the node, unlike a time limit or scancel
ENDED = frozenset(
    (
        *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED"),
        *("NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"),
    )
)


@dataclass(frozen=True)
class Job:
    """One job of ours. `state` is SLURM's long name; `node` and `reason` may be empty."""

    id: str
    state: str
    partition: str
    node: str
    reason: str
    name: str
    folder: str
    comment: str

    @property
    def running(self) -> bool:
        """Whether it has nodes."""
        return not self.waiting and self.state not in ENDED

    @property
    def waiting(self) -> bool:
        """Whether it has not begun, or was put back into the queue."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")


def available() -> bool:
    """Whether this machine can ask SLURM at all."""
    return shutil.which("squeue") is not None


def comment(rule: str, *wildcards: str) -> str:
    """The comment that Snakemake's SLURM plugin gives to a job; wildcards in the order of the rule's first output."""
    return f"rule_{rule}_wildcards_{spelled('_'.join(wildcards))}"


def spelled(wildcard: str) -> str:
    """A wildcard's value as it stands in a comment."""
    return wildcard.replace("/", "_")


def queue(folder: Path, ended: bool = False) -> list[Job]:
    """This user's jobs that were submitted from `folder`: those in the queue, or with `ended` those that have left it
    as well, for as long as SLURM remembers them (MinJobAge, five minutes by default).

    Raises UserError when SLURM does not answer.
    """
    states = ["--states=all"] if ended else []
    text = _ask(["squeue", f"--user={os.getuid()}", "--noheader", f"--format={_FORMAT}", *states])
    jobs = [Job(*line.split("|", 7)) for line in text.splitlines() if line.count("|") >= 7]
    here = Path(folder).resolve()
    return [job for job in jobs if Path(job.folder).resolve() == here]


def state(job_id: str) -> str | None:
    """A job's state; None once SLURM has forgotten it. Raises UserError when SLURM does not answer."""
    try:
        text = _ask(["squeue", "--states=all", "--noheader", "--format=%T", f"--jobs={job_id}"])
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return text.strip() or None


def cancel(ids: Iterable[str], *, only_waiting: bool = False) -> None:
    """Cancel jobs; unknown and finished ones are passed over. Raises UserError when SLURM does not answer."""
    ids = list(ids)
    states = ["--state=PENDING"] if only_waiting else []
    for start in range(0, len(ids), 500):  # a command line has a limit
        _ask(["scancel", "--quiet", *states, *ids[start : start + 500]])


def nodes(partition: str) -> set[str]:
    """Nodes of a partition on which a job can start, now or when they are free."""
    text = _ask(["sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T"])
    states = dict(line.split()[:2] for line in text.splitlines())
    return {node for node, state in states.items() if re.fullmatch(r"idle|mixed|allocated|completing", state)}


def _ask(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]} is not installed here; this needs a machine of a SLURM cluster.") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"SLURM did not answer {command[0]} within {_ANSWER_SECONDS:.0f} s; try again.") from error
    if done.returncode:
        words = done.stderr.strip() or f"exit code {done.returncode}"
        raise UserError(f"SLURM refused {command[0]}: {words}. Try again when `sinfo` answers.")
    return done.stdout
