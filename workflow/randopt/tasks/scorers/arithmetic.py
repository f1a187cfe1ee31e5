"""Arithmetic that a model wrote, evaluated without eval().

An expression becomes postfix by Dijkstra's shunting yard: one loop and one stack, so no nesting can
exhaust Python's own stack, and every limit is a length that is checked.
"""

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

EXACT = frozenset("+-*/")  # and unary minus
PYTHON = EXACT | {"//", "**"}  # and unary plus: what Python's own evaluation accepts of these characters

_TOKEN = re.compile(r"[0-9]+|\*\*|//|[-+*/()]")
_BINARY = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "**": 4}  # precedence
_UNARY = 3  # between * and **, as in Python and in mathematics: -2**2 = -4


class NotArithmetic(ValueError):
    """The text is no expression, or has no value (division by zero)."""


class TooLarge(ValueError):
    """A limit on tokens, nesting, digits or powers is exceeded: hostile, or a model that is stuck."""


def uses_exactly(text: str, numbers: Sequence[int], max_digits: int) -> bool:
    """Whether the text holds the sorted `numbers` and no others; TooLarge beyond `max_digits` each."""
    found = re.findall(r"[0-9]+", text)
    if any(len(digits) > max_digits for digits in found):
        raise TooLarge(f"a number of more than {max_digits} digits")
    return len(found) == len(numbers) and sorted(map(int, found)) == list(numbers)


def postfix(text: str, operators: Iterable[str] = EXACT, max_tokens: int = 200, max_nesting: int = 50) -> list[str]:
    """The expression in postfix order, tokens as text, unary operators as "neg" and "pos".

    `max_nesting` limits brackets; signs in a row are limited by `max_tokens`.
    Raises NotArithmetic for anything that is no expression, TooLarge beyond the limits.
    """
    if len(text) > 100 * max_tokens:
        raise TooLarge(f"more than {100 * max_tokens} characters")
    tokens = _TOKEN.findall(text)
    if len("".join(tokens)) != len(text) - text.count(" "):
        raise NotArithmetic("a character that does not belong into an expression")
    if len(tokens) > max_tokens:
        raise TooLarge(f"more than {max_tokens} tokens")
    output: list[str] = []
    stack: list[str] = []
    nesting = 0
    wants_operand = True
    for token in tokens:
        if wants_operand:
            if token[0] in "0123456789":
                output.append(token)
                wants_operand = False
            elif token == "(":
                nesting += 1
                if nesting > max_nesting:
                    raise TooLarge(f"brackets nested more than {max_nesting} deep")
                stack.append(token)
            elif token == "-" or (token == "+" and "**" in operators):
                stack.append("neg" if token == "-" else "pos")
            else:
                raise NotArithmetic(f"{token} where a number was expected")
        elif token == ")":
            while stack and stack[-1] != "(":
                output.append(stack.pop())
            if not stack:
                raise NotArithmetic("unbalanced bracket")
            stack.pop()
            nesting -= 1
        elif token in operators:
            precedence = _BINARY[token]
            while stack and stack[-1] != "(":
                top = _BINARY.get(stack[-1], _UNARY)
                if top < precedence or (top == precedence and token == "**"):
                    break
                output.append(stack.pop())
            stack.append(token)
            wants_operand = True
        elif token == "**":
            raise TooLarge("a power, where none is allowed")
        else:
            raise NotArithmetic(f"{token} where an operator was expected")
    if wants_operand or "(" in stack:
        raise NotArithmetic("the expression ends too early")
    return output + stack[::-1]


def _evaluate(tokens: Sequence[str], read: Callable[[str], Any], binary: dict[str, Callable]) -> Any:
    stack: list[Any] = []
    for token in tokens:
        if token in binary:
            right = stack.pop()
            stack.append(binary[token](stack.pop(), right))
        elif token == "neg":
            stack.append(-stack.pop())
        elif token != "pos":
            stack.append(read(token))
    return stack.pop()


def exact(tokens: Sequence[str]) -> Fraction:
    """The exact value of a postfix expression over + - * / and unary minus; NotArithmetic for 1/0."""
    binary = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    try:
        return _evaluate(tokens, Fraction, binary)
    except ZeroDivisionError as error:
        raise NotArithmetic("division by zero") from error


MAX_BITS = 14_000  # of an integer power: Python refuses to print more than 4,300 digits, 14,284 bits


def as_python(tokens: Sequence[str]) -> int | float:
    """The value that Python gives the expression: / makes floats, // floors, 05 is no number.

    Raises NotArithmetic where Python raises or the value is complex, TooLarge for huge powers.
    """
    binary = {
        "+": operator.add,
        "-": operator.sub,
        "*": operator.mul,
        "/": operator.truediv,
        "//": operator.floordiv,
        "**": _power,
    }
    try:
        value = _evaluate(tokens, _python_literal, binary)
    except (ArithmeticError, TypeError) as error:  # TypeError: a complex number in // or float()
        raise NotArithmetic(str(error)) from error
    if isinstance(value, complex):
        raise NotArithmetic("a complex value")
    return value


def _python_literal(digits: str) -> int:
    if digits[0] == "0" and digits.strip("0"):
        raise NotArithmetic("a number with a leading zero")
    return int(digits)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_BITS:
        raise TooLarge(f"a power of more than {MAX_BITS} bits")
    return base**exponent
