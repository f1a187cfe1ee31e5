"""Programs that a model wrote, judged by running them in the sandbox (MBPP: a function and three assertions)."""

import ast
import functools
import re
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from randopt import sandbox
from randopt.canonical import short_hash
from randopt.sandbox.worker import tree
from randopt.tasks.scorers import assertions, values
from randopt.tasks.scorers.text import last_block
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

CPU_SECONDS = 8  # of one program with all its tests; the slowest solution of MBPP (task 123) takes 3
SECONDS = 8.0  # wall clock
TRUSTED_CPU_SECONDS = 1  # of the data set's own solution, with values that a program claimed
PAPER_SECONDS = 5.0  # for each test
MAX_PROGRAM = 100_000  # characters; the longest solution of MBPP has 2,000
_SHOWN = 3  # tests in the prompt, and in the vote
_MAX_KEY = 200  # characters of a vote key; a longer one is shortened to its hash
_OPENING = re.compile(r"```[ \t]*(?:[A-Za-z0-9_+.-]+[ \t]*)?\n")
_PAPER_FENCE = re.compile(r"```(?:python)?(.*?)```", re.DOTALL)


class _Tests(NamedTuple):
    code: str  # the data set's own solution
    setup: str
    tests: tuple[str, ...]


def score(response: str, reference: Any) -> Verdict:
    """Verdict on a response that was asked for a Python program in answer tags.

    reference: {code, test_list, test_setup_code}, of which only the set-up and the calls in the tests
    (randopt.tasks.scorers.assertions) reach the program's process. The reward is `lenient`, 0 or 1.
    lenient: the program passes every test within CPU_SECONDS in all. It is looked for in the last answer tag (a fence
    inside is stripped), else in the last fence, else the whole response must be one.
    strict: so, and the inside of the answer tag is the program as it stands.
    vote key: what the program returns in the tests that the prompt shows, so that programs which behave alike vote
    together; where nothing was returned, its syntax tree without layout, comments and docstrings. None
    abstains: no program.
    """
    tests = _tests("mbpp", reference)
    questions = _questions(tests)
    program, plain = _extract(response)
    if not program or len(program) > MAX_PROGRAM:
        return NO_ANSWER
    asked = tuple(expression for question in questions for expression in question.asked)
    answers = sandbox.run(sandbox.Request(program, tests.setup, asked), CPU_SECONDS, SECONDS)
    claims = [*map(_claim, answers.replies), *[None] * (len(asked) - len(answers.replies))]
    right, place = True, 0
    for number, question in enumerate(questions):
        claimed = claims[place : place + len(question.asked)]
        place += len(question.asked)
        # one failure decides; what is left would only cost time
        right = right and all(claim is not None for claim in claimed) and _passes(tests, number, claimed)
    return Verdict(float(right), right and plain, right, _vote_key(questions, claims, answers))


def paper(response: str, reference: Any) -> Verdict:
    """The verdict of the published experiments; kept with its faults, so that numbers compare.

    The program and the assertions share a process, as there, so an object that equals everything passes, and so would a
    program that forges the verdict; but the process is a sandbox (there it is the driver's), and a test that takes more
    than PAPER_SECONDS, ends the process or writes where it may not has failed. A fence inside the answer tag is part of
    the program; a program without tag and fence is not found.
    strict: the reward; lenient: the same, since the vote runs the tests again. vote key: the program's text.
    """
    tests = _tests("mbpp_paper", reference)
    program = _paper_program(response)
    if not program or len(program) > MAX_PROGRAM:
        return NO_ANSWER
    seconds = PAPER_SECONDS * len(tests.tests)
    request = sandbox.Request(program, tests.setup, statements=tests.tests)
    answers = sandbox.run(request, int(seconds) + 1, seconds, PAPER_SECONDS)
    passed = [isinstance(reply, dict) and "value" in reply for reply in answers.replies]
    right = len(passed) == len(tests.tests) and all(passed)
    return Verdict(float(right), right, right, program.encode("utf-8", "replace").decode())


def _tests(scorer: str, reference: Any) -> _Tests:
    expected = '{"code": "def add(a, b): ...", "test_list": ["assert add(1, 2) == 3"], "test_setup_code": ""}'
    if not isinstance(reference, Mapping):
        raise bad_reference(scorer, reference, expected)
    code, tests, setup = (reference.get(key) for key in ("code", "test_list", "test_setup_code"))
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise bad_reference(scorer, reference, expected)
    if not isinstance(code, str) or not isinstance(setup or "", str):
        raise bad_reference(scorer, reference, expected)
    return _Tests(code, setup or "", tuple(tests))


@functools.lru_cache(maxsize=4096)
def _questions(tests: _Tests) -> tuple[assertions.Question, ...]:
    try:
        names = assertions.defined_names(tests.code) | assertions.defined_names(tests.setup)
        return tuple(assertions.take_apart(test, names) for test in tests.tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise bad_reference(
            "mbpp",
            tests.tests,
            f"assertions about calls, as in assert add(1, 2) == 3 ({type(error).__name__}: {error})",
        ) from error


class _Claim(NamedTuple):
    tree: Any
    text: str  # canonical


def _claim(reply: Any) -> _Claim | None:
    """The value in a reply; None when there is none that could be compared."""
    if not isinstance(reply, dict) or "value" not in reply:
        return None
    try:
        return _Claim(reply["value"], values.canonical(reply["value"]))
    except values.NoValue:
        return None


def _passes(tests: _Tests, number: int, claimed: list[Any]) -> bool:
    question = _questions(tests)[number]
    if question.truth is not None:
        return values.truth(claimed[0].text) == question.truth
    if question.equals is not None:
        return values.equal(claimed[0].text, _expected(tests, question.equals))
    names = {f"value{index}": claim.tree for index, claim in enumerate(claimed)}
    request = sandbox.Request(tests.code, tests.setup, (str(question.holds),), names=names)
    verdict = _trusted(request)[0]
    return verdict is not None and values.truth(verdict.text)


def _trusted(request: sandbox.Request) -> list[_Claim | None]:
    """Values worked out with the data set's solution, in a sandbox that never sees a model's program."""
    replies = sandbox.run(request, TRUSTED_CPU_SECONDS, SECONDS).replies
    return [*map(_claim, replies), *[None] * (len(request.expressions) - len(replies))]


@functools.lru_cache(maxsize=4096)
def _expected(tests: _Tests, value: str) -> str:
    """Canonical text of a value that a test expects."""
    try:
        return values.canonical(tree(ast.literal_eval(value)))
    except (ValueError, TypeError, OverflowError, RecursionError, MemoryError):
        claim = _trusted(sandbox.Request(tests.code, tests.setup, (value,)))[0]
    if claim is None:
        raise bad_reference("mbpp", tests.tests, f"a value that can be compared, of {value}")
    return claim.text


def _vote_key(
    questions: tuple[assertions.Question, ...], claims: list[_Claim | None], answers: sandbox.Answers
) -> str | None:
    shown = claims[: sum(len(question.asked) for question in questions[:_SHOWN])]
    if any(claim is not None for claim in shown):
        key = "returns " + ", ".join("nothing" if claim is None else claim.text for claim in shown)
    elif answers.form is not None:
        key = f"program {answers.form}"
    else:
        return None
    return key if len(key) <= _MAX_KEY else f"{key.split()[0]} #{short_hash(key.encode('utf-8', 'replace').hex(), 16)}"


def _extract(response: str) -> tuple[str, bool]:
    """The program, "" when none can be, and whether it stood plainly inside the answer tag."""
    tagged = last_block(response, "<answer>", "</answer>")
    if tagged is None:
        _, opening, rest = response.rpartition("<answer>")
        tagged = rest if opening else None  # the tag was never closed
    if tagged is not None:
        fenced = _last_fence(tagged)
        return (_dedented(tagged), "</answer>" in response) if fenced is None else (_dedented(fenced), False)
    fenced = _last_fence(response)
    return _dedented(response if fenced is None else fenced), False


def _dedented(text: str) -> str:
    return textwrap.dedent(text).strip()


def _last_fence(text: str) -> str | None:
    """The inside of the last ``` block; one that is not closed ends with the text."""
    found, start = None, 0
    while opening := _OPENING.search(text, start):
        end = text.find("```", opening.end())
        if end < 0:
            return text[opening.end() :]
        found, start = text[opening.end() : end], end + 3
    return found


def _paper_program(response: str) -> str:
    """Inside of the first answer tag, else of the last fence, else nothing."""
    start = response.find("<answer>")
    end = response.find("</answer>", start)
    if 0 <= start < end:
        return response[start + len("<answer>") : end].strip()
    fences = _PAPER_FENCE.findall(response)
    return fences[-1].strip() if fences else ""
