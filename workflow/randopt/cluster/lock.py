"""One driver per run: an advisory lock that ends with its holder, however that dies.

Snakemake's own lock stays behind after kill -9 and then refuses the same command until it is removed by hand; the
profiles turn it off. The kernel drops a flock with the process, on NFS with the client's lease.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from randopt.errors import UserError

log = logging.getLogger(__name__)

NAME = ".driver"
JOB_VARIABLE = "RANDOPT_DRIVER_JOB"  # SLURM's own variables do not reach a driver that is a job
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: list[IO[str]] = []  # open until the process ends


@dataclass(frozen=True)
class Holder:
    """Who drives a run: host, process, its SLURM job if it is one, Unix time of the start."""

    host: str
    pid: int
    job: str | None
    started: float

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.started))
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {since}"


def hold(folders: Iterable[Path]) -> None:
    """Hold the runs in `folders` for the rest of this process.

    Raises UserError that names the holder when another driver has one of them.
    """
    me = Holder(socket.gethostname(), os.getpid(), os.environ.get(JOB_VARIABLE) or None, time.time())
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        stream = open(folder / NAME, "a+", encoding="utf-8")  # noqa: SIM115 (held until the process ends)
        if not _lock(stream, fcntl.LOCK_EX, attempts=5):
            raise UserError(
                f"another driver is at work on {folder}: {_read(stream) or 'unknown'}. Watch it with `randopt status`, "
                "wait until it ends, or end it with `randopt cancel`. Nothing was changed."
            )
        stream.seek(0)
        stream.truncate()
        stream.write(json.dumps(asdict(me)))
        stream.flush()
        _held.append(stream)


def holder(folder: Path) -> Holder | None:
    """The driver that holds a run now, or None."""
    try:
        with open(folder / NAME, encoding="utf-8") as stream:
            return None if _lock(stream, fcntl.LOCK_SH, attempts=1) else _read(stream)
    except OSError:
        return None


def _lock(stream: IO[str], kind: int, attempts: int) -> bool:
    """Whether the lock was got. Somebody who only looks holds it for an instant, hence several attempts."""
    for attempt in range(attempts):
        if attempt:
            time.sleep(0.2)
        try:
            fcntl.flock(stream, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            log.warning("%s: this file system has no locks; two drivers at once would go unnoticed", stream.name)
            return True
    return False


def _read(stream: IO[str]) -> Holder | None:
    try:
        stream.seek(0)
        return Holder(**json.loads(stream.read()))
    except (ValueError, TypeError):
        return None
