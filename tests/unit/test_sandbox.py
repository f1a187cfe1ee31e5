"""The sandbox: what a program may do, and that nothing else gets it anywhere."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from randopt import sandbox
from randopt.errors import UserError
from randopt.sandbox import Request, seccomp
from tests.unit.sandboxes import need_bubblewrap

WORKFLOW = Path(sandbox.__file__).resolve().parents[2]


def ask(program, *expressions, cpu_seconds=2, seconds=10.0, **more):
    need_bubblewrap()
    return sandbox.run(Request(program, expressions=expressions, **more), cpu_seconds, seconds)


def values(program, *expressions, **more):
    return [reply.get("value", reply.get("raised")) for reply in ask(program, *expressions, **more).replies]


def test_values_and_errors_come_back():
    program = "def f(x):\n    return {x: [x, 1.5, None, (True, b'a')]}"
    assert values(program, "f('é\\ud800')", "f(1)[1][3]", "1 / 0", "f(", "f(2)[2][0]") == [
        ["dict", [[["str", "é\ud800"], ["list", [["str", "é\ud800"], ["float", "0x1.8000000000000p+0"],
         ["none", None], ["tuple", [["bool", True], ["bytes", "61"]]]]]]]],
        ["tuple", [["bool", True], ["bytes", "61"]]],
        "ZeroDivisionError",
        "SyntaxError",
        ["int", "0x2"],
    ]  # fmt: skip


def test_the_set_up_may_use_the_program_and_names_are_bound_before_it():
    names = {"given": ["set", [["int", "0x2"], ["ratio", ["0x1", "0x2"]]]]}
    found = values("class Node:\n    size = len(given)", "root.size", setup="root = Node()\r\n", names=names)
    assert found == [["int", "0x2"]]


def test_what_built_makes_is_what_tree_wrote():
    from collections import deque
    from fractions import Fraction

    from randopt.sandbox.worker import built, tree

    parts = [None, True, -(10**5000), 1.5, float("inf"), 2 - 1j, "a\ud800\0", b"\xff", (), {1}, {"a": [{}]}]
    for value in [*parts, parts, deque([1]), Fraction(1, 3)]:
        again = built(json.loads(json.dumps(tree(value))))
        assert again == value and type(again) is type(value)


def test_form_ignores_layout_comments_and_docstrings():
    def form(program):
        return ask(program).form

    tidy = form("def f(x):\n    return x + 1")
    assert tidy and tidy == form('# note\ndef f( x ):\n  "Doc."\n  return (x+1)  # end\n') != form(
        "def f(x): return x + 2"
    )
    assert form("def f(:") is None and form("x = '\0'") is None


def test_what_honest_programs_need_works():
    program = """
import collections, functools, heapq, itertools, math, random, re, string, sys, tempfile, time, os
from dataclasses import dataclass
@dataclass
class Pair:
    a: int
def file():
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x")
        open(path, "w").write("hello")
        return open(path).read()
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
"""
    found = values(program, "file()", "Pair(3).a", "deep(900)", "(time.sleep(0.01), print('x'))[1]")
    assert found == [["str", "hello"], ["int", "0x3"], ["int", hex(900)], ["none", None]]


def test_nothing_of_this_machine_is_seen(tmp_path, monkeypatch):
    secret = tmp_path / "answers.txt"
    secret.write_text("42")
    monkeypatch.setenv("TOKEN", "hidden")
    found = values(
        "import os, socket, subprocess",
        f"os.path.exists({str(secret)!r})",
        f"os.path.exists({str(WORKFLOW)!r})",
        "os.path.exists(os.path.expanduser('~root/.bashrc')) or os.path.exists('/home') or os.path.exists('/proc/1')",
        "os.environ.get('TOKEN')",
        "sorted(os.listdir('/'))",
        "os.listdir('/tmp')",
    )
    assert found[:3] == [["bool", False]] * 3 and found[3] == ["none", None] and found[5] == ["list", []]
    assert {entry[1] for entry in found[4][1]} <= {"usr", "lib", "lib64", "dev", "tmp", "worker.py", *_top_folders()}


def _top_folders():
    return {Path(folder).parts[1] for folder in sandbox._installation()}


@pytest.mark.parametrize(
    "attempt",
    [
        "os.fork()",
        "threading.Thread(target=print).start()",
        "1 / (os.system('true') == 0)",
        "subprocess.run(['true'])",
        "os.execv('/bin/true', ['true'])",
        "socket.socket()",
        "socket.socketpair()",
        "os.setsid()",
        "os.kill(1, 9)",
        "os.kill(os.getppid(), 9)",
        "os.memfd_create('x')",
        "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
        "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
        "os.setuid(0)",
        "os.mkfifo('/tmp/f')",
        "os.symlink('/usr', '/tmp/l')",
        "open('/usr/x', 'w')",
        "open('/worker.py', 'a')",
        "os.unlink('/worker.py')",
        "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and 1 / 0",
        "open('/tmp/x', 'wb').write(bytes(20 * 2**20))",
        "bytearray(10**10)",
        "[0] * 10**12",
        "multiprocessing.Pool(2)",
    ],
)
def test_refused(attempt):
    modules = "import ctypes, multiprocessing, os, resource, signal, socket, subprocess, threading\n"
    modules += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    found = values(modules, attempt, "6 * 7")
    assert isinstance(found[0], str), found  # an exception, no value
    assert found[1:] == [["int", hex(42)]]


def test_only_the_temporary_folder_can_be_written_and_it_is_small():
    program = """
import os
def writable():
    found = []
    for folder, _, _ in os.walk("/"):
        try:
            open(os.path.join(folder, "x"), "w").close()
            found.append(folder)
        except OSError: pass
    return found
def fill():
    written = 0
    try:
        for n in range(100):
            with open(f"/tmp/{n}", "wb") as stream: written += stream.write(bytes(2**20))
    except OSError: pass
    return written
"""
    folders, written = values(program, "writable()", "fill()", cpu_seconds=5, seconds=10.0)
    assert folders == ["list", [["str", "/tmp"]]]
    assert 0 < int(written[1], 16) <= sandbox.FILES


def test_a_running_sandbox_is_seen_and_ends_with_its_time():
    need_bubblewrap()
    before = _sandboxes()
    waiting = threading.Thread(target=ask, args=("import time\ntime.sleep(60)", "1"), kwargs={"seconds": 3.0})
    waiting.start()
    deadline = time.monotonic() + 10
    while not _sandboxes() - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _sandboxes() - before
    waiting.join()
    time.sleep(0.1)
    assert not _sandboxes() - before


STOPPED = {
    "loop": "while True: pass",
    "loop that catches": """
while True:
    try:
        while True: pass
    except: pass
""",
    "signals ignored": """
import signal
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except: pass
while True: pass
""",
    "sleep": """
import time
while True: time.sleep(100)
""",
    "fork bomb": """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    "thread bomb": """
import threading
def spin():
    while True: pass
while True:
    try: threading.Thread(target=spin).start()
    except RuntimeError: pass
""",
    "print": "while True: print('x' * 10**6)",
    "every descriptor": """
import os
while True:
    for fd in range(64):
        try: os.write(fd, b'x' * 2**20)
        except OSError: pass
""",
    "lines": """
import os
while True:
    for fd in range(3, 64):
        try: os.write(fd, b'{}\\n' * 2**16)
        except OSError: pass
""",
    "memory": """
kept = []
while True:
    try: kept.append(bytearray(10**6))
    except MemoryError: pass
""",
    "stack": """
import sys
sys.setrecursionlimit(10**9)
def f(): return f()
f()
""",
    "exit": """
import sys
sys.exit(0)
""",
    "exit at once": """
import os
os._exit(0)
""",
    "thread that stays": """
import threading
def spin():
    while True: pass
threading.Thread(target=spin).start()
raise KeyboardInterrupt
""",
    "closed": """
import os
os.closerange(0, 1000)
""",
    "crash": """
import ctypes
ctypes.string_at(0)
""",
    "no modules": """
import sys
sys.modules.clear()
import __main__
__main__.json = __main__.os = None
""",
    "power": "9**9**9",
}


@pytest.mark.parametrize("name", STOPPED)
def test_stopped_in_time(name):
    before = _sandboxes()
    start = time.monotonic()
    found = ask(STOPPED[name], "6 * 7", cpu_seconds=1, seconds=1.5).replies
    assert time.monotonic() - start < 5
    assert {"value": ["int", hex(42)]} not in found
    time.sleep(0.1)
    assert not _sandboxes() - before, "the sandbox's process outlived it"


def _sandboxes():
    """Every sandboxed process of this machine."""
    return {int(pid.name) for pid in Path("/proc").glob("[0-9]*") if b"\0/worker.py\0" in _command_line(pid)}


def _command_line(pid):
    try:
        return (pid / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    "program",
    [
        "(" * 100_000,
        "-" * 100_000 + "1",
        "x = " + "[" * 90_000 + "]" * 90_000,
        "x" + ".a" * 100_000,
        "\n".join(" " * n + "if 1:" for n in range(2000)),
        "x = 1\n" * 200_000,
        "x = '\0'",
        "x = '\ud800'",
        "# coding: utf-7\nx = 1 +",
        "def f(:",
    ],
    ids=lambda program: ascii(program[:12]),
)
def test_hostile_source(program):
    start = time.monotonic()
    found = ask(program, "x", cpu_seconds=2, seconds=3).replies
    assert time.monotonic() - start < 6
    assert all("raised" in reply or reply == {"value": ["int", "0x1"]} for reply in found)


def test_a_coding_cookie_changes_nothing():
    assert values("# -*- coding: rot13 -*-\nx = 'é'", "x") == [["str", "é"]]


@pytest.mark.parametrize(
    "expression",
    [
        "(lambda a: a.append(a) or a)([])",
        "(lambda a: [a.append(a) for _ in range(9)] and a)([])",
        "list(range(10**6))",
        "functools.reduce(lambda a, _: [a], range(500), 1)",
    ],
)
def test_a_value_too_large_is_none(expression):
    assert values("import functools", expression, "1") == ["OverflowError", ["int", "0x1"]]


def test_output_that_is_too_long_ends_it():
    assert ask("", "'x' * 10**7", "1").replies == ()


def test_statements_get_a_run_of_the_program_each():
    need_bubblewrap()
    tests = ("n.append(1); assert len(n) == 1", "assert len(n) == 0", "assert n", "raise SystemExit(0)")
    found = sandbox.run(Request("n = []", statements=tests), 2, 3.0).replies
    assert found == (
        {"value": ["none", None]},
        {"value": ["none", None]},
        {"raised": "AssertionError"},
        {"raised": "SystemExit"},
    )


# The filter, and the modes.


def test_the_filters_numbers_are_the_kernels():
    headers = {
        "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        "aarch64": Path("/usr/include/asm-generic/unistd.h"),
    }
    if not all(path.is_file() for path in headers.values()):
        pytest.skip("the kernel's headers are not installed")
    named = {**seccomp.COMPUTING, **seccomp.WRITING}
    named |= {"open": seccomp.OPEN, "openat": seccomp.OPENAT}
    for column, path in enumerate(headers.values()):
        text = path.read_text()
        generic = {"newfstatat": "fstatat"} if column else {}
        for name, numbers in named.items():
            known = re.search(rf"#define __NR(?:3264)?_{generic.get(name, name)}\s+(\d+)", text)
            assert numbers[column] == (int(known[1]) if known else None), (path, name)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"riscv64.*x86_64, aarch64"):
        seccomp.program(writing=True, machine="riscv64")


def test_modes_are_named(monkeypatch):
    with pytest.raises(UserError, match=r"'docker'.*bubblewrap, limits"):
        sandbox.use("docker")
    monkeypatch.setattr(sandbox, "_mode", "bubblewrap")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"bwrap is not installed.*package bubblewrap"):
        sandbox.require("bubblewrap")


def test_a_sandbox_that_does_not_start_is_no_verdict(tmp_path, monkeypatch):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(refusing))
    with pytest.raises(UserError, match=r"No permissions to create new namespace.*docs/sandbox.md"):
        sandbox.run(Request("", expressions=["1"]), 1, 1.0)


def test_a_sandbox_that_lets_programs_out_is_refused(tmp_path, monkeypatch):
    leaky = tmp_path / "bwrap"
    leaky.write_text(f"#!/bin/sh\nexec {sys.executable} -I {sandbox._WORKER}\n")
    leaky.chmod(0o755)
    monkeypatch.setattr("shutil.which", lambda name: str(leaky))
    with pytest.raises(UserError, match=r"bubblewrap does not keep programs in"):
        sandbox.require("bubblewrap")


LIMITS = """
import json, sys, time
from randopt import sandbox
sandbox.require("limits")
start = time.monotonic()
out = {}
for name, program in json.load(sys.stdin).items():
    out[name] = sandbox.run(sandbox.Request(program, expressions=("6 * 7",)), 1, 1.5).replies
attempts = ["open('/tmp/randopt-x', 'w')", "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)", "os.mkdir('/tmp/randopt-x')",
  "os.kill(os.getppid(), 9)", "os.fork()", "socket.socket()", "os.unlink('/tmp/randopt-y')", "os.chmod('/tmp', 0)",
  "open('/etc/passwd').read() and 1"]
answers = sandbox.run(sandbox.Request("import os, socket", expressions=attempts), 1, 3.0).replies
print(json.dumps([out, [answer.get("raised", answer.get("value")) for answer in answers]]))
"""


def test_limits():
    """As another user when the tests run as root, whom `limits` refuses."""
    if os.geteuid() == 0:
        with pytest.raises(UserError, match=r"this process is root"):
            try:
                sandbox.require("limits")
            finally:
                sandbox.use("bubblewrap")
    python, user = (sys.executable, None) if os.geteuid() else ("/usr/bin/python3", "nobody")
    command = [python, "-c", "import randopt.sandbox"]
    environment = {"PYTHONPATH": str(WORKFLOW), "PYTHONDONTWRITEBYTECODE": "1"}
    if subprocess.run(command, env=environment, user=user, cwd="/", capture_output=True).returncode:
        pytest.skip(f"{python} cannot be used by {user}")
    hostile = json.dumps(
        {name: STOPPED[name] for name in ("loop", "sleep", "fork bomb", "every descriptor", "memory", "exit")}
    )
    done = subprocess.run(
        [python, "-c", LIMITS],
        env=environment,
        user=user,
        cwd="/",
        input=hostile,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    stopped, attempts = json.loads(done.stdout)
    assert all({"value": ["int", hex(42)]} not in replies for replies in stopped.values())
    assert attempts == ["PermissionError"] * 8 + [["int", "0x1"]]
