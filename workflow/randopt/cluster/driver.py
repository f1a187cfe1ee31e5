"""The Snakemake driver as a SLURM job of its own, so that no login session has to last a night.

It drains before its time limit, puts itself back into the queue and goes on; a crash of its node ends in the same
place, since every start settles what an earlier driver left (randopt.cluster.leftovers).
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit

from randopt.cluster import leftovers, lock, record, slurm
from randopt.errors import UserError
from randopt.experiment import Experiment

MARGIN_SECONDS = 60.0  # left of the drain for giving up, requeueing and SLURM's own lateness


class Driver(submitit.helpers.Checkpointable):
    """What the job runs: Snakemake as a child, which the job's own signals do not reach."""

    def __init__(self, command: Sequence[str], folder: str, drain_seconds: float) -> None:
        self.command = list(command)
        self.folder = folder
        self.drain_seconds = drain_seconds
        self._child: subprocess.Popen | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_child": None}

    def __call__(self) -> int:
        """Run Snakemake to its end; its exit code, raised as an error when it is not 0, so that the job fails too."""
        os.chdir(self.folder)
        print("+", shlex.join(self.command), flush=True)
        self._child = subprocess.Popen(
            self.command,
            env=_child_environment(),
            # SLURM signals the whole step; the time limit's warning is for this process alone
            preexec_fn=_ignore_warning,
        )
        # wait() would hold a lock that the signal handler below needs
        while self._child.poll() is None:
            time.sleep(0.5)
        if self._child.returncode:
            raise SystemExit(self._child.returncode)
        return 0

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Called when the time limit nears: let running shards end, submit no more, and start again in a new job.

        What still runs when the drain is over is left running; the next driver adopts it.
        """
        end = time.monotonic() + max(0.0, self.drain_seconds - MARGIN_SECONDS)
        child = self._child
        if child is not None and child.poll() is None:
            print("the time limit is near: no new job is submitted, running ones may end", flush=True)
            child.send_signal(signal.SIGTERM)
            self._cancel_waiting()
            while child.poll() is None and time.monotonic() < end:
                time.sleep(0.5)
            if child.poll() is None:
                print("shards still run and are left to the next driver", flush=True)
                child.kill()
        return submitit.helpers.DelayedSubmission(Driver(self.command, self.folder, self.drain_seconds))

    def _cancel_waiting(self) -> None:
        """Shards that have not begun would keep the drain waiting; the next driver submits them again."""
        own = os.environ.get("SLURM_JOB_ID")
        try:
            waiting = [job.id for job in slurm.queue(Path(self.folder)) if job.waiting and job.id != own]
            slurm.cancel(waiting, only_waiting=True)
        except UserError as error:
            print(error, flush=True)


def submit(
    experiment: Experiment,
    command: Sequence[str],
    *,
    hours: float,
    drain_minutes: float,
    partition: str | None,
    account: str | None,
    memory_gb: float,
) -> record.Record:
    """Send the driver to the queue. Raises UserError when one is at work already or SLURM refuses it."""
    folder = experiment.folder
    check_alone(experiment)
    executor = submitit.SlurmExecutor(folder=folder / "driver", max_num_timeout=100_000)
    executor.update_parameters(
        job_name=f"randopt-driver-{experiment.config['experiment']}",
        time=round(hours * 60),
        signal_delay_s=round(drain_minutes * 60),
        cpus_per_task=2,
        mem=f"{memory_gb:g}GB",
        stderr_to_stdout=True,
        **({"partition": partition} if partition else {}),
        **({"account": account} if account else {}),
        additional_parameters={"requeue": True, "comment": f"driver of {experiment.config['experiment']}"},
    )
    driver = Driver(command, str(Path.cwd()), drain_minutes * 60)
    try:
        job = executor.submit(driver)
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError) as error:
        raise UserError(f"SLURM refused the driver: {error}") from error
    sent = record.Record(job.job_id, str(job.paths.stdout), list(command), time.time())
    record.write(folder, sent)
    return sent


def check_alone(experiment: Experiment) -> None:
    """Raise UserError when a driver job or an interactive driver has the experiment's runs."""
    last = record.read(experiment.folder)
    if last and alive(last):
        raise UserError(
            f"the driver of {experiment.config['experiment']} is in the queue already, as job {last.job} "
            f"(log {last.log}). Watch it with `randopt status`, end it with `randopt cancel`."
        )
    for run in experiment.runs:
        holder = lock.holder(run.folder)
        if holder:
            raise UserError(f"a driver is at work on {run.folder} already: {holder}. End it with `randopt cancel`.")


def alive(job: record.Record) -> bool:
    """Whether a driver job waits or runs. Raises UserError when SLURM does not answer."""
    state = slurm.state(job.job)
    return state is not None and state not in slurm.ENDED


def cancel(experiment: Experiment) -> list[str]:
    """End the driver, wherever it is, and all jobs of the experiment; what was done, in sentences.

    Parts and finished shards stay. Raises UserError when SLURM does not answer.
    """
    done = []
    experiment.stop_file.parent.mkdir(parents=True, exist_ok=True)
    holders = {str(holder): holder for run in experiment.runs if (holder := lock.holder(run.folder))}
    for holder in holders.values():
        if holder.job:
            continue  # scancel ends it
        if holder.host == os.uname().nodename:
            os.kill(holder.pid, signal.SIGTERM)
            done.append(f"told the driver ({holder}) to stop")
        else:
            experiment.stop_file.touch()
            done.append(f"the driver ({holder}) stops at its next look at the queue, within three minutes")
    if not slurm.available():
        return done
    last = record.read(experiment.folder)
    if last and alive(last):
        slurm.cancel([last.job])
        done.append(f"cancelled the driver job {last.job}")
    for _ in range(30):  # a driver that has not yet understood may submit once more
        jobs = leftovers.ours(experiment.runs, slurm.queue(Path.cwd()))
        active = [job.id for job in jobs if job.state != "COMPLETING"]
        if active:
            slurm.cancel(active)
            done.append(f"cancelled {len(active)} job(s): {', '.join(active[:8])}{' ...' if len(active) > 8 else ''}")
        elif not any(lock.holder(run.folder) for run in experiment.runs):
            break
        time.sleep(1.0)
    return done


def snakemake_command(config: Path, arguments: Sequence[str]) -> list[str]:
    """The command of the driver: this environment's Snakemake on `config`, with the SLURM profile unless another is
    given."""
    command = [sys.executable, "-m", "snakemake", *arguments]
    if not any(a.split("=")[0] in ("--profile", "--executor", "-e", "--cores", "-c") for a in arguments):
        command += ["--profile", "slurm"]
    if not any(a.split("=")[0] in ("--configfile", "--configfiles") for a in arguments):
        command += ["--configfile", str(config)]
    return command


def _child_environment() -> dict[str, str]:
    """Without what SLURM said to the driver's own job: sbatch would take it for wishes about the shards."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_"))}
    kept[lock.JOB_VARIABLE] = os.environ.get("SLURM_JOB_ID", "")
    return kept


def _ignore_warning() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
