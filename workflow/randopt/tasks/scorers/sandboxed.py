"""Verdicts by reasoning-gym's own scorers, reached through a process that may be killed.

About ten of those scorers pass the model's text to eval() or SymPy, where 9**9**9 never returns. They
run in `sandboxed_worker.py`, started once and fed JSON lines; when an answer takes too long or the
worker dies, its whole process group is killed, the answer gets reward 0, and the next call starts a
new one. A guard against accidents and stuck models, not against an attacker: run untrusted models
in a container.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from randopt.errors import UserError
from randopt.tasks.scorers.text import last_block
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

MAX_ANSWER = 20_000  # characters; the longest answers of the data sets (grids) have about 3,000
SECONDS = 5.0  # for one answer; the usual ones take under 50 ms, most under 1 ms
START_SECONDS = 120.0  # importing reasoning-gym takes 2 s, much longer from a cold network file system
_WORKER = Path(__file__).with_name("sandboxed_worker.py")


def score(response: str, reference: Any) -> Verdict:
    """Verdict by the data set's own score_answer, in bounded time (SECONDS, and a restart).

    reference: {question, answer, metadata} as the data set made it, with `dataset` (or
    metadata.source_dataset) its name and `params` its configuration, if not the default.
    The reward is the data set's score of the extracted answer, 0 to 1: the last answer block, else
    the last line.
    strict: a score of 1 for an answer inside tags; lenient: also without tags.
    vote key: the extracted answer, white space normalised and case-folded.
    """
    entry = _entry(reference)
    tagged = last_block(response, "<answer>", "</answer>")
    answer = (response.rstrip().rpartition("\n")[2] if tagged is None else tagged).strip()
    if not answer or len(answer) > MAX_ANSWER:
        return NO_ANSWER
    reward = _WORKER_PROCESS.ask({"answer": answer, **entry})
    right = reward >= 1 - 1e-9
    key = " ".join(answer.split()).casefold().encode("utf-8", "replace").decode()
    return Verdict(reward, right and tagged is not None, right, key)


def _entry(reference: Any) -> dict[str, Any]:
    try:
        metadata = reference["metadata"]
        entry = {"question": reference["question"], "answer": reference["answer"], "metadata": metadata}
        dataset = reference["dataset"] if "dataset" in reference else metadata["source_dataset"]
        params = reference.get("params") or {}
    except (TypeError, KeyError) as error:
        expected = 'an entry {"question", "answer", "metadata", "dataset"} of reasoning-gym'
        raise bad_reference("reasoning_gym", reference, expected) from error
    return {"dataset": dataset, "params": params, "entry": entry}


class _Worker:
    """The one worker of this process: started at the first question, closed at exit."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.unread = b""

    def ask(self, question: dict[str, Any]) -> float:
        """The score, 0 when the worker failed on it or did not answer in time."""
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self._start()
        line = json.dumps({**question, "seconds": SECONDS}).encode() + b"\n"
        reply = self._exchange(line, SECONDS + 2.0)
        if reply is None:
            self.close()
            return 0.0
        if "error" in reply:
            raise UserError(
                f"reasoning_gym:{question['dataset']} cannot score: {reply['error']}. "
                "Check the data set's name and params with the installed version of reasoning-gym."
            )
        return min(1.0, max(0.0, float(reply["score"])))

    def close(self) -> None:
        """Kill the worker with everything it started."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream:
                stream.close()

    def _start(self) -> None:
        self.close()
        self.process = subprocess.Popen(
            # -P: the script's folder holds modules that must not hide the standard library's.
            [sys.executable, "-P", "-B", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        self.owner, self.unread = os.getpid(), b""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
        reply = self._exchange(b"", START_SECONDS)
        if reply is None or not reply.get("ready"):
            self.close()
            reason = (reply or {}).get("error", f"it did not start within {START_SECONDS:.0f} s")
            raise UserError(
                f"the scorer reasoning_gym cannot be used: {reason}. Install it into this environment "
                "(pip install reasoning-gym), and see that 4 GB of memory are free."
            )

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Write `line`, return the next reply; None when time runs out or the worker is gone.

        Both pipes are non-blocking and watched together: a worker that stops reading cannot hold us.
        """
        assert self.process and self.process.stdin and self.process.stdout
        writer, reader = self.process.stdin.fileno(), self.process.stdout.fileno()
        deadline = time.monotonic() + seconds
        try:
            while b"\n" not in self.unread:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                readable, writable, _ = select.select([reader], [writer] if line else [], [], left)
                if writable:
                    line = line[os.write(writer, line[:65536]) :]
                if readable:
                    block = os.read(reader, 65536)
                    if not block:
                        return None
                    self.unread += block
            reply, _, self.unread = self.unread.partition(b"\n")
            found = json.loads(reply)
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None


_WORKER_PROCESS = _Worker()
atexit.register(_WORKER_PROCESS.close)
