"""Model-written programs as answers: what passes, what only pretends to, what votes together."""

import json
import time
from pathlib import Path

import polars as pl
import pytest

from randopt.errors import UserError
from randopt.score import judge_all
from randopt.tasks import scorers
from randopt.tasks.items import make_items
from randopt.tasks.scorers import NO_ANSWER, assertions, code, values
from randopt.tasks.spec import load_task
from tests.unit.sandboxes import need_bubblewrap

DATA = Path(__file__).parents[1] / "data"
ROOT = DATA.parents[1]
CASES = [json.loads(line) for line in (DATA / "mbpp_cases.jsonl").read_text("utf-8").splitlines()]
ROWS = [json.loads(line) for line in (DATA / "mbpp.jsonl").read_text("utf-8").splitlines()]
ADD = {
    "code": "def add(a,b):\n    return a+b",
    "test_list": ["assert add(1,2)==3", "assert add(-1,1)==0"],
    "test_setup_code": "",
}
GOOD = "def add(a, b):\n    return a + b"
KEY = 'returns ["number","0x3"], ["number","0x0"]'


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(code, "CPU_SECONDS", 1)


def verdict(response, reference=ADD, scorer="mbpp"):
    need_bubblewrap()
    return scorers.get(scorer).score(response, reference)


def tagged(program):
    return f"<answer>\n{program}\n</answer>"


# The public code's verdicts.


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_paper_reproduces_the_public_verdicts(case, monkeypatch):
    monkeypatch.setattr(code, "PAPER_SECONDS", 2.0)
    found = verdict(case["response"], case["ground_truth"], scorers.resolve("mbpp", "paper").name)
    assert found == (case["reward"], case["reward"] >= 1, case["vote_correct"], case["vote"] or None)


@pytest.mark.parametrize(
    ("response", "passes", "key"),
    [
        (f"```python\n{GOOD}\n```", True, GOOD),
        (f"```\nx\n```\nand\n```python\n{GOOD}\n```", True, GOOD),
        (f"```python\n{GOOD}", False, None),
        ("<answer></answer>", False, None),
        (tagged("import sys\nsys.exit(0)"), False, "import sys\nsys.exit(0)"),
        (tagged("while True:\n    try:\n        while True: pass\n    except BaseException: pass"), False, ...),
        (tagged("def add(a, b):\n    return a"), False, "def add(a, b):\n    return a"),
        (tagged("x = '\ud800'"), False, "x = '?'"),
    ],
)
def test_paper_beyond_the_given_rows(response, passes, key, monkeypatch):
    monkeypatch.setattr(code, "PAPER_SECONDS", 2.0)
    found = verdict(response, scorer="mbpp_paper")
    assert found[:3] == (float(passes), passes, passes)
    assert key is ... or found.vote_key == key


# Where the program is looked for.


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (tagged(GOOD), (1.0, True, True, KEY)),
        (f"I think <answer> {GOOD} </answer> is it.", (1.0, True, True, KEY)),
        (tagged("def add(a, b): return 0") + tagged(GOOD), (1.0, True, True, KEY)),
        (tagged(f"```python\n{GOOD}\n```"), (1.0, False, True, KEY)),
        (tagged(f"Here:\n```\n{GOOD}\n```\nDone."), (1.0, False, True, KEY)),
        (f"<answer>\n{GOOD}", (1.0, False, True, KEY)),
        (f"```python\n{GOOD}", (1.0, False, True, KEY)),
        (f"```py\nadd\n```\nBetter:\n```Python3 \n{GOOD}\n```\nDone.", (1.0, False, True, KEY)),
        (f"1. Like this:\n   ```\n   {GOOD.replace(chr(10), chr(10) + '   ')}\n   ```", (1.0, False, True, KEY)),
        (GOOD, (1.0, False, True, KEY)),
        (f"Sure! {GOOD}", (0.0, False, False, None)),
        ("", NO_ANSWER),
        (tagged(""), NO_ANSWER),
        (tagged("x = 1\n" * 200_000), NO_ANSWER),
    ],
)
def test_extraction(response, expected):
    assert verdict(response) == expected


@pytest.mark.parametrize("text", ["```" * 300_000, "<answer>" * 100_000, "``` " * 200_000, "```" + " " * 900_000])
def test_extraction_is_linear(text):
    start = time.perf_counter()
    code._extract(text)
    code._paper_program(text)
    assert time.perf_counter() - start < 1


# What passes.


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"])
def test_the_solutions_pass_and_a_wrong_one_does_not(row):
    reference = {key: row[key] for key in ("code", "test_list", "test_setup_code")}
    assert verdict(tagged(row["code"]), reference)[:3] == (1.0, True, True)
    assert verdict(tagged(row["code"]), reference, "mbpp_paper")[:3] == (1.0, True, True)
    name = sorted(assertions.defined_names(row["code"]) - {"Node"})[0]
    wrong = f"{row['code']}\ndef {name}(*_): return 'wrong'"
    assert verdict(tagged(wrong), reference)[:3] == (0.0, False, False)
    assert verdict(tagged(wrong), reference, "mbpp_paper")[:3] == (0.0, False, False)


UNEARNED = {
    "__eq__": """
class A:
    def __eq__(s, o): return True
    __hash__ = None
def add(a, b): return A()
""",
    "an int's __eq__": """
class A(int):
    def __eq__(s, o): return True
    __hash__ = None
def add(a, b): return A(7)
""",
    "metaclass": """
class M(type):
    def __eq__(s, o): return True
    __hash__ = None
    __instancecheck__ = lambda s, o: True
class A(metaclass=M): pass
def add(a, b): return A
""",
    "builtins": """
import builtins
builtins.eval = builtins.compile = builtins.isinstance = lambda *a, **k: True
def add(a, b): return None
""",
    "the worker": """
import __main__
__main__.reply = lambda q: {'value': True}
__main__.tree = lambda *a: ['int', 'any']
def add(a, b): return 1
""",
    "serialiser": """
import json
json.dumps = lambda *a, **k: '{"value": ["any", ["number"]]}'
def add(a, b): return 1
""",
    "modules": """
import sys, types
for name in ('json', 'ast', 'os', 'types'):
    sys.modules[name] = types.ModuleType(name)
import __main__
__main__.json = None
def add(a, b): return 1
""",
    "forged lines": """
import os
for fd in range(64):
    for line in (b'{"ready": true}\\n', b'{"passed": true}\\n' * 9,
                 b'{"value": ["bool", true]}\\n' * 9):
        try: os.write(fd, line)
        except OSError: pass
os._exit(0)
""",
    "exit": """
import sys
def add(a, b): sys.exit(0)
""",
    "exit at once": """
import os
def add(a, b): os._exit(0)
""",
    "loop": """
def add(a, b):
    while True:
        try:
            while True: pass
        except: pass
""",
    "assertions off": """
__debug__ and 1
def add(a, b): return None
""",
    "frames": """
import sys, gc
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in [*frame.f_locals.values()]:
            if isinstance(value, dict) and 'test_list' in value: return eval(value['test_list'][0])
        frame = frame.f_back
""",
    "not a number": """
class A(float):
    pass
def add(a, b): return A('nan')
""",
    "only one test": "def add(a, b): return 3",
    "no such name": "def plus(a, b): return a + b",
}


@pytest.mark.parametrize("name", UNEARNED)
def test_nothing_passes_unearned(name):
    start = time.monotonic()
    found = verdict(tagged(UNEARNED[name]))
    assert found[:3] == (0.0, False, False)
    assert time.monotonic() - start < 5


HUNT = """
import ctypes, gc, inspect, io, os, sys
def texts():
    for thing in gc.get_objects():
        held = thing.values() if type(thing) is dict else thing if type(thing) in (list, tuple) else ()
        yield from (text for text in held if type(text) is str)
    frame = sys._getframe()
    while frame:
        yield from (str(value) for value in frame.f_locals.values())
        frame = frame.f_back
    yield from os.environ.values()
    for folder, _, names in os.walk("/"):
        if folder.startswith(("/usr", "/dev", sys.base_prefix)): continue
        for name in names:
            try: yield open(os.path.join(folder, name), errors="replace").read()
            except OSError: pass
    for fd in range(64):
        try: yield os.pread(fd, 10**6, 0).decode(errors="replace")
        except OSError: pass
    for base in ("/proc/self/mem", "/proc/1/mem", "/proc/1/cmdline", "/proc/self/cmdline"):
        try: yield open(base, errors="replace").read()
        except OSError: pass
def secret(n):
    mark = "the-answer-" + "is-"
    for text in texts():
        at = text.find(mark)
        if at >= 0 and text[at + len(mark):at + len(mark) + 4].isdigit():
            return text[at:at + len(mark) + 4]
"""


def test_the_expected_value_is_nowhere_to_be_found(monkeypatch):
    monkeypatch.setattr(code, "CPU_SECONDS", 5)
    monkeypatch.setenv("ANSWER", "the-answer-is-4711")
    reference = {
        "code": "def secret(n): return 'the-answer-is-4711'",
        "test_list": ["assert secret(1) == 'the-answer-is-4711'", "assert 'the-answer-is-4711' in [secret(1)]"],
    }
    assert verdict(tagged(HUNT), reference) == (0.0, False, False, "returns null, null")
    # the hunt finds what is there: in the program itself it passes
    assert verdict(tagged(f"kept = ['the-answer-is-4711']\n{HUNT}"), reference).strict
    assert verdict(tagged(reference["code"]), reference).strict


def test_colliding_keys_cost_the_program_not_us():
    collide = "def add(a, b):\n    return {k * (2**61 - 1): 0 for k in range(4000)}"
    many = "[['int', hex(k * (2**61 - 1))] for k in range(1, 40000)]"
    forged = f"import __main__\n__main__.tree = lambda *a: ['set', {many}]\ndef add(a, b): return 1"
    start = time.monotonic()
    for program in (collide, forged):
        assert not verdict(tagged(program)).lenient
    assert verdict(tagged(forged), {**ADD, "test_list": ["assert abs(add(1, 2) - 3) < 1"]}).reward == 0
    assert time.monotonic() - start < 10


# Votes.


def test_programs_that_behave_alike_vote_together():
    other = "def add(x, y):\n    for _ in range(abs(y)):\n        x += 1 if y > 0 else -1\n    return float(x)"
    assert verdict(tagged(other)).vote_key == verdict(tagged(GOOD)).vote_key == KEY
    assert verdict(tagged("def add(a, b): return a")).vote_key != KEY
    partly = verdict(tagged("def add(a, b):\n    if a < 0: raise ValueError\n    return a + b"))
    assert partly == (0.0, False, False, 'returns ["number","0x3"], nothing')


def test_where_nothing_returns_the_syntax_votes():
    first = verdict(tagged("def add(a, b):\n    raise ValueError  # ?"))
    assert first.vote_key.startswith("program ") and len(first.vote_key) <= 200
    assert first.vote_key == verdict(tagged("def add( a,b ):\n  'Adds.'\n  raise ValueError")).vote_key
    assert first.vote_key != verdict(tagged("def add(a, b):\n    raise TypeError")).vote_key
    assert verdict(tagged("no program")).vote_key is None


def test_a_pool_gives_the_same_verdicts():
    need_bubblewrap()
    programs = [GOOD, "def add(a, b): return 3", "def add(a, b): raise ValueError", "no program", GOOD + "\n#"] * 3
    texts = pl.DataFrame(
        [("select-00000", tagged(program) + "\n" * n, "stop") for n, program in enumerate(programs)],
        schema=["item_id", "text", "finish_reason"],
        orient="row",
    )
    one, many = (judge_all(scorers.get("mbpp"), texts, {"select-00000": ADD}, threads) for threads in (1, 8))
    assert one == many and one[0].strict and not one[1].lenient


def test_an_error_in_the_pool_names_the_item():
    texts = pl.DataFrame({"item_id": ["test-00001"], "text": [GOOD], "finish_reason": ["stop"]})
    with pytest.raises(UserError, match=r"mbpp failed on item test-00001.*expected"):
        judge_all(scorers.get("mbpp"), texts, {"test-00001": {"code": 1}}, 2)


# Values, without running anything.


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, True), (1, 1.0), (0.5, __import__("fractions").Fraction(1, 2)), (2 + 0j, 2), ({1, 2}, {2, 1}), (-0.0, 0),
        ({1: 2, "a": 3}, {"a": 3, 1.0: 2}), (frozenset("ab"), set("ba")), (b"a", bytearray(b"a")), ([[]], [[]]),
        (float("inf"), float("inf")), ([10**5000], [10**5000]), (__import__("decimal").Decimal("0.5"), 0.5),
        (__import__("collections").Counter("aab"), {"a": 2, "b": 1}),
    ],
)  # fmt: skip
def test_what_python_calls_equal_has_one_text(left, right):
    from randopt.sandbox.worker import tree

    assert left == right and values.equal(values.canonical(tree(left)), values.canonical(tree(right)))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, "1"), ([1], (1,)), ({}, set()), ("a", b"a"), (0.1, __import__("decimal").Decimal("0.1")), (None, 0),
        (None, False), ([1, 2], [2, 1]), (0.1 + 0.2, 0.3), (float("nan"), float("nan")),
        ([float("nan")], [float("nan")]),
        ('["nan"]', "nan"), (1 + 2j, 1), ("", []), (2**53, 2**53 + 1), (2.0**53, 2**53 + 1),
    ],
)  # fmt: skip
def test_what_python_calls_different_has_two(left, right):
    from randopt.sandbox.worker import tree

    assert left != right and not values.equal(values.canonical(tree(left)), values.canonical(tree(right)))


@pytest.mark.parametrize(
    "value", [0, 0.0, "", b"", [], (), {}, set(), None, False, 1, "0", [0], (0,), {0: 0}, {0}, True, 0j]
)
def test_truth_is_pythons(value):
    from randopt.sandbox.worker import tree

    assert values.truth(values.canonical(tree(value))) == bool(value)


@pytest.mark.parametrize(
    "tree",
    [
        None, 3, [], ["int"], ["int", 3], ["int", "x"], ["other", "A"], ["list", 3], ["str", 3],
        ["dict", [[["int", "0x1"]]]],
        ["ratio", ["0x1", "0x0"]], ["ratio", ["0x" + "1" * 10**6, "0x3"]], ["float", "1" * 100], ["any", []],
        [["list"], []],
        ["bytes", "zz"], ["list", "int"], ["set", {"a": 1}],
    ],
    ids=lambda tree: str(tree)[:30],
)  # fmt: skip
def test_what_is_no_value(tree):
    with pytest.raises(values.NoValue):
        values.canonical(tree)


def test_nesting_is_bounded():
    tree = ["none", None]
    for _ in range(900):
        tree = ["list", [tree]]
    with pytest.raises(values.NoValue):
        values.canonical(tree)


# Assertions.


@pytest.mark.parametrize(
    ("test", "asked", "rest"),
    [
        ("assert f(3) == 7", ["f(3)"], {"equals": "7"}),
        ("assert 7 == f(3)", ["f(3)"], {"equals": "7"}),
        ("assert (f(g(3))) == {1, 2}, 'message'", ["f(g(3))"], {"equals": "{1, 2}"}),
        ("assert Stack().push(3).pop()[0] == 7", ["Stack().push(3).pop()[0]"], {"equals": "7"}),
        ("assert f(3)", ["f(3)"], {"truth": True}),
        ("assert not f(3)", ["f(3)"], {"truth": False}),
        ("assert set(f(3)) == {1}", ["f(3)"], {"holds": "set(value0) == {1}"}),
        ("assert f(3) == f(4)", ["f(3)", "f(4)"], {"holds": "value0 == value1"}),
        ("assert math.isclose(f(3), 1.5)", ["f(3)"], {"holds": "math.isclose(value0, 1.5)"}),
        (
            "assert f(3) != 7 and g(1) in (2, f(2))",
            ["f(3)", "g(1)", "f(2)"],
            {"holds": "value0 != 7 and value1 in (2, value2)"},
        ),
        ("assert f(3) is None", ["f(3)"], {"holds": "value0 is None"}),
        ("assert 1 < f(3) < 2", ["f(3)"], {"holds": "1 < value0 < 2"}),
    ],
)  # fmt: skip
def test_assertions_are_taken_apart(test, asked, rest):
    assert assertions.take_apart(test, {"f", "g", "Stack"}) == assertions.Question(tuple(asked), **rest)


@pytest.mark.parametrize(
    "test",
    [
        "f(3)", "x = f(3)\nassert x == 7", "assert all(f(x) for x in [1])", "assert list(map(f, [1])) == [2]",
        "assert 1 == 1", "assert h(3) == 7", "assert (lambda: f(1))() == 2",
    ],
)  # fmt: skip
def test_assertions_that_cannot_be_taken_apart(test):
    with pytest.raises(assertions.NotSeparable):
        assertions.take_apart(test, {"f"})
    with pytest.raises(UserError, match=r"mbpp.*assertions about calls"):
        scorers.get("mbpp").score("", {"code": "def f(x): return x", "test_list": [test]})


@pytest.mark.parametrize(
    "reference",
    [None, "def f", {}, {"code": "x"}, {"code": "x", "test_list": []}, {"code": "x", "test_list": [1]},
     {"code": "x(", "test_list": ["assert f(1) == 1"]}],
)  # fmt: skip
def test_unusable_references_are_named(reference):
    with pytest.raises(UserError, match=r"'mbpp'.*expected"):
        scorers.get("mbpp").score(GOOD, reference)


# The task.


def test_the_task_from_local_files(tmp_path):
    for part, rows in (("train", ROWS[:5]), ("validation", ROWS[5:7]), ("test", ROWS[7:])):
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {part: str(tmp_path / f"{part}.jsonl") for part in ("train", "validation", "test")}
    splits = {"select": 4, "confirm": {"start": 4, "size": 4}, "test": {"start": 8, "size": 6}}
    entry = {"name": "mbpp", "source": {"file": files}, "splits": splits}
    items = make_items(load_task(entry, ROOT / "config" / "tasks"))
    made = items["confirm"].row(1, named=True)
    text = made["messages"][0]["content"]
    assert "find the sum of digits between two numbers" in text
    assert "tests:\nassert sum(1, 3) == 6\nassert sum(9, 11) == 12\nassert sum(10, 10) == 1\n\nWrite" in text
    assert ROWS[5]["code"] not in text and json.loads(made["reference"])["code"] == ROWS[5]["code"]
    assert [frame.height for frame in items.values()] == [4, 4, 6]

    del files["validation"]
    with pytest.raises(UserError, match=r"the part 'validation', but source.file has train, test"):
        make_items(load_task(entry, ROOT / "config" / "tasks"))
    (tmp_path / "test.jsonl").write_text(json.dumps({**ROWS[0], "test_list": ["larger(1, 2)"]}) + "\n")
    splits = {name: {"part": "test", "start": 0, "size": 1} for name in ("select", "confirm", "test")}
    with pytest.raises(UserError, match=r"twice"):  # the same row in three splits
        make_items(load_task({**entry, "splits": splits}, ROOT / "config" / "tasks"))


def test_a_reference_that_cannot_be_used_is_told_with_the_items(tmp_path):
    rows = [*ROWS[:2], {**ROWS[2], "test_list": ["assert all(shared(x, x) for x in [[1]])"]}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = {name: {"part": "train", "start": n, "size": 1} for n, name in enumerate(("select", "confirm", "test"))}
    entry = {"name": "mbpp", "source": {"file": str(tmp_path / "train.jsonl")}, "splits": splits}
    with pytest.raises(UserError, match=r"task mbpp: test-00000: .*NotSeparable"):
        make_items(load_task(entry, ROOT / "config" / "tasks"))
