"""Weights copied once per node to its own disk, for sites whose shared file system is slow.

DIR/randopt-UID/MODEL_ID-DIGEST/         a whole copy
DIR/randopt-UID/.MODEL_ID-DIGEST.lock    held while a copy is made
DIR/randopt-UID/.MODEL_ID-DIGEST.*.tmp   a copy in the making, or what a killed job left of one

Scratch never fails a job: whatever is wrong with it is a warning, and the weights are read from the shared folder.

Copies stay for later jobs. Cleaning is the site's: an epilog that empties $TMPDIR, a purge by age. A copy that is
gone or torn is made again. We remove only damaged copies and what killed jobs left. DIR should be a disk: in a memory
file system (/dev/shm, /tmp at some sites) the copy counts as memory of the job that made it.
"""

import errno
import fcntl
import glob
import hashlib
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from randopt.models.prepare import Manifest, check_files, sha256

log = logging.getLogger(__name__)

MARGIN = 1 << 30  # bytes that stay free for whoever else writes there
_CHUNK = 1 << 24


def scratch_folder(text: str) -> Path | None:
    """The folder that `text` names on this node, with ~ and $VARIABLES; None when empty or, with a warning, unusable.

    A relative folder is refused: it would be below the results, on the very disk that is to be spared.
    """
    expanded = os.path.expanduser(os.path.expandvars(text.strip()))
    if not expanded:
        return None
    if "$" in expanded or not os.path.isabs(expanded):
        problem = "not every variable in it is set" if "$" in expanded else f"{expanded} is no absolute path"
        log.warning(
            "scratch: %s was given, but %s on %s; the weights are read from the shared folder",
            text,
            problem,
            socket.gethostname(),
        )
        return None
    return Path(expanded)


def local_manifest(manifest: Manifest, scratch: Path) -> Manifest:
    """The manifest of a whole copy of the weights below `scratch`, which is made now if there is none.

    Jobs of one node that start together make one copy. While there is one, the originals are not looked at.
    Where none can be made, `manifest` itself is returned, with a warning, its files checked. Raises UserError for
    originals that are missing or changed.
    """
    try:
        target = (
            _own_folder(scratch) / f"{manifest.path.absolute().parent.name}-{manifest.content['weights_digest'][:10]}"
        )
        local = replace(manifest, content={**manifest.content, "folder": str(target)})
        if not _is_whole(local):
            with _alone(target):
                if not _is_whole(local):  # the job that was waited for may have made it
                    check_files(manifest)
                    _make(manifest, target)
        log.info("the weights are read from this node's copy %s", target)
        return local
    except OSError as error:
        log.warning(
            "no copy of the weights below %s on %s (%s); they are read from the shared folder %s",
            scratch,
            socket.gethostname(),
            error,
            manifest.folder,
        )
    check_files(manifest)
    return manifest


def discard_damaged(local: Manifest) -> bool:
    """Whether the copy differs from what its manifest records; such a copy is removed, so that the next job makes it.

    For a copy of which an engine could not be loaded: every byte is read, where `local_manifest` trusts the sizes of
    weights, whose digest every engine compares.
    """
    try:
        with _alone(local.folder):
            if _is_whole(local, every_byte=True):
                return False
            _remove(local.folder)
    except OSError as error:
        log.warning("the damaged copy %s could not be removed: %s", local.folder, error)
    return True


def _own_folder(scratch: Path) -> Path:
    """DIR/randopt-UID; refused when somebody else could put files there, as in a shared /tmp."""
    folder = scratch / f"randopt-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(errno.EPERM, "not a folder that only you can write", str(folder))
    return folder


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """One job of the node at a time; the lock ends with its holder, however that ends."""
    with open(target.with_name(f".{target.name}.lock"), "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another job of this node is busy with %s: waiting for it", target)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is_whole(local: Manifest, every_byte: bool = False) -> bool:
    """Whether every recorded file is there. What no engine checks (the tokenizer, say) is always read in full."""
    try:
        for name, record in local.content["files"].items():
            file = local.folder / name
            if file.stat().st_size != record["size"]:
                return False
            if (every_byte or file.suffix != ".safetensors") and sha256(file) != record["sha256"]:
                return False
    except OSError:
        return False
    return True


def _make(manifest: Manifest, target: Path) -> None:
    """Copy beside `target`, compare, rename. Called under the lock, so whatever else lies there is dead."""
    begun = time.monotonic()
    for dead in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
        shutil.rmtree(dead, ignore_errors=True)
    if target.exists():
        log.info("%s is not whole: it is made again", target)
        _remove(target)
    size = sum(record["size"] for record in manifest.content["files"].values())
    free = shutil.disk_usage(target.parent).free
    if free < size + MARGIN:
        raise OSError(errno.ENOSPC, f"{(size + MARGIN) / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
    log.info("copying %.1f GB of weights from %s to %s, once for this node", size / 1e9, manifest.folder, target)
    temporary = _temporary(target)
    try:
        for name, record in manifest.content["files"].items():
            _copy(manifest.folder / name, temporary / name, record)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    log.info("copied in %.1f s", time.monotonic() - begun)


def _copy(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    """Hashed on the way. Not flushed to the disk: a copy that a power cut tears is noticed and made again."""
    digest = hashlib.sha256()
    with open(source, "rb", buffering=0) as reader, open(target, "wb") as writer:
        while chunk := reader.read(_CHUNK):
            digest.update(chunk)
            writer.write(chunk)
    if digest.hexdigest() != record["sha256"]:
        raise OSError(errno.EIO, "read with another content than was recorded", str(source))


def _remove(target: Path) -> None:
    """Set aside first: at no moment is there a half-removed copy under the name. Whoever has it open keeps it."""
    aside = _temporary(target)
    target.rename(aside / "old")
    shutil.rmtree(aside, ignore_errors=True)


def _temporary(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
