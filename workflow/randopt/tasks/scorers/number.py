"""Tasks whose answer is one number and nothing else, such as times_table."""

from fractions import Fraction
from typing import Any

from randopt.tasks.scorers.text import MAX_DIGITS, canonical, last_number, number
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference


def score(response: str, reference: Any) -> Verdict:
    """Verdict on a response to a task that says: answer with only the number.

    reference: the number, as JSON number or text. The reward is `lenient`, 0 or 1.
    lenient: the last number in the text has the reference's exact value.
    strict: the stripped response is the number and nothing else: no full stop, no leading zero, no unit.
    """
    expected = value_of("number", reference)
    found = last_number(response)
    if found is None:
        return NO_ANSWER
    lenient = found == expected
    strict = response[: 4 * MAX_DIGITS].strip() in (canonical(expected), str(reference).strip())
    return Verdict(float(lenient), lenient and strict, lenient, canonical(found))


def value_of(scorer: str, reference: Any) -> Fraction:
    """The exact value of a reference that is a number or a text that is one; else UserError."""
    usable = isinstance(reference, (int, float, str)) and not isinstance(reference, bool)
    value = number(str(reference).strip()) if usable else None
    if value is None:
        raise bad_reference(scorer, reference, "a number such as 42, 1,234 or 3/4")
    return value
