"""ROCStories: five shuffled sentences, A to E, are put into the order of the story."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from randopt.tasks.scorers.answer import MAX_TEXT
from randopt.tasks.scorers.text import last_block
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

LETTERS = "ABCDE"

_BETWEEN = r"[\s,;>\-\u2013\u2014\u2192.()*0-9]{1,9}(?:(?i:then|and)\s{1,9})?"
_ORDER = re.compile(rf"(?<!\w)[A-E](?:{_BETWEEN}[A-E]){{4}}(?!\w)|(?<!\w)[A-E]{{5}}(?!\w)")
_STRICT = re.compile(r"[A-E](?: ?, ?[A-E]){4}")
_PAPER_ORDER = re.compile(r"\b" + r"[\s,]{1,99}".join(["([A-E])"] * 5) + r"\b")


def score(response: str, reference: Any) -> Verdict:
    """Verdict on a response that was asked for the order of the letters A to E, as in B,A,C,E,D.

    reference: the order as list of places in the shuffled list, [1, 0, 2, 4, 3], or {"gold_order": ...} with it.
    reward: 0.6 × the share of letters in their right place + 0.4 × the share of the story's neighbours whose order is
    kept: a search needs the slope. lenient: exactly the right order, whatever the reward; the order is the last one
    that names each letter once, in the last <answer> block if there is one.
    strict: so, and the response or that block is five letters with commas and nothing else. vote key: as in BACED.
    """
    gold = _gold("rocstories", reference)
    text = response[-MAX_TEXT:]
    tagged = last_block(text, "<answer>", "</answer>")
    place = text if tagged is None else tagged
    found = _orders(place) or _orders(place.upper())  # an "a" between capital letters is a word
    if not found:
        return NO_ANSWER
    lenient = found[-1] == gold
    return Verdict(
        partial_credit(found[-1], gold), lenient and bool(_STRICT.fullmatch(place.strip())), lenient, found[-1]
    )


def paper(response: str, reference: Any) -> Verdict:
    """The verdict of the published experiments; kept with its faults, so that numbers compare.

    The first five letters that stand in a row, in any case, else the first five letters A to E anywhere, those inside
    of words included; no answer unless they are five different ones.
    strict: a reward of 1; lenient: any order at all, since the vote takes partial credit for right.
    """
    gold = _gold("rocstories_paper", reference)
    upper = response.upper()
    row = _PAPER_ORDER.search(upper)
    order = "".join(row.groups()) if row else "".join(re.findall("[A-E]", upper)[:5])
    if len(set(order)) != 5:
        return NO_ANSWER
    reward = partial_credit(order, gold)
    return Verdict(reward, order == gold, True, order)


def partial_credit(order: str, gold: str) -> float:
    """0.6 × letters in their place / 5 + 0.4 × neighbours in `gold` that come in the same order / 4."""
    places = sum(given == right for given, right in zip(order, gold, strict=True))
    kept = sum(order.index(before) < order.index(after) for before, after in pairwise(gold))
    return 0.6 * places / 5 + 0.4 * kept / 4


def _orders(text: str) -> list[str]:
    """Every run of five different letters, as in BACED."""
    runs = (re.sub(r"(?i:then|and)|[^A-E]", "", match.group()) for match in _ORDER.finditer(text))
    return [run for run in runs if len(set(run)) == 5]


def _gold(scorer: str, reference: Any) -> str:
    order = reference.get("gold_order") if isinstance(reference, dict) else reference
    if not isinstance(order, Sequence) or isinstance(order, str) or sorted(map(str, order)) != list("01234"):
        raise bad_reference(scorer, reference, "the order as a list of the numbers 0 to 4, such as [1, 2, 4, 3, 0]")
    return "".join(LETTERS[int(place)] for place in order)
