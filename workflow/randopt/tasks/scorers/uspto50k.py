"""USPTO-50k: which of ten classes a reaction belongs to."""

import re
from typing import Any

from randopt.tasks.scorers.answer import MAX_TEXT
from randopt.tasks.scorers.text import last_block
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

CLASSES = tuple(map(str, range(1, 11)))

_INTEGER = re.compile(r"(?<![\w.,/-])0?([1-9]|10)(?![\w/]|[.,][0-9]|-[A-Za-z])")  # no part of 12, 3.5, C10 or 3-methyl
_CLASS = re.compile(r"\bclass\W{0,5}(?:is\W{0,5})?0?([1-9]|10)(?![\w/]|[.,][0-9])", re.IGNORECASE)


def score(response: str, reference: Any) -> Verdict:
    """Verdict on a response that was asked for a number from 1 to 10 in <answer> tags.

    reference: the class, as number or text. The reward is `lenient`, 0 or 1; a number outside of 1 to 10 is no answer.
    strict: the last answer block holds the class and nothing else.
    lenient: the class that the last answer block names (no block: the text), the last "class N" before the last
    number.
    """
    expected = _class("uspto50k", reference)
    text = response[-MAX_TEXT:]
    tagged = last_block(text, "<answer>", "</answer>")
    place = text if tagged is None else tagged[:MAX_TEXT]
    found = _CLASS.findall(place) or _INTEGER.findall(place)
    if not found:
        return NO_ANSWER
    lenient = found[-1] == expected
    strict = lenient and tagged is not None and tagged.strip() == expected
    return Verdict(float(lenient), strict, lenient, found[-1])


def paper(response: str, reference: Any) -> Verdict:
    """The verdict of the published experiments; kept with its faults, so that numbers compare.

    The last answer tag that holds digits alone, whatever their value, else the last number from 1 to 10 in the text:
    of "3.5 g" that is 5. strict and lenient are both the reward.
    """
    expected = _class("uspto50k_paper", reference)
    tagged = re.findall(r"<answer>\s{0,99}([0-9]{1,99})\s{0,99}</answer>", response, re.IGNORECASE)
    found = tagged or re.findall(r"\b(10|[1-9])\b", response)
    if not found:
        return NO_ANSWER
    right = found[-1] == expected
    return Verdict(float(right), right, right, found[-1])


def _class(scorer: str, reference: Any) -> str:
    usable = isinstance(reference, (int, str)) and not isinstance(reference, bool)
    if not usable or str(reference).strip() not in CLASSES:
        raise bad_reference(scorer, reference, "a class from 1 to 10")
    return str(reference).strip()
