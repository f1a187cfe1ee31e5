"""What a scorer returns, and the reference it could not use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from randopt.errors import UserError


class Verdict(NamedTuple):
    """The judgement of one response."""

    reward: float  # what selection maximises
    strict: bool  # correct in exactly the format that was asked for
    lenient: bool  # correct in any format that leaves no doubt about the answer
    vote_key: str | None  # the normalised answer that is counted; None abstains


class Scorer(NamedTuple):
    """A named, versioned judge of responses; raise `version` whenever any verdict changes.

    With a task's options it is another scorer: `scorers.get` puts their hash into the name.
    """

    name: str
    version: int
    score: Callable[..., Verdict]  # (response, reference); UserError when the reference is unusable
    batch: Callable[[Sequence[tuple[str, Any]]], list[Verdict]] | None = None  # same verdicts, many at once
    sandboxed: bool = False  # runs other people's code in processes of its own
    runs_programs: bool = False  # of models, in randopt.sandbox; score.py has several at a time
    max_reward: float = 1.0  # no verdict's reward is above it
    options: Mapping[str, Any] | None = None  # a JSON schema for each keyword that `score` takes from a task


NO_ANSWER = Verdict(0.0, False, False, None)


def bad_reference(scorer: str, given: object, expected: str) -> UserError:
    """The error for a reference that this scorer cannot compare with."""
    return UserError(
        f"scorer {scorer!r}: the reference {str(given)[:200]!r} was given, expected {expected}. "
        "Use the scorer that belongs to the task, or mend the reference in the task's source."
    )
