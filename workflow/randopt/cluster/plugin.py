"""Two gaps of Snakemake's SLURM plugin (2.8.0) in which a driver would wait for ever, closed from outside.

The plugin takes a job that ended as PREEMPTED (partitions that cancel instead of requeueing) and a job that SLURM no
longer lists (its controller lost state, or nobody asked for longer than MinJobAge) for one that still runs. What its
status query returns is corrected before the plugin reads it: such a job has failed, is retried, and takes over
whatever it had finished.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from randopt.cluster import slurm

PATIENCE = 2  # looks in a row after which a strange state is believed


class Corrections:
    """Remembers what was seen of each job, look by look."""

    def __init__(self) -> None:
        self._absent: dict[str, int] = {}  # jobs that once were listed and alive -> looks since
        self._preempted: dict[str, int] = {}

    def apply(self, states: dict[str, str]) -> dict[str, str]:
        """`states` (job id -> SLURM state) with what will never change any more named as a failure."""
        corrected = dict(states)
        for job, state in states.items():
            if state == "PREEMPTED":
                self._preempted[job] = self._preempted.get(job, 0) + 1
                if self._preempted[job] >= PATIENCE:
                    corrected[job] = "CANCELLED"
            else:
                self._preempted.pop(job, None)
            if state in slurm.ENDED:
                self._absent.pop(job, None)
            else:
                self._absent[job] = 0
        for job in set(self._absent) - set(states):
            self._absent[job] += 1
            if self._absent[job] >= PATIENCE:
                corrected[job] = "FAILED"
        return corrected


def install(stop_file: Path, say: Callable[[str], None]) -> None:
    """Correct the plugin's status query in this process, and end the driver when `stop_file` appears.

    `randopt cancel` may be typed on another login node, from where no signal reaches this process.
    """
    import snakemake_executor_plugin_slurm as plugin  # type: ignore[import-untyped]

    original = plugin.query_job_status
    corrections = Corrections()

    async def query(command: str, logger: Any) -> tuple[dict[str, str] | None, float | None]:
        if stop_file.exists():
            stop_file.unlink(missing_ok=True)
            say("randopt cancel was called: no new job is submitted.")
            os.kill(os.getpid(), signal.SIGTERM)
        states, seconds = await original(command, logger)
        if states is not None:
            corrected = corrections.apply(states)
            for job in corrected:
                if corrected[job] != states.get(job):
                    say(f"SLURM job {job} ({states.get(job, 'no longer listed')}) counts as failed.")
            states = corrected
        return states, seconds

    plugin.query_job_status = query
