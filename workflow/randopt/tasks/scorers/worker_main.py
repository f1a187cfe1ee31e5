"""The process behind `worker.Worker`: limits itself, then answers JSON lines with a module of handlers.

Started as a script with the path of that module, which has MEMORY (bytes of address space), `prepare()`
(imports what is heavy) and `reply(question)` (a dict for a dict). It says {"ready": true} or
{"error": text}, then a line per line. It imports nothing of this project: an empty environment has no
path to it.
"""

import importlib.util
import json
import math
import os
import resource
import sys
from types import ModuleType


def main() -> None:
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # model text that is evaluated may print; that must not look like a reply
        os.dup2(nothing, stream)
    try:
        handlers = load(sys.argv[1])
        handlers.prepare()
    except Exception as error:
        print(json.dumps({"error": f"importing failed ({error})"}), file=replies, flush=True)
        return
    limit(resource.RLIMIT_AS, handlers.MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in questions:
        question = json.loads(line)
        limit_cpu(question["seconds"])
        print(json.dumps(handlers.reply(question)), file=replies, flush=True)


def load(path: str) -> ModuleType:
    """The module in the file, whatever the import path is."""
    spec = importlib.util.spec_from_file_location("handlers", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit(which: int, value: int) -> None:
    """Lower a limit of this process and its children for good, never raise it."""
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def limit_cpu(seconds: float) -> None:
    """From now on at most so much CPU time: a stuck question burns no more, even if nobody is left to kill us."""
    spent = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(spent + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
