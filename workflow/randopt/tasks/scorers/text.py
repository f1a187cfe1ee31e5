"""Finding answers in text: tags, numbers, boxes. Every function is linear in the length of the text.

Only ASCII digits are digits here: int() also takes Arabic-Indic and many others, str.isdigit() even
superscripts, and the two disagree.
"""

import re
from fractions import Fraction

MAX_DIGITS = 100  # of a number that may be an answer; longer ones are a stuck model, not an answer
TAIL = 4096  # characters that are searched for the last number

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
NUMBER = re.compile(rf"(?:{_PLAIN})(?:/(?:{_PLAIN}))?")
MINUS = "-\u2212"


def last_block(text: str, opening: str, closing: str) -> str | None:
    """The inside of the last `opening ... closing`, with the opening tag nearest to the last closing one."""
    end = text.rfind(closing)
    start = text.rfind(opening, 0, end) if end >= 0 else -1
    return text[start + len(opening) : end] if start >= 0 else None


def number(text: str) -> Fraction | None:
    """The exact value of a text that is one number: sign, thousands commas, decimals, fraction; else None."""
    sign = -1 if text[:1] in MINUS and text else 1
    body = text[1:] if sign < 0 else text
    if len(body) > 2 * MAX_DIGITS or not NUMBER.fullmatch(body):
        return None
    numerator, _, denominator = body.replace(",", "").partition("/")
    if max(len(numerator), len(denominator)) > MAX_DIGITS:
        return None
    value = Fraction(numerator)
    if denominator:
        if not Fraction(denominator):
            return None
        value /= Fraction(denominator)
    return sign * value


def signed(text: str, match: re.Match[str]) -> str:
    """The matched number with its sign. The minus of a range or a difference, 10-3 or 10 -3, is no sign."""
    start = match.start()
    if start and text[start - 1] == "$":
        start -= 1
    if not start or text[start - 1] not in MINUS:
        return match.group()
    if start > 1 and text[start - 2].isalnum():
        return match.group()
    before = text[max(0, start - 20) : start - 1].rstrip(" \t")
    if before and (before[-1] in "0123456789)]}%" or before[-1] in MINUS):
        return match.group()
    return "-" + match.group()


def first_number(text: str) -> Fraction | None:
    """The first number in the text, None when there is none or it is longer than MAX_DIGITS."""
    match = NUMBER.search(text)
    return number(signed(text, match)) if match else None


def last_number(text: str) -> Fraction | None:
    """The last number within the last TAIL characters, None when there is none or it is too long."""
    tail = text[-TAIL:]
    if len(text) > TAIL:
        tail = tail.lstrip("0123456789.,/")  # the cut may have gone through a number
    found = list(NUMBER.finditer(tail))
    return number(signed(tail, found[-1])) if found else None


def last_boxed(text: str) -> str | None:
    r"""The inside of the last \boxed{...} with balanced braces, at most TAIL characters of it."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    start += len(r"\boxed{")
    depth = 1
    for position, letter in enumerate(text[start : start + TAIL], start):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if not depth:
            return text[start:position]
    return None


def canonical(value: Fraction) -> str:
    """The one spelling of a value: 007, 7.0 and 14/2 are "7"; 0.75 and 3/4 are "3/4"."""
    return str(value)
