"""Scorers for tasks of one's own: the named ones with their options, and file.py:function."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt.errors import UserError
from randopt.tasks import scorers
from randopt.tasks.scorers import NO_ANSWER, own
from randopt.tasks.scorers.answer import final, normal


def judged(scorer, response, reference):
    text = scorer if isinstance(scorer, str) else json.dumps(scorer)
    return scorers.get(text).score(response, reference)


@pytest.mark.parametrize(
    ("response", "answer", "tagged"),
    [
        ("So <answer> Paris\n</answer> I think", "Paris", True),
        ("<answer></answer> \\boxed{x^2}", "x^2", False),
        ("1\n#### 42 apples\nmore", "42 apples", False),
        ("The answer is: **Paris**.\nBye", "Paris**.", False),
        ("one\ntwo\n\n", "two", False),
        ("", "", False),
    ],
)
def test_where_the_answer_is(response, answer, tagged):
    assert final(response) == (answer, tagged)


@pytest.mark.parametrize(
    ("scorer", "response", "reference", "expected"),
    [
        ("exact", "Paris", "Paris", (1.0, True, True, "paris")),
        ("exact", " paris. ", "Paris", (1.0, False, True, "paris")),
        ("exact", "It is in France.\nAnswer: **Paris**.", "Paris", (1.0, False, True, "paris")),
        ("exact", "Paris, or <answer>Rome</answer>", "Paris", (0.0, False, False, "rome")),
        ("exact", "<answer>Rome</answer>", ["Roma", "Rome"], (1.0, True, True, "rome")),
        ("exact", "True", True, (1.0, True, True, "true")),
        ("exact", "first\nsecond", "first\nsecond", (1.0, True, True, "first second")),
        ("exact", "not Paris", "Paris", (0.0, False, False, "not paris")),
        ("exact", "  ", "Paris", NO_ANSWER),
        ("exact", "x" * 5000, "Paris", NO_ANSWER),
        ("numeric", "42", "42", (1.0, True, True, "42")),
        ("numeric", "The answer is 42. I took 3 steps", 42, (1.0, False, True, "42")),
        ("numeric", "<answer>1.5e3</answer>", 1500.0, (1.0, True, True, "1500")),
        ("numeric", r"so \boxed{3 \times 10^{-3}}", "0.003", (1.0, False, True, "3/1000")),
        ("numeric", "0.00001", 1e-05, (1.0, True, True, "1/100000")),
        ("numeric", "3.15", "3.14", (0.0, False, False, "63/20")),
        ({"name": "numeric", "tolerance": 0.01}, "3.15", "3.14", (1.0, True, True, "63/20")),
        ({"name": "numeric", "tolerance": 0.01}, "3.1501", "3.14", (0.0, False, False, "31501/10000")),
        ({"name": "numeric", "relative": 0.1}, "109", -100, (0.0, False, False, "109")),
        ({"name": "numeric", "relative": 0.1}, "-109", -100, (1.0, True, True, "-109")),
        ("numeric", "none", "3.14", NO_ANSWER),
        ({"name": "regex", "pattern": r"Result: (\w+)"}, "Result: A, Result: b", "B", (1.0, False, True, "b")),
        ({"name": "regex", "pattern": r"\b[0-9]{4}\b"}, "in 1998 or 2001", 2001, (1.0, True, True, "2001")),
        ({"name": "regex", "pattern": r"x(y)?"}, "x", "y", NO_ANSWER),
        ({"name": "regex", "pattern": r"Result: (\w+)"}, "B", "B", NO_ANSWER),
        ("choice", "B", "B", (1.0, True, True, "B")),
        ("choice", "b) because of the weather", "B", (1.0, False, True, "B")),
        ("choice", "The answer is (C), a dog.", 2, (1.0, False, True, "C")),
        ("choice", "A dog is the answer", "A", NO_ANSWER),
        ("choice", "I would say (D)", "D", (1.0, False, True, "D")),
        ("choice", "(A) or (D)", "D", NO_ANSWER),
        ("choice", "Option E.", "D", (0.0, False, False, "E")),
        ({"name": "choice", "choices": ["yes", "no"]}, "Yes, it is snowing.", "yes", (1.0, False, True, "yes")),
        ({"name": "choice", "choices": ["yes", "no"]}, "It is snow.", "no", NO_ANSWER),
        ({"name": "choice", "choices": ["yes", "no"]}, "yes and no", "no", NO_ANSWER),
        ({"name": "choice", "choices": [1, 2, 3]}, "2", 2, (1.0, True, True, "2")),
        ("expression", "<answer>2 × 3 + 1 = 7</answer>", 7, (1.0, False, True, "7")),
        ("expression", "2*3+1", "7", (1.0, True, True, "7")),
        ("expression", "(1/3)*3", 1, (1.0, True, True, "1")),
        ("expression", "2*3+1", {"numbers": [3, 2, 1], "target": 7}, (1.0, True, True, "7")),
        ("expression", "7", {"numbers": [3, 2, 1], "target": 7}, NO_ANSWER),
        ("expression", "9**9**9", 1, NO_ANSWER),
        ("expression", "__import__('os')", 1, NO_ANSWER),
    ],
)
def test_verdicts(scorer, response, reference, expected):
    assert judged(scorer, response, reference) == expected


@pytest.mark.parametrize(
    ("scorer", "reference", "expected"),
    [
        ("exact", None, "expected text"),
        ("exact", [], "expected text"),
        ("exact", {"a": 1}, "expected text"),
        ("numeric", "many", "expected a number"),
        ("choice", "F", "expected one of A, B, C, D, E"),
        ("choice", 5, "expected one of A"),
        ({"name": "choice", "choices": [1, 2, 3]}, 0, "expected one of 1, 2, 3"),
        ("expression", {"numbers": [1]}, "expected"),
        ("expression", "x", "expected a number"),
        ("uspto50k", 11, "a class from 1 to 10"),
        ("uspto50k", True, "a class from 1 to 10"),
        ("rocstories", [0, 1, 2, 3, 3], "numbers 0 to 4"),
        ("rocstories", "01234", "numbers 0 to 4"),
    ],
)
def test_unusable_references_are_named(scorer, reference, expected):
    with pytest.raises(UserError, match=f"scorer '.*{expected}"):
        judged(scorer, "", reference)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exakt", "'exakt' is unknown; choose one of number,.*file.py:function"),
        ('{"name": "exakt"}', "'exakt' is unknown"),
        ('{"pattern": "x"}', "has no name"),
        ("{", "is not JSON"),
        ("regex", "the key 'pattern' is missing"),
        ('{"name": "regex", "pattern": "("}', "pattern: '\\(' was given, expected a regular expression"),
        ('{"name": "regex", "patern": "x", "pattern": "x"}', "unknown key 'patern'.*did you mean 'pattern'"),
        ('{"name": "numeric", "tolerance": -1}', "tolerance: -1 was given, expected a number, 0 or more"),
        ('{"name": "choice", "choices": ["A"]}', "expected a list of the labels"),
        ('{"name": "gsm8k", "tolerance": 1}', "unknown key 'tolerance'"),
    ],
)
def test_mistakes_in_a_scorer(text, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        scorers.get(text)


def test_options_are_part_of_the_scorers_name():
    names = {scorers.get(json.dumps({"name": "regex", "pattern": pattern})).name for pattern in ("a", "b", "b")}
    assert len(names) == 2 and all(name.startswith("regex-") for name in names)
    assert scorers.get("numeric").name == "numeric"


def test_a_pattern_that_backtracks_for_ever_is_stopped():
    start = time.perf_counter()
    assert judged({"name": "regex", "pattern": r"(a|aa)+\d$"}, "a" * 10_000, "x") == NO_ANSWER
    assert time.perf_counter() - start < 5


GENERIC = [
    ("exact", "Paris"),
    ("numeric", "3/4"),
    ({"name": "regex", "pattern": "(.*)"}, "x"),
    ("choice", "B"),
    ({"name": "choice", "choices": ["yes", "no"]}, "no"),
    ("expression", "7"),
    ("uspto50k", 3),
    ("uspto50k_paper", 3),
    ("rocstories", [1, 2, 4, 3, 0]),
    ("rocstories_paper", [1, 2, 4, 3, 0]),
]
TAGS = ["<answer>", "</answer>", "\\boxed{", "}", "####", "answer is", "\n", " ", ",", ".", "(", ")", "**", "class"]
WORDS = [*"ABCDEabcde", "10", "3", "1e9", "e", "\u0663", "\x00", "\ud800", "-", "/", "yes", "no", "then", "×10^"]
PIECES = st.lists(st.sampled_from([*TAGS, *WORDS]), max_size=30).map("".join)


@settings(max_examples=150, deadline=1000)
@given(PIECES | st.text())
def test_any_text_gets_a_verdict(text):
    for scorer, reference in GENERIC:
        found = judged(scorer, text, reference)
        assert 0 <= found.reward <= 1
        assert found.lenient or not found.strict
        if found.vote_key is not None:
            assert found.vote_key and found.vote_key.encode()


@pytest.mark.parametrize(
    "piece", ["A,", "A ", "a b c d ", "<answer>", "answer is ", "3 ", "1e9", "(", "class ", "\\boxed{"]
)
def test_a_megabyte_takes_less_than_a_second(piece):
    for scorer, reference in GENERIC:
        start = time.perf_counter()
        judged(scorer, piece * (1_000_000 // len(piece)), reference)
        assert time.perf_counter() - start < 1.5, scorer


# USPTO-50k and ROCStories; the public verdicts on the given rows are checked with all others.


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer>3</answer>", (1.0, True, True, "3")),
        ("<answer> Class 3 </answer>", (1.0, False, True, "3")),
        ("It looks like class 3, with 2 steps", (1.0, False, True, "3")),
        ("10 atoms. The class is 3.", (1.0, False, True, "3")),
        ("<answer>12</answer>", NO_ANSWER),
        ("<answer>3.5</answer>", NO_ANSWER),
        ("<answer>10</answer>", (0.0, False, False, "10")),
        ("<answer>5</answer> no, <answer>3</answer>", (1.0, True, True, "3")),
        ("C10H3 of 2-methyl", NO_ANSWER),
    ],
)
def test_uspto50k(response, expected):
    assert judged("uspto50k", response, "3") == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<answer> 3 </answer>", (1.0, True, True, "3")),
        ("<ANSWER>4</ANSWER><answer>3</answer><answer>x</answer>", (1.0, True, True, "3")),
        ("3.5 g of it", (0.0, False, False, "5")),
        ("100 of 30", NO_ANSWER),
        ("", NO_ANSWER),
    ],
)
def test_paper_uspto50k_beyond_the_given_rows(response, expected):
    assert judged("uspto50k_paper", response, "3") == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B,C,E,D,A", (1.0, True, True, "BCEDA")),
        ("b, c, e, d, a", (1.0, False, True, "BCEDA")),
        ("<answer>B, C, E, D, A</answer>", (1.0, True, True, "BCEDA")),
        ("e.g., B,A,D,E,C. My order: B,C,E,D,A", (1.0, False, True, "BCEDA")),
        ("First B, then C, then E, then D, then A", (1.0, False, True, "BCEDA")),
        ("B -> C -> E -> D -> A", (1.0, False, True, "BCEDA")),
        ("1. B\n2. C\n3. E\n4. D\n5. A", (1.0, False, True, "BCEDA")),
        ("BCEDA", (1.0, False, True, "BCEDA")),
        ("A,B,C,D,E", (0.32, False, False, "ABCDE")),
        ("A,D,E,C,B", (0.12, False, False, "ADECB")),
        ("A,A,B,C,D", NO_ANSWER),
        ("B,C,E,D", NO_ANSWER),
        ("I cannot decide", NO_ANSWER),
    ],
)
def test_rocstories(response, expected):
    found = judged("rocstories", response, [1, 2, 4, 3, 0])
    assert found.reward == pytest.approx(expected[0]) and found[1:] == expected[1:]


# file.py:function.


@pytest.fixture
def write(tmp_path):
    def write(body: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(body)
        return f"{tmp_path / name}:judge"

    return write


def test_what_a_function_may_return(write):
    text = write(
        "from typing import NamedTuple\n"
        "import helper\n"
        "class V(NamedTuple):\n    reward: float\n    vote_key: str\n"
        "def judge(response, reference):\n"
        "    return {'b': True, 'f': 0.25, 'd': dict(reward=0.5, lenient=True, vote_key=helper.KEY),\n"
        "            't': V(1.0, 'k')}[response]\n"
    )
    (Path(text.rpartition(":")[0]).parent / "helper.py").write_text("KEY = 'h'\n")
    assert judged(text, "b", None) == (1.0, True, True, "b")
    assert judged(text, "f", None) == (0.25, False, False, "f")
    assert judged(text, "d", None) == (0.5, True, True, "h")
    assert judged(text, "t", None) == (1.0, True, True, "k")


def test_an_edited_file_is_another_scorer(write):
    one = scorers.get(write("def judge(response, reference):\n    return True\n"))
    two = scorers.get(write("def judge(response, reference):\n    return False\n"))
    assert one.name.startswith("mine.judge-") and one.name != two.name and one.sandboxed
    with pytest.raises(UserError, match=r"sandboxed|processes of its own"):
        _raced(write("def judge(response, reference):\n    return True\n"))


def _raced(scorer):
    from dataclasses import replace

    from randopt import experiment
    from randopt.tasks.spec import load_task

    task = replace(load_task("times_table", Path(__file__).parents[2] / "config" / "tasks"), scorer=scorer)
    experiment._race({"search": {"race": {"mode": "lossless"}}}, task)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def judge(:\n", r"mine.py, line 1: .*no valid Python"),
        ("def other(response, reference):\n    pass\n", "has no function 'judge', only other"),
    ],
)
def test_a_file_that_cannot_be_used(write, body, message):
    with pytest.raises(UserError, match=message):
        scorers.get(write(body))
    with pytest.raises(UserError, match="cannot be read"):
        scorers.get("/nowhere/mine.py:judge")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import nothing_of_this_name\ndef judge(a, b):\n    pass\n", r"mine.py, line 1: ModuleNotFoundError"),
        ("def judge(response, reference):\n\n    return 1 / 0\n", r"mine.py, line 3: ZeroDivisionError"),
        ("def judge(response, reference):\n    return 2\n", "returned 2, expected True or False"),
        ("def judge(response, reference):\n    return float('nan')\n", "returned nan, expected"),
        ("def judge(response, reference):\n    return {'rewards': 1}\n", "returned .*expected"),
        (
            "def judge(a, b):\n    return {'reward': 1, 'strict': True, 'lenient': False}\n",
            "set lenient",
        ),
        ("def judge(response):\n    return True\n", "TypeError"),
    ],
)
def test_a_function_that_fails_is_told_with_its_line(write, body, message):
    with pytest.raises(UserError, match=message):
        judged(write(body), "x", "y")


def test_a_text_that_hangs_or_ends_the_function_gets_nothing(write, monkeypatch):
    monkeypatch.setattr(own, "SECONDS", 1.0)
    text = write(
        "import os\ndef judge(response, reference):\n"
        "    if response == 'exit':\n        os._exit(0)\n"
        "    return eval(response) == reference\n"
    )
    assert judged(text, "6 * 7", 42) == (1.0, True, True, "6 * 7")
    for hostile in ("9**9**9", "exit"):
        start = time.perf_counter()
        assert judged(text, hostile, 42) == NO_ANSWER
        assert time.perf_counter() - start < 5
    assert judged(text, "6 * 7", 42).strict, "and it still works"


def test_normal():
    assert normal(" **Paris**. ") == normal("paris") == "paris"
    assert normal("-5") == "-5" and normal("...") == "..." and normal("\uff21") == "a"
