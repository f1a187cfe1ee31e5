"""Processes that run risky code on model text, and are killed with all they started when it gets out of hand.

A worker is `worker_main.py` with a module of handlers, started at the first question and fed JSON lines.
When a reply takes too long or the worker dies, its whole process group is killed, the question has no
reply, and the next one starts a new worker. A guard against accidents and stuck models, not against an
attacker: run untrusted models in a container.
"""

import atexit
import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from randopt.errors import UserError

START_SECONDS = 120.0  # importing takes a second or two, much longer from a cold network file system
_MAIN = Path(__file__).with_name("worker_main.py")


class Worker:
    """One process, started at the first question, closed at exit."""

    def __init__(self, handlers: str, scorer: str, remedy: str) -> None:
        """handlers: a module beside this one. scorer and remedy: for the error when it does not start."""
        self.handlers = Path(__file__).with_name(handlers)
        self.scorer, self.remedy = scorer, remedy
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0
        self.unread = b""
        _open.add(self)

    def ask(self, question: dict[str, Any], seconds: float, wall_seconds: float) -> dict[str, Any] | None:
        """The reply, or None when the worker died of the question or did not answer in time.

        seconds: of CPU time (rounded up to a whole one), which do not depend on what else the machine does.
        Raises UserError when the worker cannot be started.
        """
        if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
            self._start()
        reply = self._exchange(json.dumps({**question, "seconds": seconds}).encode() + b"\n", wall_seconds)
        if reply is None:
            self.close()
        return reply

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
            # -P: the scripts' folder holds modules that must not hide the standard library's.
            [sys.executable, "-P", "-B", str(_MAIN), str(self.handlers)],
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
            raise UserError(f"the scorer {self.scorer} cannot be used: {reason}. {self.remedy}")

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


class Pool:
    """Workers side by side, at most one per core that this process may use; started when they are needed."""

    def __init__(self, handlers: str, scorer: str, remedy: str) -> None:
        self.workers = [Worker(handlers, scorer, remedy) for _ in os.sched_getaffinity(0)]

    def ask_all(
        self, questions: Sequence[dict[str, Any]], seconds: float, wall_seconds: float
    ) -> list[dict[str, Any] | None]:
        """The replies in the order of the questions, each as `Worker.ask` gives it."""
        replies: list[dict[str, Any] | None] = [None] * len(questions)
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(questions)):
            waiting.put(index)
        failures: list[BaseException] = []

        def work(worker: Worker) -> None:
            try:
                while not failures:
                    index = waiting.get_nowait()
                    replies[index] = worker.ask(questions[index], seconds, wall_seconds)
            except queue.Empty:
                pass
            except BaseException as error:  # raised again below, in the caller's thread
                failures.append(error)

        # A worker takes about a second to start: a few questions are not worth a second one.
        team = self.workers[: max(1, len(questions) // _WORTH_A_WORKER)]
        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in team[1:]]
        for thread in threads:
            thread.start()
        work(team[0])
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return replies


_WORTH_A_WORKER = 50  # questions; one takes about 20 ms
_open: "weakref.WeakSet[Worker]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for worker in list(_open):
        worker.close()
