"""The scorers math and math_paper: equal answers have one key, different ones do not, nothing hangs."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt.errors import UserError
from randopt.score import judge_all
from randopt.tasks import scorers
from randopt.tasks.items import make_items
from randopt.tasks.scorers import NO_ANSWER, math, math_form
from randopt.tasks.spec import load_task

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


def keys(*answers):
    return math._keys(answers, hopeless=None)


def lenient(answer, reference):
    return math.score(rf"So it is \boxed{{{answer}}}", reference).lenient


# The public code's verdicts.


@pytest.mark.parametrize(
    "case",
    [json.loads(line) for line in (DATA / "scoring_cases_math.jsonl").read_text("utf-8").splitlines()],
    ids=lambda case: case["id"],
)
def test_paper_reproduces_the_public_verdicts(case):
    found = scorers.resolve("math", "paper").score(case["response"], case["ground_truth"])
    assert found.reward == case["reward"]
    assert found.vote_key == (case["vote"] or None)
    assert found.lenient == found.strict == case["vote_correct"]


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("#### 5", "5", (0.0, None)),  # what the prompt asks for is not looked for
        (r"\boxed{2\pi}", "2", (1.0, r"2\pi")),
        (r"\boxed{x^2+1}", "2x+1", (1.0, "x^2+1")),
        (r"\boxed{3} or \boxed{4}", "4", (1.0, "4")),
        (r"\boxed{\text{odd}}", r"\text{even}", (0.0, r"\text{odd}")),
        (r"\boxed{5}" + " and on." * 70 + " So 6", "6", (1.0, "6")),  # only 500 characters count
        (r"\boxed{1e400}", "2", (0.0, "1e400")),
        (r"\boxed{nan}", "2", (0.0, "nan")),
        ("", "5", (0.0, None)),
    ],
)
def test_paper_beyond_the_given_rows(response, reference, expected):
    found = math.paper(response, reference)
    assert (found.reward, found.vote_key) == expected


# One key for equal answers.

EQUAL = [
    ["0.5", "1/2", r"\frac{1}{2}", r"\dfrac12", r"\frac12", r"\tfrac{1}2", "$.5$", r"\frac{\sqrt{4}}{4}",
     r"x=\frac12", r"2^{-1}"],
    ["-1/2", r"-\frac12", r"\frac{-1}{2}", "\u22120.5"],
    ["2", "2.0", r"\sqrt{4}", "2 cm", r"2\text{ inches}", r"\$2", "2 dollars", r"2^\circ", "2 degrees",
     r"\log_3 9", r"\{2\}"],
    ["1234", "1,234", r"1{,}234", r"1,\!234", r"1\,234", r"\$1,234.00"],
    ["3/2", r"1\frac{1}{2}", r"1 \frac12", "1.5"],
    ["1/6", r"0.1\overline{6}"],
    ["120000", r"1.2 \times 10^5", "120,000", r"5! \cdot 1000"],
    [r"2\pi", "2pi", "2*pi", "2π", r"\pi+\pi"],
    [r"\frac{\sqrt2}{2}", r"\frac{1}{\sqrt{2}}", "sqrt(2)/2", r"\sin 45^\circ", r"\cos\frac{\pi}{4}"],
    [r"\sqrt{2}-1", r"\frac{1}{1+\sqrt2}"],
    ["3+4i", "4i+3", r"(2+i)^2"],
    ["x^2+1", "1+x^2", "x**2+1", r"\frac{x^3+x}{x}", "f(x) = x^2 + 1", "x*x+1"],
    [r"\frac{x+1}{x-1}", "(x+1)/(x-1)", r"\frac{2x+2}{2x-2}", r"1+\frac{2}{x-1}"],
    [r"2\cdot 3^{n-1}", r"\frac{2}{3} \cdot 3^n", "a_n = 2*3^(n-1)"],
    ["x+y=5", "2x+2y=10", "y+x-5=0"],
    ["2,3", "3, 2", r"\{2,3\}", "2 and 3", r"x=2 \text{ or } x=3", "3 or 2", r"2 \text{ and } 3"],
    [r"1\pm\sqrt2", r"1+\sqrt2, 1-\sqrt2"],
    ["(0,1)", r"\left(0,\,1\right)", "0<x<1", r"x \in (0,1)", "1 > x > 0"],
    ["[0,1)", r"0 \le x < 1", r"1 > t \geq 0"],
    [r"(5,\infty)", "x > 5", "5 < x", r"(5, +\infty)"],
    [r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)", r"x<2 \text{ or } x>3"],
    [r"\binom{n}{2}", r"\frac{n(n-1)}{2}", r"\frac{n^2-n}{2}"],
    [r"\begin{pmatrix}1 & 2\\3 & 4\end{pmatrix}", r"\begin{bmatrix} 1&2\\ 3& \frac{8}{2} \end{bmatrix}"],
    [r"\text{Clara}", "Clara", r"\textbf{clara}", "clara."],
    ["B", "(B)", r"\text{(B)}", r"\textbf{(B)}"],
    ["102_3", "102_{3}"],
    ["10%", r"10\%", "10 percent"],
]  # fmt: skip

DIFFERENT = [
    ("-1/2", "1/2"),
    ("x^2+1", "2x+1"),
    (r"2\pi", "2"),
    ("(0,1)", "[0,1)"),
    ("(0,1)", "(1,0)"),
    ("(2,3)", "2,3"),
    (r"3\sqrt2", "(3,2)"),
    ("0.333", "1/3"),
    (r"\sqrt{2}", "1.41421356"),
    ("|x|", "x"),
    (r"\sqrt{x^2}", "x"),
    ("2x", "2t"),
    ("3+4i", "3-4i"),
    ("x+y=5", "x-y=5"),
    ("10%", "1/100"),
    ("102_3", "102"),
    ("A", "B"),
    (r"\text{even}", r"\text{odd}"),
    ("even", "odd"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("x=1, y=2", "x=2, y=1"),
    ("1, 1, 2", "1, 2, 3"),
    ("12", "1,2"),
    ("3:4", "4:3"),
]


@pytest.mark.parametrize("spellings", EQUAL, ids=lambda spellings: spellings[0])
def test_equal_answers_have_one_key(spellings):
    found = dict(zip(spellings, keys(*spellings), strict=True))
    assert len(set(found.values())) == 1, found


def test_no_two_of_the_answers_above_share_a_key():
    found = keys(*(spellings[0] for spellings in EQUAL))
    assert len(set(found)) == len(EQUAL)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_do_not(one, other):
    assert len(set(keys(one, other))) == 2
    assert not lenient(one, other) and not lenient(other, one)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("50%", "50"), ("50", r"50\%"), ("0.5", r"50\%"), (r"50\%", r"\frac12"), ("x+y=5", "5"), ("m+n=17", "17"), (7, 7)],
)
def test_answers_that_are_right_with_another_key(answer, reference):
    assert lenient(answer, reference)


@pytest.mark.parametrize(
    ("key", "answers"),
    [
        ("1/2", ["0.5"]),
        ("{-2, 8}", ["8, -2"]),
        ("(3, 1.57079632679489661923132169164)", [r"\left( 3, \frac{\pi}{2} \right)"]),
        ("[4, 0; 0, 9]", [r"\begin{pmatrix} 4 & 0 \\ 0 & 9 \end{pmatrix}"]),
        ("x**2 + 2*x - 3", ["(x-1)(x+3)"]),
        ("no solution", [r"\text{No solution}", "no solution"]),
        ("(-oo, 2) ∪ (3, oo)", [r"(3,\infty)\cup(-\infty,2)"]),
    ],
)
def test_keys_can_be_read(key, answers):
    assert keys(*answers) == [key] * len(answers)


def test_our_verdicts_are_those_of_math_verify():
    """Where verify() of the library says that two spellings are equal, exactly, so do we."""
    from math_verify import parse, verify

    pairs = [("1/2", r"\frac{2}{4}"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2-1", "(x-1)(x+1)"), ("(1,2)", "(1, 2)")]
    pairs += [(r"\frac{\pi}{3}", r"\pi/3"), ("[0,1)", "(0,1)"), ("-3", "3"), (r"\{1,2\}", r"\{2,1\}"), ("3x", "3y")]
    for one, other in pairs:
        read = [parse(f"${text}$", parsing_timeout=None) for text in (one, other)]
        assert lenient(one, other) == verify(*read, timeout_seconds=None), (one, other)


# Where the answer stands.


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("so\n#### 42", (1.0, True, True, "42")),
        ("so\n#### $42$", (1.0, True, True, "42")),
        (r"so \boxed{42}.", (1.0, True, True, "42")),
        ("#### 42\nI hope this helps.", (1.0, False, True, "42")),
        (r"\boxed{41}, no, wait: #### 42", (1.0, True, True, "42")),
        (r"#### see below" + "\n" + r"$$\boxed{42}$$", (1.0, True, True, "42")),
        (r"First \boxed{41}. Then \boxed{42}.", (1.0, True, True, "42")),
        ("The answer is 42 because 6 x 7 = 42.", (1.0, False, True, "42")),
        ("The final answer is: **$x = 42$**.", (1.0, False, True, "42")),
        (r"Hence $x = 42$.", (1.0, False, True, "42")),
        (r"Hence \(x = 42\) for all 7.", (1.0, False, True, "42")),
        ("I get 42", (1.0, False, True, "42")),
        (r"\boxed{\frac{1}{2}", (0.0, False, False, "2")),
        (r"\boxed{}", (0.0, False, False, None)),
        ("no idea", (0.0, False, False, None)),
        ("", (0.0, False, False, None)),
    ],
)
def test_where_the_answer_stands(response, expected):
    assert math.score(response, "42") == expected


def test_several_boxes_and_formulas_are_a_list():
    assert math.score(r"$x=\boxed{2}$ or $x=\boxed{3}$.", "3,2").strict
    assert math.score(r"\boxed{2}, \boxed{3}", "2").lenient is False
    assert math.score("The answers are $2$ and $3$.", r"\{3, 2\}").lenient
    assert math.score(r"\boxed{2} is too small, and therefore not it. Then \boxed{3}", "3").lenient


@pytest.mark.parametrize("reference", [None, "", "  ", True, ["1"], {"answer": 1}, "$$", "1" * 3000])
def test_unusable_references_are_named(reference):
    with pytest.raises(UserError, match=r"(?s)scorer 'math'.*expected an answer as text"):
        math.score(r"\boxed{1}", reference)


def test_unusable_references_of_the_twin_are_named():
    with pytest.raises(UserError, match="math_paper"):
        math.paper("1", 1)


# A shard at once.

RESPONSES = [
    rf"\boxed{{{spelling}}}" for spellings in [*EQUAL, *(list(pair) for pair in DIFFERENT)] for spelling in spellings
]


def test_batch_is_score_many_times(monkeypatch):
    """Whatever was read before, and by however many workers."""
    pairs = [(response, reference) for response in RESPONSES for reference in ("1/2", r"\frac{\sqrt2}{2}")]
    at_once = math.batch(pairs)
    monkeypatch.setattr(math, "_read", {})
    assert [math.score(*pair) for pair in pairs] == at_once
    assert math.batch([]) == []


def test_the_score_step_takes_the_batch():
    texts = pl.DataFrame({"item_id": ["a", "b"], "text": ["#### 1", r"\boxed{2\pi}"], "finish_reason": ["stop"] * 2})
    found = judge_all(scorers.get("math"), texts, {"a": "1", "b": "2"})
    assert [verdict.lenient for verdict in found] == [True, False]


# Any text, in bounded time.

HOSTILE = {
    "tower": r"9^{9^{9^{9}}}",
    "powers": r"10^{10^{10}}",
    "tower of a variable": "x" + "^x" * 100,
    "tower of twos": "2" + "^{2" * 20 + "}" * 20,
    "factorial": "1000000000!",
    "factorials": "((((3!)!)!)!)!",
    "binomial": r"\binom{10^9}{5*10^8}",
    "braces": "{" * 1_000_000,
    "closing braces": "}" * 1_000_000,
    "deep": "{" * 24 + "1" + "}" * 24,
    "square roots": r"\sqrt{" * 20 + "2" + "}" * 20,
    "terms": "(x+1)^{100000}",
    "many terms": "(x+y+z+w+a+b)^{60}",
    "nested powers": "(((x+1)^9+1)^9+1)^9",
    "factors": "(1+x)^9(1+y)^9(1+z)^9(1+w)^9(1+a)^9(1+b)^9",
    "integral": r"\int_0^1 x^x dx",
    "sum": r"\sum_{k=1}^{10^9} k",
    "matrix power": r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{1000000}",
    "fractions": r"\frac{" * 20 + "1" + "}{2}" * 20,
    "digits": "9" * 1_000_000,
    "period": r"0.\overline{" + "3" * 400 + "}",
    "pm": r"\pm" * 200 + "1",
    "commas": "1," * 400,
    "code": "__import__('os').system('touch {mark}')",
    "surrogate": "\ud800\x00",
    "spaces": "1" + " " * 1900 + "2",
    "words": "1 " + "apples per " * 40 + "!",
    "bars": "|" * 400,
    "percents": "1" + "%" * 490,
    "texts": "1" + r"\text{a}" * 60,
    "nothing": r"\approx",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_get_a_verdict_in_time(name, tmp_path):
    mark = tmp_path / "mark"
    answer = HOSTILE[name].replace("{mark}", str(mark))
    start = time.perf_counter()
    found = math.score(rf"Well. \boxed{{{answer}}}", "5")
    assert time.perf_counter() - start < 10
    assert found.reward == 0 and not found.lenient
    math.paper(rf"Well. \boxed{{{answer}}}", "5")
    assert not mark.exists()
    assert math.score(r"\boxed{\sqrt{25}+0}", "5").strict  # and it still works


LONG = {
    "boxes": r"\boxed{" * 150_000,
    "closed boxes": r"\boxed{1}" * 100_000,
    "stated": "answer is " * 100_000,
    "hashes": "#### " * 200_000,
    "dollars": "$" * 1_000_000,
    "formulas": r"\(" * 500_000,
    "so": "so" * 500_000,
    "blanks": "answer is" + " " * 1_000_000,
    "newlines": "####" + "\n" * 1_000_000,
}


@pytest.mark.parametrize("name", LONG)
def test_a_megabyte_takes_less_than_a_second(name):
    math.score("1", "5")
    for scorer in (math.score, math.paper):
        start = time.perf_counter()
        scorer(LONG[name], "5")
        assert time.perf_counter() - start < 1, scorer


PIECES = st.lists(
    st.sampled_from(
        [*r"0123456789xyie+-*/^_=<>()[]{}|%$&,;:.! ", "\\", r"\frac", r"\sqrt", r"\pi", r"\{", r"\}", r"\pm", r"\le",
         r"\text{", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\cup", r"\infty", r"\in ", r"\circ", r"\boxed{",
         " and ", " or ", "cm", "\n", "#### ", "answer is ", r"\left", r"\overline", "é", "²"]
    ),
    max_size=40,
).map("".join)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(PIECES | st.text())
def test_any_text_gets_a_verdict(text):
    """And the verdict depends on the key alone: what has the reference's key is right."""
    found = math.score(text, "1/2")
    assert found.reward == found.lenient and (found.lenient or not found.strict)
    if found.vote_key is None:
        assert found == NO_ANSWER
    else:
        assert found.lenient == math_form.same(found.vote_key, "1/2")
    math.paper(text, "1/2")


def _in_a_child(queue):
    queue.put(math.score(r"\boxed{\sqrt{9}+1}", "4").strict)


def test_a_forked_process_has_workers_of_its_own():
    math.score(r"\boxed{\sqrt{9}}", "3")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,))
    child.start()
    assert queue.get(timeout=60)
    child.join()
    assert math.score(r"\boxed{\sqrt{16}+2}", "6").strict


def test_a_dead_worker_is_replaced():
    math.score(r"\boxed{\sqrt{7}+1}", "4")
    worker = next(worker for worker in math._POOL.workers if worker.process)
    os.kill(worker.process.pid, 9)
    worker.process.wait()
    assert math.score(r"\boxed{\sqrt{36}+1}", "7").strict


# The tasks.


@pytest.mark.parametrize("name", ["math500", "olympiadbench"])
def test_tasks_from_local_files(name):
    part = {"math500": "test", "olympiadbench": "train"}[name]
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()]
    entry = {
        "name": name,
        "source": {"file": {part: str(DATA / f"{name}.jsonl")}},
        "splits": {"select": 4, "confirm": {"start": 4, "size": 4}, "test": {"start": 8, "size": len(rows) - 8}},
    }
    spec = load_task(entry, ROOT / "config" / "tasks")
    frame = pl.concat(make_items(spec, ROOT).values())
    references = [json.loads(reference) for reference in frame["reference"]]
    assert len(references) == len(rows) and not any(reference.startswith("$") for reference in references[1:4])
    for row, messages, reference in zip(rows, frame["messages"], references, strict=True):
        assert (row.get("problem") or row["question"]) in messages[0]["content"] and "####" in messages[0]["content"]
        assert math.score(f"So.\n#### {reference}", reference).strict, reference
        assert math.score(rf"So \[\boxed{{{reference}}}\]", reference).strict, reference
        assert not math.score("So.\n#### 1000", reference).lenient
    if name == "olympiadbench":
        assert references[0] == "0, 2, -2" and references[9] == "3,-1"
        assert math.score(r"\boxed{-2, 0, 2}", references[0]).strict


def test_paper_sizes():
    for name, part, rows in (("math500", "test", 500), ("olympiadbench", "train", 674)):
        splits = load_task(name, ROOT / "config" / "tasks").splits
        assert splits["select"] == {"part": part, "start": 0, "size": 200}
        assert splits["confirm"]["start"] == 200
        assert splits["test"]["start"] == splits["confirm"]["start"] + splits["confirm"]["size"]
        assert splits["test"]["start"] + splits["test"]["size"] == rows


@pytest.mark.parametrize("given", [[], None, [3], ["$$"]])
def test_a_row_without_answer_is_named(given, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"Q{n}", "final_answer": given}) + "\n" for n in range(3)))
    splits = {name: {"start": start, "size": 1} for start, name in enumerate(("select", "confirm", "test"))}
    entry = {"name": "olympiadbench", "source": {"file": {"train": str(path)}}, "splits": splits}
    with pytest.raises(UserError, match="row 0 of part 'train'"):
        make_items(load_task(entry, ROOT / "config" / "tasks"), ROOT)
