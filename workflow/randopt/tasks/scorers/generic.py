"""Scorers for tasks of one's own: exact, numeric, regex, choice and expression.

All read the answer where `answer.final` finds it. Their reward is `lenient`, 0 or 1. strict means: right, and the
whole response (or the inside of its last <answer> block) is the answer and nothing else.
"""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from randopt.tasks.scorers import arithmetic, countdown, gsm8k
from randopt.tasks.scorers.answer import MAX_ANSWER, MAX_TEXT, final, normal
from randopt.tasks.scorers.number import value_of
from randopt.tasks.scorers.text import MAX_DIGITS, canonical, number
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

NUMERIC_OPTIONS = {
    "tolerance": {
        "type": "number",
        "minimum": 0,
        "expected": "a number, 0 or more: the largest difference that is right",
    },
    "relative": {
        "type": "number",
        "minimum": 0,
        "expected": "a number, 0 or more: the largest difference that is right, as a share of the reference",
    },
}
REGEX_OPTIONS = {
    "pattern": {
        "type": "string",
        "minLength": 1,
        "format": "regex",
        "needed": True,
        "expected": "a regular expression of Python, whose first group (or, without one, whole match) is the answer",
    },
}
CHOICE_OPTIONS = {
    "choices": {
        "type": "array",
        "items": {"type": ["string", "integer"]},
        "minItems": 2,
        "expected": "a list of the labels, as in [A, B, C, D] or ['yes', 'no'] (YAML reads a bare yes as true)",
    },
}
LETTERS = ("A", "B", "C", "D", "E")
REGEX_SECONDS = 1.0  # for one response; a pattern that backtracks for longer finds nothing

_DIGITS = re.compile(r"[0-9]+")
_SCIENTIFIC = re.compile(
    r"([0-9](?:[0-9,]{0,40})(?:\.[0-9]{1,40})?)"
    r"(?:[eE]|\s?(?:×|\\times|\\cdot|\*|x)\s?10\s?(?:\^|\*\*)\s?\{?\(?)([-+\u2212]?[0-9]{1,2})(?![0-9.])\)?\}?"
)


def exact(response: str, reference: Any) -> Verdict:
    """The answer is the reference's text, or one of several.

    reference: text, number, true or false, or a list of them, each of which is right.
    lenient: equal after `answer.normal` (case, white space, Markdown, quotation marks, a full stop do not count), as
    the answer or as the whole response. strict: equal to the letter.
    """
    accepted = _texts("exact", reference)
    spellings = {normal(text) for text in accepted}
    found, tagged = final(response)
    whole = response if len(response) <= MAX_ANSWER else ""
    key = normal(whole) if normal(whole) in spellings else normal(found)
    if not key or len(key) > MAX_ANSWER:
        return NO_ANSWER
    lenient = key in spellings
    strict = lenient and (found if tagged else whole).strip() in accepted
    return Verdict(float(lenient), strict, lenient, key)


def numeric(response: str, reference: Any, tolerance: float = 0.0, relative: float = 0.0) -> Verdict:
    """The answer is a number: commas, decimals, fractions, 1.5e3 and 1.5 × 10^3 are understood.

    reference: a number, as JSON number or text. Right is a difference of at most `tolerance`, or at most `relative`
    times the reference's size; with neither, values are compared exactly.
    lenient: the number in the last <answer> block, else where `gsm8k.extract` finds it.
    """
    expected = value_of("numeric", _plain(str(reference)) if isinstance(reference, float) else reference)
    text = gsm8k.without_latex(_plain(response[-MAX_TEXT:]))
    found, tagged = final(text)
    value = gsm8k.extract(found) if tagged else gsm8k.extract(text)
    if value is None:
        return NO_ANSWER
    allowed = max(Fraction(str(tolerance)), abs(expected) * Fraction(str(relative)))
    lenient = abs(value - expected) <= allowed
    alone = (found if tagged else text[: 4 * MAX_DIGITS]).strip()
    return Verdict(float(lenient), lenient and number(alone) == value, lenient, canonical(value))


def regex(response: str, reference: Any, pattern: str) -> Verdict:
    """The answer is what the task's pattern finds: the first group of its last match, or the whole of it.

    reference: as for `exact`. lenient: equal after `answer.normal`. strict: equal to the letter.
    A text on which the pattern backtracks for more than REGEX_SECONDS has no answer.
    """
    import regex as with_timeout  # like re, but it can be stopped

    accepted = _texts("regex", reference)
    last = None
    try:
        for last in with_timeout.finditer(pattern, response[-MAX_TEXT:], timeout=REGEX_SECONDS):  # noqa: B007
            pass
    except TimeoutError:
        return NO_ANSWER
    found = ((last.group(1) if last.re.groups else last.group()) if last else None) or ""
    key = normal(found)
    if not key or len(key) > MAX_ANSWER:
        return NO_ANSWER
    lenient = key in {normal(text) for text in accepted}
    return Verdict(float(lenient), lenient and found.strip() in accepted, lenient, key)


def choice(response: str, reference: Any, choices: Sequence[str | int] = LETTERS) -> Verdict:
    """The answer is one of the labels: letters, or words such as yes and no.

    reference: a label, in any case; with letters also the option's place, counted from 0.
    lenient: the label that `answer.final` begins with or wholly is; else the only one in brackets or bold there;
    else, unless it is a single letter, the only one named in the response.
    """
    labels = {normal(str(label)): str(label) for label in choices}
    expected = _label(reference, labels)
    found, tagged = final(response)
    key = _chosen(found[:MAX_ANSWER], response[-MAX_TEXT:], labels)
    if key is None:
        return NO_ANSWER
    lenient = key == expected
    alone = (found if tagged else response[: 2 * MAX_ANSWER]).strip()
    return Verdict(float(lenient), lenient and alone == labels[key], lenient, labels[key])


def _label(reference: Any, labels: Mapping[str, str]) -> str:
    usable = isinstance(reference, (str, int)) and not isinstance(reference, bool)
    if usable and normal(str(reference)) in labels:
        return normal(str(reference))
    letters = all(len(label) == 1 and label.isalpha() for label in labels)
    if type(reference) is int and letters and 0 <= reference < len(labels):
        return list(labels)[reference]
    raise bad_reference("choice", reference, f"one of {', '.join(labels.values())} (or give the scorer `choices`)")


def _chosen(found: str, response: str, labels: Mapping[str, str]) -> str | None:
    """The label that is meant; None when none or several are."""
    named = "|".join(sorted(map(re.escape, labels), key=len, reverse=True))
    marks = r"[\s(\[{*_`\"'“‘]{0,9}"
    text = normal(found)
    # "b", "b) because", "(b)", "b: ..." and "option b", but not the article in "a dog"
    begins = re.match(rf"{marks}(?:option|choice|letter)?{marks}({named})(?:[)\]}}.:,*_`\"'”’]|$)", text)
    if begins:  # "a or b" is no answer
        hedged = re.match(rf"\s*(?:or|and|/|,|&)\s*{marks}(?:{named})\s*(?:[)\]}},.*]|$)", text[begins.end() :])
        return None if hedged else begins[1]
    marked = set(re.findall(rf"(?:\(|\[|\*\*)({named})(?:\)|\]|\*\*)", text))
    if not marked:
        words = "|".join(sorted((re.escape(label) for label in labels if len(label) > 1), key=len, reverse=True))
        for place in (text, normal(response)) if words else ():
            marked = set(re.findall(rf"(?<!\w)({words})(?!\w)", place))
            if marked:
                break
    return marked.pop() if len(marked) == 1 else None


def expression(response: str, reference: Any) -> Verdict:
    """The answer is an arithmetic expression with the right value, in + - * / and brackets, exactly.

    reference: the value, as number or text; or {target, numbers}, where each of `numbers` must be used exactly once.
    lenient: in any spelling of the operators, perhaps followed by "= value". strict: in plain + - * / ( ).
    vote key: the exact value. Limits on length, digits and nesting; no powers.
    """
    numbers = None
    if isinstance(reference, Mapping):
        numbers, target = countdown.problem("expression", reference)
    else:
        target = value_of("expression", reference)
    found, tagged = final(response)
    plain = found if tagged else response.strip()
    try:
        value = _expression_value(countdown.respelled(found, target), numbers)
        lenient = value == target
        strict = lenient and _expression_value(plain, numbers) == target
    except arithmetic.TooLarge:
        return NO_ANSWER
    return NO_ANSWER if value is None else Verdict(float(lenient), strict, lenient, canonical(value))


def _expression_value(text: str, numbers: list[int] | None) -> Fraction | None:
    """Without prescribed numbers, those that the text itself has."""
    if numbers is None:
        if any(len(digits) > countdown.MAX_DIGITS for digits in _DIGITS.findall(text[:MAX_ANSWER])):
            raise arithmetic.TooLarge(f"a number of more than {countdown.MAX_DIGITS} digits")
        numbers = sorted(map(int, _DIGITS.findall(text[:MAX_ANSWER])))
    return countdown.value_with(text, numbers)


def _texts(scorer: str, reference: Any) -> set[str]:
    """The accepted answers as texts; UserError for a reference that is none."""
    given = reference if isinstance(reference, list) else [reference]
    if not given or not all(isinstance(one, (str, int, float)) and str(one).strip() for one in given):
        raise bad_reference(scorer, reference, "text, a number, true or false, or a list of them")
    # a column of whole numbers with one empty cell is read as 2.0
    return {f"{one:.0f}" if isinstance(one, float) and one.is_integer() else str(one).strip() for one in given}


def _plain(text: str) -> str:
    """1.5e3 and 1.5 × 10^3 written out, as 1500."""

    def written_out(match: re.Match[str]) -> str:
        exponent = int(match[2].replace("\u2212", "-"))
        return f"{Fraction(match[1].replace(',', '')) * Fraction(10) ** exponent}"

    return _SCIENTIFIC.sub(written_out, text)
