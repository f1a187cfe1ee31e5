"""Countdown: reach the target with + - * /, each given number exactly once."""

from fractions import Fraction
from typing import Any

from randopt.tasks.scorers import arithmetic
from randopt.tasks.scorers.text import last_block, number
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

_FORMAT_WEIGHT = 0.1
_MAX_ANSWER = 2000  # characters of an answer that are parsed
MAX_DIGITS = 20
_SPELLINGS = {
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "∕": "/", "−": "-", "–": "-",
    r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": "", "[": "(", "]": ")", "$": "",
}  # fmt: skip


def score(response: str, reference: Any) -> Verdict:
    """Verdict on a response that was asked for <think>...</think> and <answer>...</answer>.

    reference: {numbers: list of int, target: text or int}. reward = lenient + 0.1·format, format as
    in the paper (`paper_format`).
    lenient: the last answer block, in any spelling of the operators, perhaps followed by "= target",
    uses exactly the given numbers and is exactly the target.
    strict: so, in plain + - * / ( ), and the response is one think block and one answer block.
    vote key: the exact value, when the numbers are the given ones.
    An answer beyond the limits (length, digits, nesting, any power) gets no reward at all.
    """
    numbers, target = problem("countdown", reference)
    form = _FORMAT_WEIGHT * paper_format(response)
    answer = last_block(response, "<answer>", "</answer>")
    try:
        value = value_with(respelled(answer, target), numbers) if answer is not None else None
        if answer is None or value is None:
            return Verdict(form, False, False, None)
        lenient = value == target
        strict = lenient and value_with(answer.strip(), numbers) == target and _one_of_each(response)
    except arithmetic.TooLarge:
        return NO_ANSWER
    return Verdict(lenient + form, strict, lenient, str(value))


def problem(scorer: str, reference: Any) -> tuple[list[int], Fraction]:
    """The sorted numbers and the target, or UserError."""
    try:
        numbers, target = reference["numbers"], number(str(reference["target"]).strip())
    except (TypeError, KeyError):
        numbers, target = None, None
    if target is None or not isinstance(numbers, list) or not all(type(given) is int for given in numbers):
        raise bad_reference(scorer, reference, '{"numbers": [44, 19, 35], "target": "98"}')
    return sorted(numbers), target


def respelled(answer: str, target: Fraction) -> str:
    """The answer with ASCII operators, without blanks at line ends and without a true "= target"."""
    answer = answer[: _MAX_ANSWER + 1]
    for written, plain in _SPELLINGS.items():
        answer = answer.replace(written, plain)
    answer = " ".join(answer.split())
    left, equals, right = answer.rpartition("=")
    return left if equals and number(right.strip()) == target else answer


def value_with(expression: str, numbers: list[int]) -> Fraction | None:
    """The exact value if it is an expression of exactly these numbers, else None; or TooLarge."""
    if len(expression) > _MAX_ANSWER:
        raise arithmetic.TooLarge(f"more than {_MAX_ANSWER} characters")
    if not arithmetic.uses_exactly(expression, numbers, MAX_DIGITS):
        return None
    try:
        return arithmetic.exact(arithmetic.postfix(expression))
    except arithmetic.NotArithmetic:
        return None


def _one_of_each(response: str) -> bool:
    """One think block (its opening tag may be in the prompt), blanks, one answer block, nothing else."""
    text = response.strip().removeprefix("<think>")
    thought, closing, rest = text.partition("</think>")
    rest = rest.strip()
    body = rest.removeprefix("<answer>").removesuffix("</answer>")
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    return (
        bool(closing)
        and len(rest) == len(body) + len("<answer></answer>")
        and not any(tag in part for tag in tags for part in (thought, body))
    )


def paper_format(response: str) -> float:
    """The paper's format reward, 0 to 1, for "<think>" + response.

    1 when a think block, one newline and an answer block make up the whole; else 0.1 for a think
    block plus 0.5 for an answer block. Searched with str.find: the usual lazy regular expression
    takes quadratic time on repeated tags.
    """
    end = response.removesuffix("\n")
    inner = response.find("</think>\n<answer>")
    if inner >= 0 and end.endswith("</answer>") and inner + 17 <= len(end) - len("</answer>"):
        return 1.0
    opening = response.find("<answer>")
    has_answer = opening >= 0 and response.find("</answer>", opening) >= 0
    return 0.1 * ("</think>" in response) + 0.5 * has_answer


def paper(response: str, reference: Any) -> Verdict:
    """The verdict of the published experiments; kept with its faults, so that numbers compare.

    There the last answer is evaluated by Python itself: // and ** count, floats are within 1e-5,
    and hostile answers hang or crash it; those (`arithmetic.TooLarge`) get no reward at all here.
    strict: the answer part of the reward, judged on the unstripped answer, where a newline in front
    is a fault; lenient: the vote, judged on the stripped one.
    """
    numbers, exact_target = problem("countdown_paper", reference)
    target = float(exact_target)
    form = _FORMAT_WEIGHT * paper_format(response)
    answer = _last_paper_answer(response)
    try:
        # A newline at the very end passes: in a regular expression, $ matches before it.
        rewarded = _python_value(answer.removesuffix("\n"), numbers)
        voted = _python_value(answer.strip(), numbers) if max(numbers, default=0) <= 1000 else None
        right = rewarded is not None and abs(rewarded - target) < 1e-5
        key = None if voted is None else _python_spelling(voted)
        vote_right = voted is not None and abs(voted - target) < 1e-5
    except (arithmetic.TooLarge, OverflowError):
        return NO_ANSWER
    return Verdict(right + form, right, vote_right, key)


def _last_paper_answer(response: str) -> str:
    """The last non-overlapping <answer>...</answer>, scanned from the front; "" when there is none."""
    answer, start = "", response.find("<answer>")
    while start >= 0:
        end = response.find("</answer>", start)
        if end < 0:
            break
        answer = response[start + len("<answer>") : end]
        start = response.find("<answer>", end)
    return answer


def _python_value(expression: str, numbers: list[int]) -> int | float | None:
    """Python's value of the expression, None when it is none or has other numbers."""
    if not expression or set(expression) - set("0123456789+-*/() "):
        return None
    if not arithmetic.uses_exactly(expression, numbers, max_digits=4300):  # int() refuses longer ones
        return None
    try:
        value = arithmetic.as_python(
            arithmetic.postfix(expression, arithmetic.PYTHON, max_tokens=1000, max_nesting=199)
        )
        float(value)
    except (arithmetic.NotArithmetic, OverflowError):
        return None
    return value


def _python_spelling(value: int | float) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
