"""Scorers: one function each from (response, reference) to a verdict, by name and version.

This module is imported whenever the Snakefile is parsed; nothing here imports more than the standard
library. Raise a scorer's version when any of its verdicts changes: scores are then made again from
the stored completions, without a GPU.
"""

from randopt.errors import UserError
from randopt.tasks.scorers import countdown, gsm8k, math, number, sandboxed
from randopt.tasks.scorers.verdict import NO_ANSWER, Scorer, Verdict

__all__ = ["NO_ANSWER", "SCORERS", "Scorer", "Verdict", "get", "resolve"]

SCORERS = {
    scorer.name: scorer
    for scorer in (
        Scorer("number", 1, number.score),
        Scorer("countdown", 1, countdown.score, max_reward=1.1),
        Scorer("countdown_paper", 1, countdown.paper, max_reward=1.1),
        Scorer("gsm8k", 1, gsm8k.score),
        Scorer("gsm8k_paper", 1, gsm8k.paper),
        Scorer("math", 1, math.score, math.batch, sandboxed=True),
        Scorer("math_paper", 1, math.paper),
        Scorer("reasoning_gym", 1, sandboxed.score, sandboxed=True),
    )
}


def get(name: str) -> Scorer:
    """The scorer of that name; UserError that lists the names otherwise."""
    if name not in SCORERS:
        raise UserError(f"scorer {name!r} is unknown; choose one of {', '.join(SCORERS)}.")
    return SCORERS[name]


def resolve(task_default: str, name: str | None = None) -> Scorer:
    """The scorer that `name` means for a task whose own scorer is `task_default`.

    None is the task's own; "paper" is its paper-compatible twin; anything else is a scorer's name.
    """
    if name != "paper":
        return get(task_default if name is None else name)
    twin = f"{task_default.removesuffix('_paper')}_paper"
    if twin not in SCORERS:
        with_twin = ", ".join(known.removesuffix("_paper") for known in SCORERS if known.endswith("_paper"))
        raise UserError(
            f"scorer 'paper' does not exist for the scorer {task_default!r}, only for {with_twin}; "
            f"leave the scorer out to use {task_default!r}."
        )
    return SCORERS[twin]
