"""Word problems whose answer is a number after "####"."""

import re
from fractions import Fraction
from typing import Any

from randopt.tasks.scorers import text as find
from randopt.tasks.scorers.number import value_of
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

_STATED = re.compile(r"answer\s{0,3}(?:is|:|=)", re.IGNORECASE)
_FINAL_LINE = re.compile(r"####[ \t]{0,3}([-\u2212]?)(\$?)([0-9][0-9,./]*)")
_FRAC = re.compile(r"\\[dt]?frac\{([0-9]{1,50})\}\{([0-9]{1,50})\}")
_BEFORE = 20_000  # characters that are examined: an answer stands near the end


def score(response: str, reference: Any) -> Verdict:
    """Verdict on a response that was asked to end in "#### number".

    reference: the number as text, commas allowed. The reward is `lenient`, 0 or 1. Numbers are
    compared by exact rational value: 42.00 = 42, 3/4 = 0.75.
    strict: the last line is "#### number" (a $ and thousands commas allowed) with the right number.
    lenient: the answer by the first rule that finds one: after the last "####", in the last
    \\boxed{}, after the last "answer is", the last number.
    """
    expected = value_of("gsm8k", reference)
    plain = without_latex(response[-_BEFORE:])
    found = extract(plain)
    if found is None:
        return NO_ANSWER
    lenient = found == expected
    return Verdict(float(lenient), _final_line(response) == expected, lenient, find.canonical(found))


def without_latex(text: str) -> str:
    r"""$1{,}234$, \$5 and \frac{3}{4} in plain spelling."""
    for written, plain in ((r"\$", "$"), ("{,}", ","), (r"\!", ""), (r"\,", "")):
        text = text.replace(written, plain)
    return _FRAC.sub(r"\1/\2", text)


def extract(text: str) -> Fraction | None:
    """The number that a text ends in, without LaTeX: see the rules of `score`."""
    hashes = text.rfind("####")
    if hashes >= 0:
        found = _of_line(text[hashes + 4 :])
        if found is not None:
            return found
    boxed = find.last_boxed(text)
    if boxed is not None:
        found = _of_line(boxed)
        if found is not None:
            return found
    stated = [match.end() for match in _STATED.finditer(text)]
    if stated:
        found = _of_line(text[stated[-1] : stated[-1] + 200])
        if found is not None:
            return found
    return find.last_number(text)


def _of_line(text: str) -> Fraction | None:
    """The number that the first line with any text states: after its last "=", else its first one."""
    line = text.lstrip()[: find.TAIL].partition("\n")[0]
    return find.first_number(line.rpartition("=")[2])


def _final_line(response: str) -> Fraction | None:
    line = response[-_BEFORE:].rstrip().rpartition("\n")[2]
    match = _FINAL_LINE.fullmatch(line)
    return find.number(match[1] + match[3]) if match else None


def paper(response: str, reference: Any) -> Verdict:
    """The verdict of the published experiments; kept with its faults, so that numbers compare.

    The last 300 characters count: the last "#### number" without commas, else the last run of
    digits, commas and full stops. Spellings are compared, not values: 42.00 is not 42, and a
    sentence that ends in a comma votes for ",".
    strict: the reward; lenient: the vote, where commas do not matter.
    """
    if not isinstance(reference, str):
        raise bad_reference("gsm8k_paper", reference, 'text such as "42"')
    tail = response[-300:]
    marked = re.findall(r"#### (-?[0-9.,]+)", tail)
    if marked:
        answer = marked[-1].replace(",", "")
    else:
        runs = re.findall(r"-?[0-9.,]+", tail)
        telling = [run for run in runs if run != "."]
        answer = (telling or runs or [""])[-1]
    right = answer == reference
    voted = bool(answer) and answer.replace(",", "") == reference.replace(",", "")
    return Verdict(float(right), right, voted, answer or None)
