"""A scorer of one's own: file.py:function, called as function(response, reference).

Its code is trusted as the workflow's is, the texts are not: it runs in a process of its own, which is ended when a text
takes too long. It returns
    True or False                right or wrong,
    a number from 0 to 1         the reward; 1 is right,
    {"reward": 0.5, ...}         with strict, lenient and vote_key where they are known.
Without a vote_key the answer is what `answer.final` finds.
"""

import ast
import atexit
import hashlib
import importlib.util
import math
import multiprocessing
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from randopt.errors import UserError
from randopt.tasks.scorers.answer import MAX_ANSWER, final, normal
from randopt.tasks.scorers.verdict import NO_ANSWER, Scorer, Verdict

SECONDS = 10.0  # for one response
START_SECONDS = 120.0  # a cold network file system and heavy imports
EXPECTED = 'True or False, a number from 0 to 1, or {"reward": 0.5, "strict": False, "lenient": False, "vote_key": "b"}'


def is_own(text: str) -> bool:
    """Whether a scorer's text names a file and not one of ours."""
    return ".py:" in text and not text.startswith("{")


def scorer(text: str) -> Scorer:
    """The scorer that file.py:function means, named after both and the file's content: an edited file is another one.

    The file is read, not run. Raises UserError when it is no Python or lacks the function.
    """
    name, _, function = text.rpartition(":")
    path = Path(name)
    try:
        source = path.read_bytes()
        tree = ast.parse(source, str(path))
    except OSError as error:
        raise UserError(f"scorer {text!r}: {path} cannot be read ({error.strerror}); mend the path.") from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise UserError(f"scorer {text!r}: {path}, line {line}: {error.args[0]}; it is no valid Python.") from error
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if function not in defined:
        raise UserError(
            f"scorer {text!r}: {path} has no function {function!r}, only {', '.join(defined) or 'none'}; "
            f"write `def {function}(response, reference):` there."
        )
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{path.stem}.{function}")
    digest = hashlib.sha256(source).hexdigest()[:8]
    return Scorer(f"{readable}-{digest}", 1, partial(score, path=path.resolve(), function=function), sandboxed=True)


def score(response: str, reference: Any, path: Path, function: str) -> Verdict:
    """The verdict of the user's function; NO_ANSWER when it takes longer than SECONDS.

    Raises UserError that names the file's line when the function raises, or what it returned when that is no verdict.
    """
    kind, value = _process(path, function).ask(response, reference)
    if kind == "late":
        return NO_ANSWER
    if kind == "error":
        raise UserError(f"{path.name}:{function} failed: {value}. It must judge any text; mend it and run again.")
    return _verdict(value, response, f"{path.name}:{function}")


def _verdict(value: Any, response: str, where: str) -> Verdict:
    given = value if isinstance(value, dict) else {"reward": value}
    reward = given["reward"] if isinstance(given.get("reward"), (bool, int, float)) else math.nan
    usable = math.isfinite(reward) and 0 <= reward <= 1
    flags = [given[name] for name in ("strict", "lenient") if name in given]
    key = given["vote_key"] if "vote_key" in given else normal(final(response)[0])[:MAX_ANSWER]
    known = given.keys() <= {"reward", "strict", "lenient", "vote_key"}
    if not usable or not known or not all(isinstance(flag, bool) for flag in flags) or not isinstance(key, str | None):
        raise UserError(f"{where} returned {repr(value)[:200]}, expected {EXPECTED}. Mend it and run again.")
    lenient = cast(bool, given.get("lenient", given.get("strict", reward >= 1)))
    strict = cast(bool, given.get("strict", lenient))
    if strict and not lenient:
        raise UserError(f"{where} returned {repr(value)[:200]}: what is strictly right is right; set lenient too.")
    return Verdict(float(reward), strict, lenient, key or None)


class _Process:
    """The process in which one function of one file runs: started at the first question, and again after it hung."""

    def __init__(self, path: Path, function: str) -> None:
        self.path, self.function = path, function
        self.process: Any = None
        self.owner = 0
        self.connection: Any = None

    def ask(self, response: str, reference: Any) -> tuple[str, Any]:
        """("value", what the function returned), ("error", where and why) or ("late", None)."""
        if self.process is None or self.owner != os.getpid() or not self.process.is_alive():
            started = self._start()
            if started[0] != "value":
                return started
        try:
            self.connection.send((response, reference))
            if self.connection.poll(SECONDS):
                return self.connection.recv()
        except (EOFError, OSError):  # the text ended the process
            pass
        self.close()
        return "late", None

    def _start(self) -> tuple[str, Any]:
        self.close()
        context = multiprocessing.get_context("spawn")  # fork would copy the locks of other threads
        self.connection, theirs = context.Pipe()
        arguments = (theirs, str(self.path), self.function)
        self.process, self.owner = context.Process(target=_serve, args=arguments, daemon=True), os.getpid()
        self.process.start()
        theirs.close()
        try:
            if self.connection.poll(START_SECONDS):
                return self.connection.recv()
        except EOFError:
            pass
        self.close()
        return "error", f"it ended, or was not ready within {START_SECONDS:.0f} s, while it was imported"

    def close(self) -> None:
        """Kill the process."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.join()
            self.connection.close()


_PROCESSES: dict[tuple[Path, str], _Process] = {}


def _process(path: Path, function: str) -> _Process:
    key = (path, function)
    if key not in _PROCESSES:
        _PROCESSES[key] = _Process(path, function)
        atexit.register(_PROCESSES[key].close)
    return _PROCESSES[key]


def _serve(connection: Connection, path: str, function: str) -> None:
    """Import the file, then answer (response, reference) with what the function returns, until nobody asks."""
    sys.path.insert(0, str(Path(path).parent))
    try:
        specification = importlib.util.spec_from_file_location("own_scorer", path)
        assert specification and specification.loader
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        judge: Callable = getattr(module, function)
    except BaseException as error:
        connection.send(("error", _place(error, path)))
        return
    connection.send(("value", None))
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            reply = ("value", _plain(judge(*question)))
        except Exception as error:
            reply = ("error", _place(error, path))
        connection.send(reply)


def _plain(value: Any) -> Any:
    """What may be sent: numbers of NumPy become Python's, a named tuple a dict, anything strange its text."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if hasattr(value, "item"):
        value = value.item()
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)[:200]


def _place(error: BaseException, path: str) -> str:
    """The last line of the user's file that the error went through, and the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    place = f"{path}, line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {error}"[:500]
