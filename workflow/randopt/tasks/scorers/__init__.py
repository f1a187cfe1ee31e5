"""Scorers: one function each from (response, reference) to a verdict, by name and version.

This module is imported whenever the Snakefile is parsed; nothing here imports more than the standard
library. Raise a scorer's version when any of its verdicts changes: scores are then made again from
the stored completions, without a GPU.
"""

import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from randopt.canonical import short_hash
from randopt.errors import UserError
from randopt.tasks.scorers import (
    code,
    countdown,
    generic,
    gqa,
    gsm8k,
    math,
    number,
    own,
    rocstories,
    sandboxed,
    uspto50k,
)
from randopt.tasks.scorers.verdict import NO_ANSWER, Scorer, Verdict

__all__ = ["NO_ANSWER", "SCORERS", "Scorer", "Verdict", "get", "judges", "resolve"]

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
        Scorer("mbpp", 1, code.score, sandboxed=True, runs_programs=True),
        Scorer("mbpp_paper", 1, code.paper, sandboxed=True, runs_programs=True),
        Scorer("gqa", 1, gqa.score),
        Scorer("gqa_paper", 1, gqa.paper),
        Scorer("reasoning_gym", 1, sandboxed.score, sandboxed=True),
        Scorer("uspto50k", 1, uspto50k.score),
        Scorer("uspto50k_paper", 1, uspto50k.paper),
        Scorer("rocstories", 1, rocstories.score),
        Scorer("rocstories_paper", 1, rocstories.paper),
        Scorer("exact", 1, generic.exact),
        Scorer("numeric", 1, generic.numeric, options=generic.NUMERIC_OPTIONS),
        Scorer("regex", 1, generic.regex, options=generic.REGEX_OPTIONS),
        Scorer("choice", 1, generic.choice, options=generic.CHOICE_OPTIONS),
        Scorer("expression", 1, generic.expression),
    )
}


def get(text: str) -> Scorer:
    """The scorer that a text means: a name, "file.py:function", or JSON with a name and options.

    With options its name ends in their hash, and a scorer of one's own ends in that of its file: another pattern,
    or an edited file, is another scorer, whose scores have a folder of their own.
    Raises UserError for an unknown name, for options that the scorer does not take, or for a file that has no such
    function.
    """
    if own.is_own(text):
        return own.scorer(text)
    options = _parse(text)
    name = options.pop("name")
    if name not in SCORERS:
        raise UserError(
            f"scorer {name!r} is unknown; choose one of {', '.join(SCORERS)}, or give file.py:function, your own."
        )
    scorer = SCORERS[name]
    if scorer.options or options:
        _check_options(scorer.name, scorer.options or {}, options)
    if not options:
        return scorer
    return scorer._replace(name=f"{name}-{short_hash(options, 6)}", score=partial(scorer.score, **options))


def judges(text: str) -> tuple[Scorer, ...]:
    """All whose verdicts are kept where a task names this scorer: the scorer and its paper-compatible twin.

    In this order whichever of the two is named; a scorer without a twin is alone. UserError as in `get`.
    """
    if text not in SCORERS:
        return (get(text),)
    plain = text.removesuffix("_paper")
    return tuple(SCORERS[known] for known in (plain, f"{plain}_paper") if known in SCORERS)


def resolve(task_default: str, name: str | None = None) -> Scorer:
    """The scorer that `name` means for a task whose own scorer is `task_default`.

    None is the task's own; "paper" is its paper-compatible twin; anything else is what `get` understands.
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


def _parse(text: str) -> dict[str, Any]:
    """{"name": ..., option: ...}"""
    if not text.startswith("{"):
        return {"name": text}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(
            f"scorer {text!r} is not JSON ({error}); give a name, or JSON with a name and options."
        ) from error
    if not isinstance(found.get("name"), str):
        raise UserError(f'scorer {text!r} has no name; give it as in {{"name": "regex", "pattern": "([0-9]+)"}}.')
    return found


def _check_options(name: str, known: Mapping[str, Any], options: dict[str, Any]) -> None:
    from randopt.schema import mistakes  # jsonschema is only loaded where there are options

    required = [option for option, rules in known.items() if rules.get("needed")]
    schema = {"properties": known, "additionalProperties": False, "required": required}
    found = mistakes(options, {"type": "object", **schema}, f"scorer {name}")
    if found:
        raise UserError(f"scorer {name}: {'; '.join(map(str, found))}")
