"""Files that are either whole or absent."""

import errno
import glob
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from randopt.errors import UserError

log = logging.getLogger(__name__)

# full, over quota, read-only, a file server that is away: somebody or something mends these while we wait
_MAY_PASS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE))
_LOOK_SECONDS = 5.0
LOG_TAIL = 8192  # bytes of a log that are searched for its last words


class CannotWriteNow(UserError):
    """A folder that cannot be written at present, but may well be in some minutes."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, then fsync and rename onto `path`.

    A reader, or a run that is killed at any moment, sees the old file or the whole new one.
    Raises UserError when the folder is read-only or full, leaving nothing behind.
    """
    path = Path(path)
    for last in (False, False, True):
        try:
            return _write_once(path, write)
        except FileNotFoundError as error:  # a second copy of a job finished and removed the folder under us
            if last:
                raise _cannot_write(path, error) from error
        except OSError as error:
            raise _cannot_write(path, error) from error


def give_second_name(path: Path, name: Path) -> None:
    """Make `name` the file `path` too, atomically: a hard link, or a copy where the file system has none."""

    def link(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)

    write_atomic(name, link)


def patiently(write: Callable[[], object], seconds: float) -> None:
    """Call `write`, and again for up to `seconds` while the disk is full, read-only or away.

    A loaded engine is worth more than minutes of waiting. Raises CannotWriteNow when the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            write()
            return
        except CannotWriteNow as error:
            left = end - time.monotonic()
            if left <= 0:
                raise
            log.warning("waiting, at most %.0f s more: %s", left, error)
            time.sleep(min(_LOOK_SECONDS, left))


def remove_temporaries(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left beside it."""
    for temporary in Path(path).parent.glob(f".{glob.escape(Path(path).name)}.*.tmp"):
        temporary.unlink(missing_ok=True)


def last_words(log: Path) -> str:
    """The last line of a log that names an error, or nothing."""
    try:
        with open(log, "rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_TAIL))
            text = stream.read().decode(errors="replace").replace("\r", "\n")
    except OSError:
        return ""
    named = [line.strip() for line in text.splitlines() if re.search(r"error|interrupted|killed", line, re.IGNORECASE)]
    return named[-1] if named else ""


def _write_once(path: Path, write: Callable[[Path], object]) -> None:
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        os.chmod(temporary, 0o666 & ~_umask())
        write(temporary)
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        _fsync_folder(path.parent)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise


def _cannot_write(path: Path, error: OSError) -> UserError:
    kind = CannotWriteNow if error.errno in _MAY_PASS else UserError
    return kind(
        f"cannot write {path}: {error.strerror or error}. "
        "Free space or make the folder writable, then run the same command again; "
        "everything already written is kept."
    )


def write_text_atomic(path: Path, text: str) -> None:
    """Write `text` (UTF-8) to `path`, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
