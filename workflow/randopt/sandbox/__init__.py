"""Running Python programs that a model wrote: in a process of their own, limited, without network, killable.

Two modes, chosen by `scoring.sandbox` in the configuration (docs/sandbox.md says what each keeps out):
bubblewrap: namespaces of its own (files, processes, network) besides everything below.
limits: resource limits, a filter of system calls and an empty environment, for machines where user namespaces are
forbidden. There a program can read what the user can read, the right answers among it.

Imported when the Snakefile is parsed: the standard library alone.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from randopt.errors import UserError
from randopt.sandbox import seccomp

MODES = ("bubblewrap", "limits")
MEMORY = 512 * 2**20  # bytes of address space; the worker itself takes 25 MiB
FILES = 16 * 2**20  # bytes of the temporary folder, and of one file
MAX_OUTPUT = 8 * 2**20  # bytes that a program may claim in all
START_SECONDS = 60.0  # 15 ms are usual; a busy machine or a cold network file system takes longer
_WORKER = Path(__file__).with_name("worker.py")
_INTERPRETER = Path(os.path.realpath(sys.executable))
_mode = "bubblewrap"


@dataclass(frozen=True)
class Request:
    """One program and what is asked of it: values of `expressions`, or whether `statements` pass.

    `names` are bound before the program runs, to values in the form of worker.tree. Expressions share one run of the
    program; each statement gets a run of its own.
    """

    program: str
    setup: str = ""  # runs after the program, in its names
    expressions: Sequence[str] = ()
    statements: Sequence[str] = ()
    names: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """What the program's process said: all of it claims of the program, `form` excepted."""

    form: str | None  # syntax tree without layout, comments and docstrings; None: no program, or statements
    replies: tuple[Any, ...]  # {"value": tree} or {"raised": name} per question, fewer when it was stopped


def use(mode: str) -> None:
    """Choose the mode for this process; "bubblewrap" until then."""
    global _mode
    if mode not in MODES:
        raise UserError(f"sandbox {mode!r} was given, expected one of {', '.join(MODES)}.")
    _mode = mode


def run(request: Request, cpu_seconds: int, seconds: float, seconds_each: float | None = None) -> Answers:
    """Run a program in the chosen sandbox; never raises for what the program does.

    cpu_seconds: processor time. seconds: wall-clock time in all, after which it is killed;
    seconds_each: for each reply, if less.
    Raises UserError when the sandbox itself cannot be started.
    """
    limits = {
        "RLIMIT_AS": MEMORY,
        "RLIMIT_CPU": cpu_seconds,
        "RLIMIT_FSIZE": FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
    }
    message = {
        "program": request.program,
        "setup": request.setup,
        "expressions": list(request.expressions),
        "statements": list(request.statements),
        "names": dict(request.names),
        "limits": limits,
        "filter": seccomp.program(writing=_mode == "bubblewrap").hex(),
    }
    wanted = len(request.statements) or 1 + len(request.expressions)
    with open(os.memfd_create("request"), "w+b") as stdin, open(os.memfd_create("errors"), "w+b") as stderr:
        stdin.write(json.dumps(message).encode())
        stdin.seek(0)
        lines = _converse(stdin, stderr, wanted, seconds, seconds_each or seconds)
        if lines is None:
            stderr.seek(0)
            raise _cannot_start(stderr.read(2000).decode(errors="replace").strip())
    said = [_parsed(line) for line in lines]
    if request.statements:
        return Answers(None, tuple(said))
    form = said[0].get("form") if said and isinstance(said[0], dict) else None
    return Answers(form if isinstance(form, str) else None, tuple(said[1:]))


def require(mode: str) -> None:
    """UserError when the sandbox `mode` does not work on this machine; runs one that tries to get out."""
    use(mode)
    attempts = (
        "6 * 7",
        "__import__('os').fork()",
        "__import__('socket').socket()",
        "__import__('os').execv('/bin/true', ['true'])",
        f"open({str(_WORKER)!r})" if mode == "bubblewrap" else "open('/tmp/randopt-sandbox', 'w')",
    )
    replies = run(Request("", expressions=attempts), cpu_seconds=5, seconds=30.0).replies
    expected = [{"value": ["int", hex(42)]}, *[{"raised": "PermissionError"}] * 3]
    expected.append({"raised": "FileNotFoundError" if mode == "bubblewrap" else "PermissionError"})
    if list(replies) != expected:
        raise UserError(
            f"scoring.sandbox: {mode} does not keep programs in on this machine: of {', '.join(attempts)} it said "
            f"{list(replies)}, expected {expected}. docs/sandbox.md says what it needs."
        )


def _cannot_start(reason: str) -> UserError:
    if _mode == "limits":
        return UserError(f"scoring.sandbox: limits does not work on this machine: {reason or 'no reason was given'}.")
    return UserError(
        f"scoring.sandbox: bubblewrap does not work on this machine: {reason or 'no reason was given'}. It needs the "
        "package bubblewrap and user namespaces. `randopt sandbox` tells what works here; docs/sandbox.md tells how to "
        "get it, and what the weaker `scoring: {sandbox: limits}` risks."
    )


def _command() -> list[str]:
    script = [str(_INTERPRETER), "-I", "-S", "-B"]
    if _mode == "limits":
        if os.geteuid() == 0:
            raise UserError(
                "scoring.sandbox: limits was given, but this process is root, whom few limits bind. Use bubblewrap, or "
                "another user."
            )
        return [*script, str(_WORKER)]
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise _cannot_start("the command bwrap is not installed")
    command = [bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--cap-drop", "ALL", "--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    for folder in ("/usr", "/lib", "/lib64", *_installation()):  # read-only: the interpreter and what it links
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        else:
            command += ["--ro-bind-try", folder, folder]
    command += ["--dev", "/dev", "--ro-bind", str(_WORKER), "/worker.py", "--size", str(FILES), "--tmpfs", "/tmp"]
    # the root and /dev are file systems in memory as well, of any size
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", *script, "/worker.py"]


def _installation() -> Iterator[str]:
    """Folders of the interpreter outside /usr: its own files and the standard library."""
    for folder in dict.fromkeys([str(_INTERPRETER.parent), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib"]):
        if not folder.startswith("/usr/"):
            yield folder


def _converse(
    stdin: BinaryIO, stderr: BinaryIO, wanted: int, seconds: float, seconds_each: float
) -> list[bytes] | None:
    """Lines that the worker says, at most `wanted`, until it ends or its time is up; None when it never was ready."""
    process = subprocess.Popen(
        _command(),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    said: list[bytes] = []
    unread, ready, size = b"", False, 0
    end = reply_by = time.monotonic() + START_SECONDS
    try:
        while len(said) < wanted and size < MAX_OUTPUT:
            left = min(end, reply_by) - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                break
            block = os.read(pipe, 65536)
            if not block:
                break
            size += len(block)
            *lines, unread = (unread + block).split(b"\n")
            if lines and not ready:
                ready, lines, end = True, lines[1:], time.monotonic() + seconds
                reply_by = min(end, time.monotonic() + seconds_each)
            if lines:
                said += lines
                reply_by = time.monotonic() + seconds_each
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    return said[:wanted] if ready else None


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # nothing that the worker says, but what a program may
        return None
