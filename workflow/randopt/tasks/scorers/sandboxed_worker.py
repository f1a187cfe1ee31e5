"""What the worker process of `sandboxed.py` does: reasoning-gym's scorers on model text.

It answers {"dataset", "params", "entry", "answer", "seconds"} with {"score": number} or {"error": text}.
"""

import functools
import importlib
import inspect
import json
import math
import os
import re
import resource
import select
import signal
import sys

MEMORY = 4 * 2**30  # bytes of address space; reasoning-gym and SymPy take 0.3 GB of it
GRIDS_AS_TUPLES = ("arc_agi", "rearc")  # they compare with tuples, which JSON does not know


def prepare() -> None:
    import reasoning_gym  # noqa: F401

    importlib.import_module("sympy.parsing.sympy_parser")  # here once, not in every forked child


def reply(question: dict) -> dict:
    try:
        dataset, evaluates = load(question["dataset"], json.dumps(question["params"], sort_keys=True))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    entry = question["entry"]
    if question["dataset"] in GRIDS_AS_TUPLES:
        entry = tuples(entry)
    if evaluates:
        score = scored_in_child(dataset, question["answer"], entry, question["seconds"])
    else:
        score = scored(dataset, question["answer"], entry)
    return {"score": score}


@functools.lru_cache(maxsize=32)
def load(name: str, params: str) -> tuple:
    """The data set, and whether its module evaluates text (its own question makes no difference here)."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, **{**json.loads(params), "seed": 0, "size": 1})
    source = inspect.getsource(sys.modules[type(dataset).__module__])
    return dataset, re.search(r"\b(eval|exec|parse_expr|sympify)\(", source) is not None


def scored(dataset, answer: str, entry: dict) -> float:
    """The data set's score; 0 when it raises or returns no finite number."""
    try:
        score = float(dataset.score_answer(answer, entry))
    except Exception:
        return 0.0
    return score if math.isfinite(score) else 0.0


def scored_in_child(dataset, answer: str, entry: dict, seconds: float) -> float:
    """`scored` in a forked child: whatever the text did, to time, memory or modules, ends with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no further processes (root is exempt from this limit)
            os.write(writer, repr(scored(dataset, answer, entry)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    ready, _, _ = select.select([reader], [], [], seconds)
    text = os.read(reader, 64) if ready else b""
    os.close(reader)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return float(text)
    except ValueError:
        return 0.0


def tuples(value):
    """Lists as tuples, at every depth."""
    if isinstance(value, list):
        return tuple(tuples(part) for part in value)
    if isinstance(value, dict):
        return {key: tuples(part) for key, part in value.items()}
    return value
