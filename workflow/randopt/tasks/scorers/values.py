"""Values that a sandboxed program claims, compared without ever becoming Python objects here.

A value arrives as nested lists [kind, content] (sandbox/worker.py: tree). Its canonical text is the same for all values
that Python calls equal, so equality is equality of text: no method of a program's objects runs, and no set or dict is
built of keys that a program chose.
"""

import json
import math
from fractions import Fraction
from typing import Any

_MAX_DEPTH = 60  # a little more than the worker's own limit
_MAX_DIGITS = 20_000  # hexadecimal digits of a ratio's parts: reducing it takes quadratic time
_NAN = '["nan"]'  # no string's text holds it: there quotes are escaped
_FALSE = {"null", '["number","0x0"]', '["str",""]', '["bytes",""]'} | {
    f'["{kind}",[]]' for kind in ("list", "tuple", "set", "dict", "deque")
}


class NoValue(ValueError):
    """Not a value that can be compared: an object of the program's own, or no tree at all."""


def canonical(tree: Any) -> str:
    """The canonical text of a value's tree. Raises NoValue."""
    try:
        return _canonical(tree, 0)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise NoValue(str(error)) from error


def equal(left: str, right: str) -> bool:
    """Whether two values with these canonical texts are equal; NaN equals nothing."""
    return left == right and _NAN not in left


def truth(text: str) -> bool:
    """bool() of the value with this canonical text."""
    return text not in _FALSE


def _canonical(tree: Any, depth: int) -> str:
    kind, content = tree
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deep")
    if kind == "none":
        return "null"
    if kind == "bool":  # True is 1, as everywhere in Python
        return f'["number","{hex(bool(content))}"]'
    if kind == "int":
        return f'["number","{hex(int(content, 16))}"]'
    if kind == "float":
        return _real(_float(content))
    if kind == "ratio":
        if sum(map(len, content)) > _MAX_DIGITS:
            raise ValueError("a ratio of too many digits")
        return _ratio(Fraction(*(int(part, 16) for part in content)))
    if kind == "complex":
        real, imaginary = map(_float, content)
        return _real(real) if imaginary == 0 else f'["complex",{_real(real)},{_real(imaginary)}]'
    if kind == "bytes":
        return f'["bytes","{bytes.fromhex(content).hex()}"]'
    if kind == "str" and isinstance(content, str):
        return f'["str",{json.dumps(content)}]'
    if kind not in ("list", "tuple", "set", "dict", "deque") or not isinstance(content, list):
        raise ValueError(f"a value of kind {str(kind)[:50]!r}")
    if kind == "dict":
        parts = [f"{_canonical(key, depth + 1)},{_canonical(value, depth + 1)}" for key, value in content]
    else:
        parts = [_canonical(part, depth + 1) for part in content]
    if kind in ("set", "dict"):
        parts.sort()
    return f'["{kind}",[{",".join(parts)}]]'


def _float(text: str) -> float:
    if len(text) > 60:
        raise ValueError("no float")
    return float.fromhex(text)


def _real(value: float) -> str:
    if math.isnan(value):
        return _NAN
    return f'["{value}"]' if math.isinf(value) else _ratio(Fraction(value))


def _ratio(value: Fraction) -> str:
    """2.0 and Fraction(4, 2) are spelled like 2."""
    over = "" if value.denominator == 1 else f"/{hex(value.denominator)}"
    return f'["number","{hex(value.numerator)}{over}"]'
