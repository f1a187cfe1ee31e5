r"""Answers of competition mathematics: numbers, expressions, sets, intervals, words; in LaTeX or plain."""

import re
from collections.abc import Sequence
from typing import Any

from randopt.tasks.scorers import math_form as forms
from randopt.tasks.scorers import text as find
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference
from randopt.tasks.scorers.worker import Pool

SECONDS = 2.0  # of CPU time to read one answer; the usual ones take 5 to 50 ms
WALL_SECONDS = 7.0  # the same on a busy machine
_EXPECTED = r'an answer as text such as "\frac{1}{2}", or a number'
_BEFORE = 20_000  # characters that are examined: an answer stands near the end
_POOL = Pool(
    "math_worker.py",
    "math",
    "Install math-verify into this environment (pip install -r envs/cpu.txt), and see that 2 GB of memory are free.",
)


def score(response: str, reference: Any) -> Verdict:
    r"""Verdict on a response that was asked to end in "#### answer", or to give its answer in \boxed{}.

    reference: the answer, as text in LaTeX or plain, or a number. The reward is `lenient`, 0 or 1.
    lenient: the answer by the first rule that finds one (the later of "#### answer" and \boxed{}, after
    the last "answer is", the last formula, the last number) is mathematically the reference's, exactly
    (0.333 is not 1/3). Units, currency and the name in "x = 5" do not count; lists without round or
    square brackets are sets; brackets of intervals and the order in tuples count.
    strict: so, and it is all of the last line after "####", or in the last \boxed{}.
    vote key: the canonical spelling of the answer (`math_form.key`). The verdict depends on it alone.
    """
    return batch([(response, reference)])[0]


def batch(pairs: Sequence[tuple[str, Any]]) -> list[Verdict]:
    """The verdicts of `score` on (response, reference), read by one process per core."""
    answers = [_answer(response) for response, _ in pairs]
    found = _keys([answer for answer, _ in answers], hopeless=None)
    references = [_reference(reference) for _, reference in pairs]
    distinct = list(dict.fromkeys(references))
    expected = dict(zip(distinct, _keys(distinct, hopeless="as text"), strict=True))
    for reference, key in expected.items():
        if key is None:
            raise bad_reference("math", reference, _EXPECTED)
    verdicts = []
    for key, (_, asked), reference in zip(found, answers, references, strict=True):
        if key is None:
            verdicts.append(NO_ANSWER)
            continue
        right = forms.same(key, str(expected[reference]))
        verdicts.append(Verdict(float(right), right and asked, right, key))
    return verdicts


def _reference(reference: Any) -> str:
    usable = isinstance(reference, (str, int, float)) and not isinstance(reference, bool)
    if not usable or not str(reference).strip() or len(str(reference)) > forms.MAX_KEPT:
        raise bad_reference("math", reference, _EXPECTED)
    return str(reference)


# Reading leaves: which were read before is remembered, as the same answers come again and again.

_read: dict[tuple[str, ...], list[str | None] | None] = {}  # None: not in time
_MAX_READ = 100_000


def _keys(answers: Sequence[str | None], hopeless: str | None) -> list[str | None]:
    """The key of each answer, None where there is none.

    hopeless: what to do with an answer that cannot be read in time: None gives no key, "as text" its text.
    """
    understood = [forms.form(answer) if answer else None for answer in answers]
    wanted = [tuple(forms.leaves(form)) if form else () for form in understood]
    new = [leaves for leaves in dict.fromkeys(wanted) if leaves and leaves not in _read]
    if len(_read) + len(new) > _MAX_READ:
        _read.clear()
        new = [leaves for leaves in dict.fromkeys(wanted) if leaves]
    replies = _POOL.ask_all([{"latex": leaves} for leaves in new], SECONDS, WALL_SECONDS)
    _read.update((leaves, reply["keys"] if reply else None) for leaves, reply in zip(new, replies, strict=True))
    keys: list[str | None] = []
    for form, leaves in zip(understood, wanted, strict=True):
        read = _read[leaves] if leaves else []
        if form is None or (read is None and hopeless is None):
            keys.append(None)
            continue
        known = {
            latex: key or forms.squeezed(latex) for latex, key in zip(leaves, read or [None] * len(leaves), strict=True)
        }
        keys.append(forms.key(form, known.__getitem__) or None)
    return keys


# Finding the answer in a response.

_STATED = re.compile(r"answers?\s{0,3}(?:is|are|:|=)[\s:*]{0,5}", re.IGNORECASE)
_SENTENCE_END = re.compile(r"\n|\.(?=\s|$)|,?\s(?:because|since|as|where|which|when)\s")
_FORMULA = re.compile(r"\$\$?([^$]{1,500})\$|\\\(((?:(?!\\\)).){1,500})\\\)|\\\[((?:(?!\\\]).){1,500})\\\]", re.DOTALL)
_SEVERAL = re.compile(  # what may stand between two boxes that are one answer: "$ or $x = "
    r"[\s$\\()]{0,8}(?:[,;]|,?\s{0,3}(?:\\text\s?\{)?\s{0,2}(?:and|or)\s{0,2}\}?)"
    r"[\s$\\()]{0,8}(?:[A-Za-z]\s?(?:_\w)?\s?=)?[\s$\\()]{0,4}"
)


def _answer(response: str) -> tuple[str | None, bool]:
    """The answer and whether it stands where it was asked for; None when there is none."""
    tail = response[-_BEFORE:].rstrip()
    hashes = tail.rfind("####")
    boxes = _last_boxes(tail)
    if hashes >= 0 and (boxes is None or hashes > boxes[0]):
        rest = tail[hashes + 4 :].strip()
        line = rest.partition("\n")[0].strip()
        if line:
            return line, line == rest
    if boxes is not None:
        return boxes[1], True
    stated = None
    for match in _STATED.finditer(tail):
        stated = match.end()
    if stated is not None:
        said = tail[stated : stated + forms.MAX_KEPT]
        formulas = _FORMULA.match(said)
        answer = _SENTENCE_END.split(said, maxsplit=1)[0].strip() if not formulas else _formulas(said)
        if answer:
            return answer, False
    formula = None
    for match in _FORMULA.finditer(tail[-find.TAIL :]):
        formula = match
    if formula is not None:
        return next(filter(None, formula.groups())), False
    value = find.last_number(tail)
    return (None if value is None else str(value)), False


def _formulas(said: str) -> str:
    """The first formula of a sentence, and those that follow it with only "and", "or" or a comma between."""
    parts: list[str] = []
    position = 0
    for match in _FORMULA.finditer(said):
        between = said[position : match.start()]
        if parts and not re.fullmatch(r"\s*(?:,|and|or|, and|, or)\s*", between):
            break
        parts.append(next(filter(None, match.groups())))
        position = match.end()
    return ", ".join(parts)


def _last_boxes(text: str) -> tuple[int, str] | None:
    r"""Where the last \boxed{...} starts, and its inside; with those before it that are listed with it."""
    found: list[str] = []
    last = end = position = len(text)
    for _ in range(forms.MAX_PARTS):
        position = text.rfind(r"\boxed{", 0, position)
        if position < 0:
            break
        inside = find.last_boxed(text[position:end])
        if inside is None or not inside.strip():
            if found:
                break
            end = position  # not closed, or empty: the one before counts
            continue
        after = text[position + len(r"\boxed{") + len(inside) + 1 : end]
        if found and (not _SEVERAL.fullmatch(after) or inside in found):
            break
        if not found:
            last = position
        found.append(inside)
        end = position
    if not found:
        return None
    return last, ", ".join(reversed(found)) if len(found) > 1 else found[0]


# The verdicts of the published experiments; kept with their faults, so that numbers compare.

_LADDER = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"answer\s*(?:is|:|=)\s*:?\s*\$?([^\n.$]+)",
        r"(?:therefore|thus|hence|so)[,:\s]*\$?([^\n.$]+)",
    )
]


def paper(response: str, reference: Any) -> Verdict:
    r"""The verdict of the published experiments; kept with its faults, so that numbers compare.

    The last 500 characters count: the last balanced \boxed{}, else the shortest inside of an unbalanced
    one, else what follows the last "answer is", else the last "so", also inside a word, up to a full stop.
    Equal are equal texts, what float() reads as equal, and texts with the same numbers in the same order:
    2\pi equals 2, [0,1) equals (0,1), -\frac{1}{2} equals \frac{1}{2}; \frac12 does not.
    strict and lenient: the reward.
    """
    if not isinstance(reference, str):
        raise bad_reference("math_paper", reference, r'text such as "\frac{1}{2}"')
    answer = _paper_answer(response[-500:])
    right = bool(answer) and _paper_equal(answer, reference)
    return Verdict(float(right), right, right, answer.encode("utf-8", "replace").decode() or None)


def _paper_answer(tail: str) -> str:
    start = len(tail)
    while (start := tail.rfind(r"\boxed{", 0, start)) >= 0:
        boxed = find.last_boxed(tail[start:])
        if boxed is not None:
            return boxed.strip()
    shortest = re.findall(r"\\boxed\{([^}]+)\}", tail)
    if shortest:
        return shortest[-1].strip()
    for pattern in _LADDER:
        found = pattern.findall(tail)
        if found:
            return found[-1].strip()
    return ""


def _paper_normalised(text: str) -> str:
    for written, plain in ((r"\left", ""), (r"\right", ""), (r"\dfrac", r"\frac"), (r"\tfrac", r"\frac"), ("$", "")):
        text = text.replace(written, plain)
    return "".join(text.split()).rstrip(".")


def _paper_equal(answer: str, reference: str) -> bool:
    found, expected = _paper_normalised(answer), _paper_normalised(reference)
    if found == expected:
        return True
    try:
        return abs(float(found.replace(",", "")) - float(expected.replace(",", ""))) < 1e-6
    except ValueError:
        pass
    numbers = [[float(digits) for digits in re.findall(r"-?[0-9]+(?:\.[0-9]+)?", text)] for text in (found, expected)]
    return (
        bool(numbers[0])
        and len(numbers[0]) == len(numbers[1])
        and all(abs(left - right) < 1e-6 for left, right in zip(*numbers, strict=True))
    )
