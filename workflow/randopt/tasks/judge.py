"""Verdicts for lines of JSON: what `randopt judge` does, and how other code can be compared with ours."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from randopt.errors import UserError
from randopt.tasks import scorers
from randopt.tasks.spec import TaskSpec, read, scorer_text

_TASKS = Path("config/tasks")


def judge(task: str | TaskSpec, scorer: str | None, lines_in: Iterable[str], out: TextIO) -> None:
    """Read {"response", "reference"} per line, print {"reward", "strict", "lenient", "vote_key"} per line.

    task: a task, or its name as in the configuration (looked up in config/tasks of the current folder,
    else of the checkout this package lies in).
    scorer: None is the task's own, "paper" its paper-compatible twin, else a scorer's name.
    Blank lines are skipped. Raises UserError with the line's number for anything that is no such line.
    """
    source: Any
    if isinstance(task, str):  # only its scorer is needed, its items may be elsewhere
        draft = read(task, tasks_folder())
        source, default = draft.keys.get("source", {}), scorer_text(draft.keys.get("scorer", ""), draft.folders)
    else:
        source, default = task.source, task.scorer
    chosen = scorers.resolve(default, scorer)
    for number, line in enumerate(lines_in, 1):
        if not line.strip():
            continue
        response, reference = _parse(line, number)
        if "reasoning_gym" in source and isinstance(reference, dict):
            reference = {
                "dataset": source["reasoning_gym"],
                "params": source.get("params", {}),
                **reference,
            }
        try:
            verdict = chosen.score(response, reference)
        except UserError as error:
            raise UserError(f"line {number}: {error}") from error
        print(json.dumps(verdict._asdict()), file=out)


def tasks_folder() -> Path:
    """config/tasks of the current folder, else of the checkout that this package lies in."""
    return _TASKS if _TASKS.is_dir() else Path(__file__).resolve().parents[3] / _TASKS


def _parse(line: str, number: int) -> tuple[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f'line {number} is not JSON ({error}); give one object per line: {{"response": "...", "reference": ...}}.'
        ) from error
    for key in ("response", "reference"):
        if not isinstance(found, dict) or key not in found:
            raise UserError(f"line {number}: the key {key!r} is missing from {line.strip()[:100]!r}; add it.")
    if not isinstance(found["response"], str):
        raise UserError(f"line {number}: response is {type(found['response']).__name__}, expected text.")
    return found["response"], found["reference"]
