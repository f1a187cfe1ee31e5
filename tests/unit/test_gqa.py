"""The scorers of GQA: whole answers are compared; the published verdicts keep their faults."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from randopt.errors import UserError
from randopt.tasks import scorers
from randopt.tasks.scorers import NO_ANSWER
from randopt.tasks.scorers.gqa import canonical, singular

score = scorers.get("gqa").score
paper = scorers.get("gqa_paper").score

# response, reference, (reward, vote, vote_correct): the public code's own verdicts
PUBLISHED = [
    ("\\boxed{yes}", "yes", (1.0, "yes", True)),
    ("\\boxed{snow}", "no", (1.0, "snow", True)),
    ("No, it is not yes.", "yes", (1.0, "no", False)),
    ("\\boxed{bus}", "buses", (1.0, "bus", True)),
    ("\\boxed{}", "left", (0.0, "\\boxed{}", False)),
]


@pytest.mark.parametrize(("response", "reference", "expected"), PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_the_published_verdicts(response, reference, expected):
    found = paper(response, {"answer": reference})
    assert (found.reward, found.vote_key, found.lenient) == expected
    assert found.strict == (found.reward == 1)


def test_published_faults_and_empty_answers():
    assert paper("", "yes") == NO_ANSWER
    assert paper("\\boxed{couch}", "sofa").reward == 1  # a synonym
    assert paper("It is a yes or a no.", "no") == (1.0, True, False, "yes")  # the scan finds no, the vote is yes
    assert paper("He knows.", "no") == (1.0, True, True, "he knows")  # no word no, but a part
    assert paper("\\boxed{red}", "blue") == (0.0, False, False, "red")


RIGHT = [
    ("It is there. \\boxed{left}", "left", True),
    ("\\boxed{The Left.}", "left", True),
    ("\\boxed{\\text{left}}", "left", True),
    ("\\boxed{bus}", "buses", False),
    ("\\boxed{couch}", "sofa", False),
    ("\\boxed{TVs}", "television", False),
    ("\\boxed{t-shirt}", "t shirt", True),
    ("\\boxed{left} \\boxed{}", "left", False),
    ("The answer is: left.", "left", False),
    ("left", "left", False),
    ("I see a cat.\n\nA cat", "cat", False),
    ("No, it is not yes.", "no", False),
    ("Yes.", "yes", False),
]


@pytest.mark.parametrize(("response", "reference", "strict"), RIGHT, ids=[row[0] for row in RIGHT])
def test_right_answers(response, reference, strict):
    found = score(response, reference)
    assert found == (1.0, strict, True, canonical(reference))
    assert score(response, {"answer": reference}) == found


WRONG = [
    ("\\boxed{snow}", "no"),
    ("\\boxed{no}", "snow"),
    ("\\boxed{man}", "woman"),
    ("\\boxed{woman}", "man"),
    ("No, it is not yes.", "yes"),
    ("\\boxed{black and white}", "white"),
    ("\\boxed{red} no, \\boxed{blue}", "red"),
    ("\\boxed{glasses}", "glass"),
]


@pytest.mark.parametrize(("response", "reference"), WRONG, ids=[row[0] for row in WRONG])
def test_wrong_answers_vote_for_something_else(response, reference):
    found = score(response, reference)
    assert (found.reward, found.strict, found.lenient) == (0.0, False, False)
    assert found.vote_key and found.vote_key != canonical(reference)


@pytest.mark.parametrize(
    "response", ["", "\\boxed{}", "\\boxed{", "...", "I look at the picture and am not sure of it"]
)
def test_what_is_no_answer_abstains(response):
    assert score(response, "left") == NO_ANSWER


SINGULARS = """
buses bus, glass glass, boxes box, benches bench, houses house, shoes shoe, tomatoes tomato, cookies cookie,
ladies lady, men man, people person, knives knife, gloves glove, grass grass, tennis tennis, skis ski, vases
vase, horses horse, dresses dress, lens lens, yes yes, this this, headaches headache, canvas canvas, toes toe,
TVs tv
"""


@pytest.mark.parametrize("pair", SINGULARS.replace("\n", " ").split(","), ids=str.strip)
def test_singulars(pair):
    plural, expected = pair.casefold().split()
    assert singular(plural) == expected
    assert singular(expected) == expected, "a singular is its own"


@pytest.mark.parametrize("reference", [None, 3, "", " ", {"answer": 3}, {}, ["left"], "..."])
def test_a_reference_that_is_no_answer_is_refused(reference):
    for judge in (score, paper):
        with pytest.raises(UserError, match='expected text such as "left"'):
            judge("\\boxed{left}", reference)


PIECES = st.lists(st.sampled_from(["\\boxed{", "}", "answer is", "yes", "\n", "left", "\\text{"])).map("".join)


@given(st.text() | PIECES)
def test_any_text_gets_a_verdict(text):
    for judge in (score, paper):
        found = judge(text, "left")
        assert 0 <= found.reward <= 1 and (found.vote_key is None or found.vote_key)
    strict = score(text, "left")
    assert strict.lenient or not strict.strict


@pytest.mark.parametrize("piece", ["\\boxed{", "\\boxed{}", "answer is ", "yes ", "{", "s", " ", "\\text{", "-", "\n"])
def test_a_megabyte_takes_less_than_a_second(piece):
    text = piece * (1_000_000 // len(piece))
    for judge in (score, paper):
        start = time.perf_counter()
        judge(text, "left")
        assert time.perf_counter() - start < 1
