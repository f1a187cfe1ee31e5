"""Scorers: the public verdicts where they are reproduced, the right ones elsewhere, and no hanging."""

import importlib.util
import json
import os
import signal
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt.errors import UserError
from randopt.tasks import scorers
from randopt.tasks.scorers import NO_ANSWER, arithmetic, sandboxed
from randopt.tasks.scorers.countdown import paper_format
from randopt.tasks.scorers.text import last_number

CASES = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "data" / "scoring_cases.jsonl").read_text("utf-8").splitlines()
]
ABC = {"numbers": [44, 19, 35], "target": "98"}
REFERENCES = {
    "number": 56,
    "countdown": ABC,
    "countdown_paper": ABC,
    "gsm8k": "1,234",
    "gsm8k_paper": "1234",
}


def verdict(scorer, response, reference=None):
    return scorers.get(scorer).score(response, REFERENCES[scorer] if reference is None else reference)


# The public code's verdicts.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_paper_scorers_reproduce_the_public_verdicts(case):
    found = scorers.resolve(case["task"], "paper").score(case["response"], case["ground_truth"])
    if not case["safe_to_run"]:
        assert found == NO_ANSWER
        return
    assert found.reward == pytest.approx(case["reward"], abs=1e-9)
    assert found.vote_key == (case["vote"] or None)
    assert found.lenient == case["vote_correct"]
    assert found.strict == (case["reward"] >= 1)


HOSTILE = {
    "powers": ("9**9**9", [9, 9, 9]),
    "powers of a bracket": ("(9**9)**(9**9)", [9, 9, 9, 9]),
    "signs": ("-" * 20_000 + "5", [5]),
    "digits": ("1" * 5000, [1]),
    "brackets": ("(" * 20_000 + "5" + ")" * 20_000, [5]),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("scorer", ["countdown", "countdown_paper"])
def test_hostile_arithmetic_gets_nothing_at_once(scorer, name):
    answer, numbers = HOSTILE[name]
    start = time.perf_counter()
    response = f"44+19=63</think>\n<answer>{answer}</answer>"
    assert verdict(scorer, response, {"numbers": numbers, "target": "1"}) == NO_ANSWER
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("answer", "numbers", "target", "expected"),
    [
        ("2**3", [2, 3], "8", (1.1, True, True, "8")),
        ("-2**2+5", [2, 2, 5], "1", (1.1, True, True, "1")),
        ("2**-1*4", [2, 1, 4], "2", (1.1, True, True, "2")),
        ("8/(3-8/3)", [8, 3, 8, 3], "24", (1.1, True, True, "23.99999999999999")),
        ("4/2", [4, 2], "2", (1.1, True, True, "2")),
        ("05+1", [5, 1], "6", (0.1, False, False, None)),  # Python: no such number
        ("5 1", [5, 1], "6", (0.1, False, False, None)),
        ("2(3)", [2, 3], "6", (0.1, False, False, None)),
        ("()", [], "0", (0.1, False, False, None)),
        ("5/0", [5, 0], "0", (0.1, False, False, None)),
        ("(0-8)**(1/2)", [0, 8, 1, 2], "2", (0.1, False, False, None)),  # complex
        ("\n44+19+35", [44, 19, 35], "98", (0.1, False, True, "98")),  # stripped for the vote only
        (" 44+19+35 ", [44, 19, 35], "98", (1.1, True, True, "98")),
        ("44+19+35\n\n", [44, 19, 35], "98", (0.1, False, True, "98")),
        ("1001+1", [1001, 1], "1002", (1.1, True, False, None)),  # votes only up to 1000
        ("44×19", [44, 19], "836", (0.1, False, False, None)),
        ("+5", [5], "5", (1.1, True, True, "5")),
        ("9" * 500, [9], "9", (0.1, False, False, None)),
    ],
)
def test_paper_countdown_beyond_the_given_rows(answer, numbers, target, expected):
    response = f"thought</think>\n<answer>{answer}</answer>"
    found = verdict("countdown_paper", response, {"numbers": numbers, "target": target})
    assert found.reward == pytest.approx(expected[0], abs=1e-9)
    assert found[1:] == expected[1:]


@pytest.mark.parametrize(
    ("response", "form"),
    [
        ("a</think>\n<answer>1</answer>", 1),
        ("a</think>\n<answer>1</answer>\n", 1),
        ("<think>a</think>\n<answer>1</answer>", 1),
        ("a</think><answer>1</answer>", 0.6),
        ("a</think>\n\n<answer>1</answer>", 0.6),
        ("a</think>\n<answer>1", 0.1),
        ("</answer></think>\n<answer>", 0.1),
        ("<answer>1</answer>", 0.5),
        ("", 0),
    ],
)
def test_paper_format(response, form):
    assert paper_format(response) == pytest.approx(form)


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("I do not know.", "42", (0.0, False, False, ".")),
        ("#### 1,234", "1234", (1.0, True, True, "1234")),
        ("#### 42.", "42", (0.0, False, False, "42.")),
        ("#### $42", "42", (1.0, True, True, "42")),
        ("#### 1\n#### 42", "42", (1.0, True, True, "42")),
        ("#### -5", "-5", (1.0, True, True, "-5")),
        ("#### 42" + " yes" * 100 + " 7", "42", (0.0, False, False, "7")),  # beyond 300 characters
        ("", "42", (0.0, False, False, None)),
    ],
)
def test_paper_gsm8k_beyond_the_given_rows(response, reference, expected):
    assert verdict("gsm8k_paper", response, reference) == expected


# Our own verdicts.


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("56", "56"),
        ("007", "7"),
        ("1,234", "1234"),
        ("42.0", "42"),
        ("It is 3.", "3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("12,345,678.50", "24691357/2"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("5 -3", "3"),
        ("is -3", "-3"),
        ("= \u22123", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("7x8=56kg", "56"),
        (".5", "1/2"),
        ("3/4", "3/4"),
        ("1/0", None),
        ("no digits", None),
        ("\u0664\u0662 \u00b2 \uff14", None),  # Arabic-Indic, superscript, full-width: not ours
        ("9" * 5000, None),
        ("7" + "x" * 4096, None),
        ("", None),
    ],
)
def test_last_number(text, key):
    value = last_number(text)
    assert (None if value is None else str(value)) == key


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("56", (1.0, True, True, "56")),
        (" 56\n", (1.0, True, True, "56")),
        ("56.", (1.0, False, True, "56")),
        ("056", (1.0, False, True, "56")),
        ("7 times 8 is 56", (1.0, False, True, "56")),
        ("56 = 7 × 8", (0.0, False, False, "8")),
        ("fifty-six", (0.0, False, False, None)),
    ],
)
def test_number(response, expected):
    assert verdict("number", response) == expected
    assert verdict("number", response, "56") == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("so\n#### 42", "42", (1.0, True, True, "42")),
        ("#### 42.00", "42", (1.0, True, True, "42")),
        ("#### $1,234.50", "1234.5", (1.0, True, True, "2469/2")),
        ("#### 3/4", "0.75", (1.0, True, True, "3/4")),
        ("#### 42.", "42", (1.0, False, True, "42")),
        ("#### 42\nLet me check: 40+2 = 43?", "42", (1.0, False, True, "42")),
        ("#### The total is 40 + 2 = 42 apples", "42", (1.0, False, True, "42")),
        (r"It is \boxed{\$1{,}234} of 5000", "1234", (1.0, False, True, "1234")),
        (r"\boxed{\frac{3}{4}} of 8", "3/4", (1.0, False, True, "3/4")),
        ("The answer is: **42**. Unlike 7.", "42", (1.0, False, True, "42")),
        ("x = 10-3\n= 7 dollars", "7", (1.0, False, True, "7")),
        ("#### 41\n", "42", (0.0, False, False, "41")),
        ("nothing", "42", (0.0, False, False, None)),
    ],
)
def test_gsm8k(response, reference, expected):
    assert verdict("gsm8k", response, reference) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("x</think>\n<answer>44+19+35</answer>", (1.1, True, True, "98")),
        ("<think>x</think>\n\n<answer>\n44+19+35\n</answer>\n", (1.06, True, True, "98")),
        ("x</think>\n<answer>44 + 19 + 35 = 98</answer>", (1.1, False, True, "98")),
        ("x</think>\n<answer>44 + 19 + 35 = 99</answer>", (0.1, False, False, None)),
        ("in <answer> tags </think>\n<answer>44+19+35</answer>", (1.1, False, True, "98")),
        ("<answer>[44+19]\u221235</answer> done", (0.05, False, False, "28")),
        (r"<answer>$44 \times 19 \div 35$</answer>", (0.05, False, False, "836/35")),
        ("<answer>44//19+35</answer>", (0.05, False, False, None)),
        ("<answer>44+19</answer>", (0.05, False, False, None)),
        ("<answer>44/(19-19)*35</answer>", (0.05, False, False, None)),
        ("44+19+35", (0.0, False, False, None)),
    ],
)
def test_countdown(response, expected):
    found = verdict("countdown", response)
    assert found.reward == pytest.approx(expected[0])
    assert found[1:] == expected[1:]


@pytest.mark.parametrize(
    ("scorer", "reference"),
    [
        ("number", [56]),
        ("number", True),
        ("number", "many"),
        ("gsm8k", "x"),
        ("gsm8k_paper", None),
        ("countdown", "98"),
        ("countdown", {"numbers": [1]}),
        ("countdown", {"numbers": ["1"], "target": "1"}),
        ("countdown_paper", {"numbers": [1], "target": "x"}),
        ("reasoning_gym", {"question": "?"}),
    ],
)
def test_unusable_references_are_named(scorer, reference):
    with pytest.raises(UserError, match=rf"(?s){scorer}.*expected"):
        scorers.get(scorer).score("56", reference)


def test_names():
    assert scorers.resolve("countdown", "paper").name == "countdown_paper"
    assert scorers.resolve("countdown_paper", "paper").name == "countdown_paper"
    assert scorers.resolve("gsm8k", None).name == "gsm8k"
    assert scorers.resolve("gsm8k", "number").name == "number"
    with pytest.raises(UserError, match=r"only for countdown, gsm8k, .*uspto50k, rocstories"):
        scorers.resolve("number", "paper")
    with pytest.raises(UserError, match=r"'numbr' is unknown.*number, countdown"):
        scorers.get("numbr")
    assert all(name == scorer.name and scorer.version >= 1 for name, scorer in scorers.SCORERS.items())


# Any text, in bounded time.

PIECES = st.lists(
    st.sampled_from(
        [
            *(
                "<answer>",
                "</answer>",
                "<think>",
                "</think>",
                "\n",
                " ",
                "####",
                r"\boxed{",
                "}",
                "answer is",
            ),
            *(
                "1",
                "44",
                "19",
                "35",
                "98",
                ",",
                ".",
                "-",
                "+",
                "*",
                "**",
                "/",
                "(",
                ")",
                "=",
                "$",
                "\u0663",
                "\x00",
            ),
        ]
    ),
    max_size=40,
).map("".join)


@settings(max_examples=200, deadline=1000)
@given(PIECES | st.text())
def test_any_text_gets_a_verdict(text):
    for name, reference in REFERENCES.items():
        found = scorers.get(name).score(text, reference)
        assert 0 <= found.reward <= 1.1
        assert found.lenient or not found.strict or name.endswith("_paper")
        assert found.vote_key is None or found.vote_key


LONG = {
    "opening tags": "<answer>" * 125_000,
    "closing tags": "</answer>" * 125_000,
    "think and answer": "</think>\n<answer>" * 60_000,
    "answers": "<answer>1</answer>" * 60_000,
    "digits": "1" * 1_000_000,
    "groups": "111," * 250_000 + "1111",
    "fractions": "1/" * 500_000,
    "sums": "<answer>" + "1+" * 500_000 + "1</answer>",
    "brackets": "<answer>" + "(" * 1_000_000 + "</answer>",
    "blanks": " " * 1_000_000 + "x",
    "newlines": "####" + "\n" * 1_000_000,
    "hashes": "#### " * 200_000,
    "boxes": r"\boxed{" * 150_000,
    "stated": "answer is " * 100_000,
    "equals": "<answer>" + "=" * 1_000_000 + "</answer>",
    "dots": "." * 1_000_000,
    "minuses": "-" * 1_000_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_takes_less_than_a_second(name):
    for scorer, reference in REFERENCES.items():
        start = time.perf_counter()
        scorers.get(scorer).score(LONG[name], reference)
        assert time.perf_counter() - start < 1, scorer


# The arithmetic parser against trees that are evaluated as they are built.

LEAVES = st.integers(0, 99).map(lambda n: (str(n), Fraction(n), 5))
OPERATIONS = {"+": 1, "-": 1, "*": 2, "/": 2}


def _grown(children):
    def binary(parts):
        (left, a, p), sign, (right, b, q), blank = parts
        rank = OPERATIONS[sign]
        left = left if p >= rank else f"({left})"
        right = right if q > rank else f"({right})"
        value = None
        if a is not None and b is not None and not (sign == "/" and b == 0):
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / (b or 1)}[sign]
        return f"{left}{blank}{sign}{blank}{right}", value, rank

    def unary(part):
        text, value, rank = part
        return f"-{text if rank >= 3 else f'({text})'}", None if value is None else -value, 3

    return (
        st.tuples(children, st.sampled_from("+-*/"), children, st.sampled_from(["", " "])).map(binary)
        | children.map(unary)
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.recursive(LEAVES, _grown, max_leaves=12))
def test_arithmetic_agrees_with_the_tree_it_was_printed_from(tree):
    text, value, _ = tree
    tokens = arithmetic.postfix(text)
    if value is None:
        with pytest.raises(arithmetic.NotArithmetic):
            arithmetic.exact(tokens)
    else:
        assert arithmetic.exact(tokens) == value
        python = arithmetic.as_python(arithmetic.postfix(text, arithmetic.PYTHON))
        assert python == pytest.approx(float(value), rel=1e-6, abs=1e-6)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"0123+-*/()", "//", "**"]), max_size=9).map("".join))
def test_arithmetic_agrees_with_python(text):
    try:
        expected = eval(text, {"__builtins__": {}}) if "**" not in text or text.count("**") < 2 else "skip"
        expected = expected if isinstance(expected, (int, float)) else "skip" if expected == "skip" else None
    except (SyntaxError, TypeError, ArithmeticError):
        expected = None
    if expected == "skip":
        return
    try:
        found = arithmetic.as_python(arithmetic.postfix(text, arithmetic.PYTHON))
    except arithmetic.NotArithmetic:
        found = None
    except arithmetic.TooLarge:
        return
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("text", ["", "1+", "*1", "(1", "1)", "1 2", "(1)(2)", "+1", "1//2", "1.5", "a", "1\n+1"])
def test_what_is_no_arithmetic(text):
    with pytest.raises(arithmetic.NotArithmetic):
        arithmetic.exact(arithmetic.postfix(text))


# Third-party scorers in a process of their own.

ENTRY = {
    "question": "Calculate 309 using all of these numbers: 6, 61, 94, 4.",
    "answer": "94*4 - 61 - 6",
    "metadata": {"source_dataset": "countdown", "numbers": [6, 61, 94, 4], "target": 309},
}


@pytest.fixture
def impatient(monkeypatch):
    if not importlib.util.find_spec("reasoning_gym"):
        pytest.skip("reasoning-gym is not installed")
    monkeypatch.setattr(sandboxed, "SECONDS", 1.0)


def test_reasoning_gym_verdicts(impatient):
    found = verdict("reasoning_gym", "Well. <answer> 94*4 - 61 - 6\n</answer>", ENTRY)
    assert found == (1.0, True, True, "94*4 - 61 - 6")
    assert verdict("reasoning_gym", "Well.\n94*4 - 61 - 6", ENTRY) == (1.0, False, True, "94*4 - 61 - 6")
    assert verdict("reasoning_gym", "<answer>94*4</answer>", ENTRY).reward < 1
    assert verdict("reasoning_gym", "  ", ENTRY) == NO_ANSWER


@pytest.mark.parametrize(
    "answer",
    [
        "9**9**9",
        "9" * 1_000_000,
        "(" * 10_000,
        "[0]*10**12",
        "__import__('time').sleep(60)",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('os')._exit(0)",
        "\ud800\x00",
    ],
    ids=lambda answer: ascii(answer[:30]),
)
def test_hostile_answers_never_hang(impatient, answer):
    verdict("reasoning_gym", "<answer>1</answer>", ENTRY)
    start = time.perf_counter()
    found = verdict("reasoning_gym", f"<answer>{answer}</answer>", ENTRY)
    assert time.perf_counter() - start < 5
    assert found.reward < 0.1 and not found.lenient
    assert verdict("reasoning_gym", "<answer>94*4 - 61 - 6</answer>", ENTRY).strict  # and it still works


def test_an_unknown_data_set_is_named(impatient):
    with pytest.raises(UserError, match=r"reasoning_gym:no_such.*not registered"):
        verdict("reasoning_gym", "1", {**ENTRY, "dataset": "no_such"})


def test_a_stuck_worker_is_replaced(impatient, monkeypatch):
    """A scorer that is not known to evaluate text hangs in the worker itself: its group is killed."""
    assert verdict("reasoning_gym", "<answer>94*4 - 61 - 6</answer>", ENTRY).strict
    stuck = sandboxed._WORKER.process
    os.kill(stuck.pid, signal.SIGSTOP)
    start = time.perf_counter()
    assert verdict("reasoning_gym", "<answer>1</answer>", ENTRY).reward == 0
    assert time.perf_counter() - start < 5
    assert stuck.poll() is not None
    assert verdict("reasoning_gym", "<answer>94*4 - 61 - 6</answer>", ENTRY).strict
