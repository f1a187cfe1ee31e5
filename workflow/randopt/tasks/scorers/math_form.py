r"""What a written mathematical answer says: its structure, and one canonical key for all its spellings.

An answer is taken apart by plain text rules into numbers, words, sets, tuples, intervals and matrices.
What is left, an expression such as \frac{1+\sqrt{5}}{2}, is a `Leaf`: a computer algebra system reads it,
in a process of its own (`math_worker.py`), never here. `key` then spells the whole. Every step is linear
in the length of the text, or close to it, and the text is at most MAX_ANSWER characters.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

from randopt.tasks.scorers import text as find

MAX_ANSWER = 500  # characters that are understood; longer answers are compared as text
MAX_KEPT = 2000  # characters; what is longer is no answer
MAX_PARTS = 64
MAX_NESTING = 25


@dataclass(frozen=True)
class Word:
    """An answer that is compared as text: a name, a choice, "no solution", what nobody could read."""

    key: str


@dataclass(frozen=True)
class Leaf:
    """LaTeX for the computer algebra system: an expression, or an equation with one "="."""

    latex: str


@dataclass(frozen=True)
class Group:
    """kind: "set", "union", "matrix", "percent", an assignment's name and "=", or two brackets such as "[)"."""

    kind: str
    parts: tuple["Form", ...]
    columns: int = 0  # of a matrix, whose parts are its cells row by row


Form = Word | Leaf | Group


def squeezed(text: str) -> str:
    """The text without white space, as it can be written to a file."""
    return "".join(text.split()).encode("utf-8", "replace").decode()


def leaves(form: Form) -> Iterator[str]:
    """The LaTeX of every leaf, from left to right."""
    if isinstance(form, Leaf):
        yield form.latex
    elif isinstance(form, Group):
        for part in form.parts:
            yield from leaves(part)


def key(form: Form, read: Callable[[str], str]) -> str:
    """The canonical spelling; `read` gives a leaf's. The order of a set and what stands twice in it do not count."""
    if isinstance(form, Word):
        return form.key
    if isinstance(form, Leaf):
        return read(form.latex)
    parts = [key(part, read) for part in form.parts]
    if form.kind in ("set", "union"):
        parts = sorted(set(parts))
        if len(parts) == 1:
            return parts[0]
        return "{" + ", ".join(parts) + "}" if form.kind == "set" else " ∪ ".join(parts)
    if form.kind == "percent":
        return parts[0] + "%"
    if form.kind.endswith("="):
        return f"{form.kind[:-1]} = {parts[0]}"
    if form.kind == "matrix":
        rows = [parts[start : start + form.columns] for start in range(0, len(parts), form.columns)]
        return "[" + "; ".join(", ".join(row) for row in rows) + "]"
    return form.kind[0] + ", ".join(parts) + form.kind[1]


def same(found: str, expected: str) -> bool:
    """Whether an answer with key `found` is right where `expected` is the reference's key.

    Beyond equality: 50% also answers 50 and 1/2, and is answered by them; "x + y = 5" also answers 5.
    """
    if found == expected:
        return True
    if found.endswith("%") != expected.endswith("%"):
        of_percent, other = (found, expected) if found.endswith("%") else (expected, found)
        value = find.number(of_percent[:-1])
        if of_percent[:-1] == other or (value is not None and find.number(other) == value / 100):
            return True
    left, equals, right = found.rpartition(" = ")
    return bool(equals) and "," not in left and " = " not in expected and right == expected


# From text to form.

_SPELLINGS = str.maketrans(
    {
        "\u2212": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
        "∞": r"\infty ", "°": r"^\circ ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ",
        "±": r"\pm ", "√": r"\sqrt ", "∅": r"\emptyset ", "≈": r"\approx ", "θ": r"\theta ", "½": r"\frac{1}{2}",
        "²": "^2", "³": "^3", "\u00a0": " ", "~": " ", "\n": " ", "\t": " ", "\r": " ", "€": "", "£": "",
    }
)  # fmt: skip
_COMMANDS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right|mleft|mright|[bB]igg?[lrm]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[()\[\]]|\\?\$|\*\*$|^\*\*", ""),
        (r"\\!|(?<=[0-9])\\,(?=[0-9]{3})", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:mathrm|mathbf|mathit|textbf|textit|textrm|textnormal|textsf|mbox|mathsf)(?![A-Za-z])\s*", r"\\text"),
        (r"\\text\s*\{\s*([A-Za-z])\s*\}", r" \1 "),
        (r"\\%", "%"),
        (r"\\(lbrace|rbrace)(?![A-Za-z])", lambda match: r"\{" if match[1][0] == "l" else r"\}"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\(?:leqslant|leqq|leq)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geqslant|geqq|geq)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
        (r"\\mathbb\s*\{?\s*R\s*\}?|\\R(?![A-Za-z])", r"(-\\infty,\\infty)"),
        (r"(?<![A-Za-z\\])(?:infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])sqrt(?![A-Za-z])", r"\\sqrt"),
        (r"\*\*", "^"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]{1,50}\})\s*([0-9])", r"\1{\2}"),
        (r",?\s*\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", ", "),
    )
]
_DEGREES = re.compile(r"([0-9.]{1,20})?\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z]))")
_ANGLES = re.compile(r"\\?(?:sin|cos|tan|cot|sec|csc)(?![a-z])")


def form(answer: str) -> Form | None:
    """The structure of an answer; None when it is empty or longer than MAX_KEPT."""
    if len(answer) > MAX_KEPT:
        return None
    boxed = find.last_boxed(answer)
    plain = (answer if boxed is None else boxed).translate(_SPELLINGS)
    for pattern, replacement in _COMMANDS:
        plain = pattern.sub(replacement, plain)
    plain = _square_roots(plain)
    if _ANGLES.search(plain):
        plain = _DEGREES.sub(lambda match: rf"(\frac{{{match[1]}\pi}}{{180}})" if match[1] else "", plain)
    else:
        plain = _DEGREES.sub(lambda match: match[1] or "", plain)
    plain = plain.strip().rstrip(".,;: ")
    if not squeezed(plain):
        return None
    if len(plain) > MAX_ANSWER or _nesting(plain) > MAX_NESTING:
        return Word(squeezed(plain))
    return _form(plain)


def _square_roots(text: str) -> str:
    r"""\sqrt(...) as \sqrt{...}."""
    start = text.find(r"\sqrt(")
    for _ in range(MAX_PARTS):
        if start < 0:
            break
        end = _closing(text, start + 5)
        if end is not None:
            text = text[: start + 5] + "{" + text[start + 6 : end] + "}" + text[end + 1 :]
        start = text.find(r"\sqrt(", start + 5)
    return text


def _nesting(text: str) -> int:
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _closing(text: str, start: int) -> int | None:
    """Where the bracket that opens at `start` is closed; brackets of all kinds count as one kind."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] in "([{") - (text[position] in ")]}")
        if depth == 0:
            return position
    return None


def _split(text: str, separator: str) -> list[str]:
    """The parts between top-level matches of the separator, a regular expression."""
    depth, start, skip, parts = 0, 0, 0, []
    pattern = re.compile(separator)
    for position, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if depth or position < skip:
            continue
        match = pattern.match(text, position)
        if match:
            parts.append(text[start:position])
            start = skip = match.end()
    return [*parts, text[start:]]


_NAME = re.compile(
    r"\s*(?:\\[A-Za-z]+|[A-Za-z])\s*(?:_\s*(?:\w|\{[^{}]*\})|'|\^\s*\{-1\})*\s*(?:\([A-Za-z0-9, ]*\))?\s*"
)
_MATRIX = re.compile(r"\\begin\{([bpB]?matrix|array)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]+))")
_WORDS = re.compile(r"[A-Za-z][A-Za-z'\-]*(?:\s+[A-Za-z'\-]+)+|[A-Za-z]{3,}|[Nn]o")
_CHOICE = re.compile(r"\(?\s*(?:\\text\s*\{)?\s*\(?\s*([A-Za-z])\s*\)?\s*\}?\s*\)?")
_ORDER = r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<|>)"
_UNIT_TEXT = re.compile(r"\\text\s*\{[^{}]*\}\s*(?:\^\s*(?:[0-9]|\{[0-9]\}))?\s*$")
_UNIT_WORDS = re.compile(
    r"([^A-Za-z]|.*[^A-Za-z\s/.])\s*([A-Za-z][A-Za-z\s/.]*)(?:\^\s*(?:[0-9]|\{[0-9]\}))?", re.DOTALL
)
_SHORT_UNITS = re.compile(r"cm|mm|km|kg|mg|ft|mi|in|lbs?|oz|ml|hrs?|min|sec|mph|kmh|deg|sq|yds?|day|per|cu|of")
_PLAIN_FUNCTIONS = frozenset(("sin", "cos", "tan", "log", "exp", "sqrt", "ln", "abs", "sinh", "cosh", "tanh", "arctan"))


def _form(text: str) -> Form:
    text = text.strip().rstrip(".,;: ")
    value = _number(text)
    if value is not None:
        return Word(str(value))
    word = _word(text)
    if word is not None:
        return word
    items = [part for part in _split(text, "[,;]") if part.strip()]
    if len(items) > MAX_PARTS or text.count(r"\pm") + text.count(r"\mp") > 3:
        return Word(squeezed(text))
    if len(items) > 1:
        return _list(items)
    for sign, other in (("+", "-"), ("-", "+")):
        if r"\pm" in text or r"\mp" in text:
            first = text.replace(r"\pm", sign).replace(r"\mp", other)
            second = text.replace(r"\pm", other).replace(r"\mp", sign)
            return Group("set", (_form(first.lstrip("+ ")), _form(second.lstrip("+ "))))
    return _relation(text) or _bracketed(text) or _measured(text) or Leaf(text)


def _list(items: list[str]) -> Form:
    """A list without brackets is a set; x = 1, y = 2 keeps its names, and x < 1 or x > 2 is a union."""
    if all(re.search(_ORDER, item) for item in items):
        return Group("union", tuple(_form(item) for item in items))
    sides = [item.split("=") for item in items]
    if all(len(side) == 2 and _NAME.fullmatch(side[0]) for side in sides):
        names = [squeezed(name) for name, _ in sides]
        if len(set(names)) == len(names):
            return Group(
                "set", tuple(Group(f"{name}=", (_form(side[1]),)) for name, side in zip(names, sides, strict=True))
            )
    return Group("set", tuple(_form(item) for item in items))


def _word(text: str) -> Word | None:
    match = _CHOICE.fullmatch(text)
    if match:
        return None if match[1] in "ei" else Word(match[1])  # e and i are numbers
    match = _BASED.fullmatch(text)
    if match:
        return Word(f"{match[1]}_{match[2] or match[3]}")
    if re.fullmatch(r"[-+]?\s*\\infty", text):
        return Word("-oo" if text.startswith("-") else "oo")
    if text == r"\emptyset" or re.fullmatch(r"\\\{\s*\\\}", text):
        return Word("∅")
    spoken = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    if _WORDS.fullmatch(spoken.strip()) and not _PLAIN_FUNCTIONS & set(spoken.lower().split()):
        return Word(" ".join(spoken.casefold().split()))
    if spoken != text and re.sub(r"\\text\s*\{[^{}]*\}", "", text).strip(" .()") == "":
        return Word(" ".join(spoken.casefold().split()).strip("(). ") or squeezed(text))
    if re.fullmatch(r"[0-9]+\s*:\s*[0-9]+(?:\s*:\s*[0-9]+)*", text):  # a ratio or a time
        return Word(squeezed(text))
    return None


def _relation(text: str) -> Form | None:
    r"""x \in S, a < x \le b, x = a, x \approx a."""
    parts = _split(text, r"\\in(?![A-Za-z])")
    if len(parts) == 2 and _NAME.fullmatch(parts[0]):
        return _form(parts[1])
    parts = _split(text, _ORDER)
    if len(parts) in (2, 3):
        return _interval(parts, re.findall(_ORDER, text))
    parts = _split(text, r"\\approx(?![A-Za-z])")
    if len(parts) == 2:
        return _form(parts[1] if not parts[0].strip() or _NAME.fullmatch(parts[0]) else parts[0])
    parts = [part for part in _split(text, r"(?<![<>!\\])=") if part.strip()]
    if len(parts) < 2:
        return _form(parts[0]) if parts and parts[0] != text else None
    if _NAME.fullmatch(parts[-1]) and not _NAME.fullmatch(parts[0]):
        return _form(parts[0])  # 5 = x
    # What x and y are related by is an answer itself; any other left side is the name of the answer.
    letters = re.sub(r"\\text\s*\{[^{}]*\}|\\[A-Za-z]+", "", parts[0])
    if len(parts) == 2 and not _NAME.fullmatch(parts[0]) and ("x" in letters or "y" in letters):
        return Leaf(text)
    return _form(parts[-1])


def _interval(parts: list[str], signs: list[str]) -> Form | None:
    """The interval of x > a, a < x, a < x <= b or the other way round; None for other inequalities."""
    if len(signs) != len(parts) - 1 or len({sign in (">", r"\ge") for sign in signs}) != 1:
        return None
    if signs[0] in (">", r"\ge"):
        parts, signs = parts[::-1], signs[::-1]
    closed = ["e" in sign for sign in signs]
    if len(parts) == 3 and _NAME.fullmatch(parts[1]):
        kind = "(["[closed[0]] + ")]"[closed[1]]
        return Group(kind, (_form(parts[0]), _form(parts[2])))
    if len(parts) == 2 and _NAME.fullmatch(parts[1]):
        return Group("(["[closed[0]] + ")", (_form(parts[0]), Word("oo")))
    if len(parts) == 2 and _NAME.fullmatch(parts[0]):
        return Group("(" + ")]"[closed[0]], (Word("-oo"), _form(parts[1])))
    return None


def _bracketed(text: str) -> Form | None:
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [_split(row, "&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix[2]) if row.strip()]
        if rows and len({len(row) for row in rows}) == 1 and len(rows) * len(rows[0]) <= MAX_PARTS:
            return Group("matrix", tuple(_form(cell) for row in rows for cell in row), columns=len(rows[0]))
        return None
    parts = _split(text, r"\\cup(?![A-Za-z])")
    if len(parts) > 1:
        return Group("union", tuple(_form(part) for part in parts))
    if text.startswith(r"\{") and text.endswith(r"\}") and _closing(text, 1) == len(text) - 1:
        inner = [part for part in _split(text[2:-2], "[,;]") if part.strip()]
        if r"\pm" in text[2:-2] or not inner:
            return _form(text[2:-2]) if inner else Word("∅")
        return Group("set", tuple(_form(part) for part in inner)) if len(inner) <= MAX_PARTS else None
    if text[:1] in ("(", "[", "{") and _closing(text, 0) == len(text) - 1:
        inner = [part for part in _split(text[1:-1], "[,;]") if part.strip()]
        if len(inner) > MAX_PARTS or not inner:
            return None
        if text[0] == "{" or (len(inner) == 1 and text[0] + text[-1] == "()"):
            return _form(text[1:-1])
        if text[-1] in ")]":
            return Group(text[0] + text[-1], tuple(_form(part) for part in inner))
    return None


def _measured(text: str) -> Form | None:
    """Percent and units; the unit is dropped."""
    if text.endswith("%"):
        return Group("percent", (_form(text.rstrip("% ")),))
    if re.search(r"(?<=[0-9}\s])\s*percent$", text):
        return Group("percent", (_form(text[: text.rindex("percent")]),))
    bare = _UNIT_TEXT.sub("", text).strip()
    if bare and bare != text:
        return _form(bare)
    match = _UNIT_WORDS.fullmatch(text)
    if match and match[1].rstrip()[-1:] in "0123456789}":
        words = match[2].casefold().replace("/", " per ").replace(".", " ").split()
        if all(len(word) > 3 or _SHORT_UNITS.fullmatch(word) for word in words) and not _PLAIN_FUNCTIONS & set(words):
            return _form(match[1])
    return None


_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)(?:(?P<whole>[0-9]+)?\\frac\{{(?P<top>[-+]?(?:{_DECIMAL}))\}}\{{(?P<bottom>[-+]?(?:{_DECIMAL}))\}}"
    rf"|(?P<a>{_DECIMAL})(?:/(?P<b>{_DECIMAL}))?)"
)
_REPEATING = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\overline\{([0-9]+)\}")


def _number(text: str) -> Fraction | None:
    r"""The exact value of -1,234.5, 3/4, \frac{3}{4}, 1\frac{1}{2} or 0.1\overline{6}, else None."""
    if "," in text and re.search(r",\s", text):
        return None
    mixed = re.match(r"[-+]?\s*[0-9]+\s+[0-9]", text)
    plain = "".join(text.split())
    if mixed or not plain or len(plain) > 2 * find.MAX_DIGITS:
        return None
    match = _REPEATING.fullmatch(plain)
    if match:
        sign, whole, digits, period = match.groups()
        tail = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(digits))
        value = Fraction(f"{whole or 0}.{digits or 0}") + tail
        return -value if sign == "-" else value
    match = _FRACTION.fullmatch(plain)
    if not match:
        return None
    top, bottom = (match["top"], match["bottom"]) if match["top"] is not None else (match["a"], match["b"] or "1")
    above, below = (Fraction(part.replace(",", "").rstrip(".") or "0") for part in (top, bottom))
    if not below:
        return None
    value = above / below
    if match["whole"] is not None:
        if value < 0:
            return None
        value += int(match["whole"])
    return -value if match["sign"] == "-" else value
