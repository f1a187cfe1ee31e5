r"""What the worker process of `math.py` does: the canonical key of a LaTeX expression.

It answers {"latex": [text, ...]} with {"keys": [text or null, ...]}; null is what cannot be read. The
grammar is that of math-verify, through latex2sympy2_extended. Its verify() is not used: it rounds to six
digits and is not transitive, so that equal keys could not mean equal verdicts. Instead:

- a constant's key is its exact value when that is rational, else its first 30 digits;
- a rational function with rational coefficients is cancelled to its lowest terms;
- other expressions are known by their values at two fixed points, to 25 digits.
"""

import functools
import hashlib
import math
import re
from fractions import Fraction

MEMORY = 2 * 2**30  # bytes of address space; SymPy and the grammar take 0.2 GB
MAX_NODES = 300
MAX_BITS = 20_000  # of a power of numbers
MAX_DEGREE, MAX_TERMS = 200, 3000  # of a polynomial that is multiplied out
DIGITS = 30
PRECISION = 60


class TooLarge(ValueError):
    """More work than an answer is worth: a tower of powers, a factorial of a large number."""


def prepare() -> None:
    """Import what is heavy, and read one expression, which builds the grammar's tables."""
    import sys

    sys.setrecursionlimit(3000)
    key(r"\frac{x^2+1}{\sqrt{2}} + 3")


def reply(question: dict) -> dict:
    return {"keys": [key(latex) for latex in question["latex"]]}


@functools.lru_cache(maxsize=10_000)
def key(latex: str) -> str | None:
    try:
        left, equals, right = latex.partition("=")
        if not equals:
            return spelled(parsed(latex))
        return equation(parsed(left) - parsed(right))
    except Exception:  # the grammar and SymPy raise everything there is, RecursionError and MemoryError included
        return None


def parsed(latex: str):
    """A SymPy expression without limits exceeded; raises when the text is none."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, NormalizationConfig, latex2sympy, normalize_latex

    latex = re.sub(r"[0-9]*\.[0-9]+", exact_decimal, latex)
    rules = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")
    expression = latex2sympy(
        normalize_latex(latex, rules),
        is_real=None,
        convert_degrees=False,
        normalization_config=None,
        conversion_config=ConversionConfig(lowercase_symbols=False),
    )
    if not isinstance(expression, sympy.Expr):
        raise ValueError("no expression")
    check(expression)
    imaginary = {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    expression = expression.doit().xreplace(imaginary)
    return sympy.expand_func(expression) if expression.has(sympy.binomial) else expression


def exact_decimal(match: re.Match) -> str:
    value = Fraction(match[0])
    return rf"{{(\frac{{{value.numerator}}}{{{value.denominator}}})}}"


def check(expression) -> None:
    """Raise TooLarge for what would take long to evaluate; looks, and evaluates nothing itself."""
    import sympy

    for count, node in enumerate(sympy.preorder_traversal(expression)):
        if count > MAX_NODES:
            raise TooLarge("too many parts")
        if isinstance(node, (sympy.Sum, sympy.Product, sympy.Integral, sympy.Limit, sympy.Derivative)):
            raise TooLarge("something to work out, not a result")
    magnitude(expression)


def magnitude(node) -> float:
    """About log2 of the absolute value of a number, and of what its parts can make of it; TooLarge beyond MAX_BITS."""
    import sympy

    parts = [magnitude(part) for part in node.args]
    if isinstance(node, sympy.Rational):
        bits = float(max(abs(node.p).bit_length(), node.q.bit_length()))
    elif isinstance(node, sympy.Pow) or node.func.__name__ == "exp":
        base, exponent = parts if len(parts) == 2 else (1.5, parts[0])
        if node.free_symbols and not node.args[-1].free_symbols and exponent > 10:
            raise TooLarge("a large power of a variable")
        bits = max(base, 1.0) * 2.0 ** min(exponent, 64.0)
    elif node.func.__name__ in ("factorial", "binomial", "gamma", "factorial2", "fibonacci", "subfactorial"):
        if parts and max(parts) > 10:
            raise TooLarge("the factorial of a large number")
        bits = 2.0 ** (max(parts, default=0) + 4)
    else:
        bits = sum(parts) + 1.0 if isinstance(node, sympy.Mul) else max(parts, default=1.0) + 1.0
    if bits > MAX_BITS:
        raise TooLarge("a large number")
    return bits


def spelled(expression) -> str | None:
    import sympy

    symbols = sorted(expression.free_symbols, key=lambda symbol: symbol.name)
    if not symbols:
        return number(expression)
    if not multiplies_out(expression):
        return values(expression, symbols)
    top, bottom = sympy.fraction(sympy.cancel(sympy.together(expression)))
    if not top.free_symbols and not bottom.free_symbols:
        return number(top / bottom)
    below, bottom = sympy.Poly(bottom, *symbols).primitive()
    if bottom.LC() < 0:
        below, bottom = -below, -bottom
    top = (sympy.Poly(top, *symbols) / below).as_expr().expand()
    return str(top) if bottom.is_one else f"({top})/({bottom.as_expr()})"


def multiplies_out(expression) -> bool:
    """Whether it is a rational function with rational coefficients and not too many terms."""
    import sympy

    if any(not isinstance(atom, (sympy.Rational, sympy.Symbol)) for atom in expression.atoms()):
        return False
    if not all(
        node.is_Atom or node.is_Add or node.is_Mul or (node.is_Pow and node.exp.is_Integer)
        for node in sympy.preorder_traversal(expression)
    ):
        return False
    bound, variables = degree(expression), len(expression.free_symbols)
    return bound <= MAX_DEGREE and math.comb(bound + variables, variables) <= MAX_TERMS


def degree(node) -> int:
    """A bound of the total degree of such a function; over a common denominator, terms are factors of each other."""
    import sympy

    parts = [degree(part) for part in node.args]
    if node.is_Pow:
        return parts[0] * abs(int(node.exp))
    if node.is_Mul or (node.is_Add and any(power.exp.is_negative for power in node.atoms(sympy.Pow))):
        return sum(parts)
    return max(parts, default=0) if parts else int(node.is_Symbol)


def number(expression) -> str | None:
    """The key of a constant: exact when rational, else 30 significant digits."""
    import sympy

    if expression.is_Rational:
        return str(Fraction(int(expression.p), int(expression.q)))
    value = sympy.N(expression, PRECISION)
    real, imaginary = value.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return {sympy.oo: "oo", -sympy.oo: "-oo"}.get(expression)
    real, imaginary = digits(real), digits(imaginary)
    return real if imaginary == "0" else f"{real} + {imaginary}*i"


def digits(value) -> str:
    """A real number: the fraction that it is to 45 digits, else its first 30 significant digits."""
    import sympy

    found = Fraction(str(sympy.Float(value, PRECISION)))
    if abs(found) < Fraction(1, 10**45):
        return "0"
    near = found.limit_denominator(10**6)
    if abs(near - found) < abs(found) * Fraction(1, 10**45):
        return str(near)
    return str(sympy.Float(value, DIGITS))


def values(expression, symbols) -> str | None:
    """The key of a function: its values where each variable has two fixed values, one of them negative."""
    import sympy

    found = []
    for sign in (1, -1):
        point = {}
        for symbol in symbols:
            seed = hashlib.blake2b(symbol.name.encode(), digest_size=4).digest()
            point[symbol] = sign * (sympy.Rational(int.from_bytes(seed, "little"), 2**32) + sympy.Rational(1, 3))
        value = sympy.N(expression.subs(point), PRECISION)
        real, imaginary = value.as_real_imag()
        if not real.is_number or not imaginary.is_number or not (real.is_finite and imaginary.is_finite):
            return shape(expression)
        if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
            return shape(expression)
        parts = [str(sympy.Float(part, 25)) if abs(part) > 1e-40 else "0" for part in (real, imaginary)]
        found.append(parts[0] if parts[1] == "0" else f"{parts[0]} + {parts[1]}*i")
    names = ", ".join(symbol.name for symbol in symbols)
    return f"({names}) -> {found[0]}; {found[1]}"


def shape(expression) -> str:
    """The key of what has no values, such as f(x) + 1: SymPy's spelling, multiplied out."""
    import sympy

    return str(sympy.expand(expression))


def equation(difference) -> str | None:
    """The key of difference = 0: without common factors, the constant on the right."""
    import sympy

    symbols = sorted(difference.free_symbols, key=lambda symbol: symbol.name)
    if not symbols or not multiplies_out(difference):
        return f"{spelled(difference)} = 0"
    top, _ = sympy.fraction(sympy.cancel(sympy.together(difference)))
    poly = sympy.Poly(top, *symbols).primitive()[1]
    if poly.LC() < 0:
        poly = -poly
    constant = poly.eval(dict.fromkeys(symbols, 0))
    return f"{(poly - constant).as_expr()} = {-constant}"
