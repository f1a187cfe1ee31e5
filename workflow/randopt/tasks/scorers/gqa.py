"""Questions about pictures whose answer is a word or a short phrase, as in GQA."""

import re
import unicodedata
from typing import Any

from randopt.tasks.scorers import text as find
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference

_BEFORE = 20_000  # characters that are examined: an answer stands near the end
_MAX_BOXES = 20  # that are looked into, from the end
_MAX_WORDS = 6  # of an unmarked answer; a longer text is a sentence about it
_STATED = re.compile(r"answer\s{0,3}(?:is|:|=)", re.IGNORECASE)
_STYLE = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\{([^{}]{0,200})\}")
_OPENING = re.compile(r"\W{0,10}(yes|no)(?=[,.;:!\n]|$)", re.IGNORECASE)
_ARTICLES = ("a ", "an ", "the ")

_SYNONYMS = {  # singular, normalised -> the word that is counted
    "aeroplane": "airplane",
    "plane": "airplane",
    "bike": "bicycle",
    "burger": "hamburger",
    "cellphone": "cell phone",
    "mobile phone": "cell phone",
    "smartphone": "cell phone",
    "couch": "sofa",
    "doughnut": "donut",
    "fridge": "refrigerator",
    "garbage can": "trash can",
    "trash bin": "trash can",
    "grey": "gray",
    "motorbike": "motorcycle",
    "photograph": "photo",
    "tee shirt": "t shirt",
    "tshirt": "t shirt",
    "television": "tv",
    "yeah": "yes",
    "yep": "yes",
    "nope": "no",
}
_SINGULAR = {
    "men": "man",
    "women": "woman",
    "children": "child",
    "people": "person",
    "feet": "foot",
    "teeth": "tooth",
    "geese": "goose",
    "mice": "mouse",
    "knives": "knife",
    "wives": "wife",
    "leaves": "leaf",
    "shelves": "shelf",
    "bookshelves": "bookshelf",
    "loaves": "loaf",
    "scarves": "scarf",
    "wolves": "wolf",
    "calves": "calf",
    "lenses": "lens",
    "canvases": "canvas",
    "gases": "gas",
    "toes": "toe",
    "canoes": "canoe",
    "tvs": "tv",
    **{word: word for word in ("lens", "canvas", "glasses", "series", "species", "christmas")},
    **{f"{word}s": word for word in ("cookie", "movie", "hoodie", "brownie", "smoothie", "selfie", "zombie")},
    **{f"{word}s": word for word in ("ski", "taxi", "bikini", "kiwi")},
}
_WITHOUT_ES = ("sses", "xes", "ches", "shes", "uses", "oes")  # glasses, boxes, benches, dishes, buses, tomatoes
_WITHOUT_S = ("aches", "ouses", "auses", "shoes")  # headaches, houses, shoes: only the s


def score(response: str, reference: Any) -> Verdict:
    r"""Verdict on a response that was asked to end in \boxed{answer}.

    reference: the answer as text, or {"answer": text}. The reward is `lenient`, 0 or 1. Whole answers are compared,
    never parts of them, without letter case, articles and punctuation at the ends: snow is not no.
    strict: the last \boxed{} holds the reference.
    lenient: the answer by the first rule that finds one, with singular and plural the same and the few synonyms of
    `_SYNONYMS`: in the last \boxed{} that is not empty, after the last "answer is", a yes or no at the beginning, the
    last line if it is short.
    """
    expected = _expected("gqa", reference)
    tail = _STYLE.sub(r"\1", response[-_BEFORE:])
    boxed = find.last_boxed(tail)
    found = _extract(tail, response)
    if not found:
        return NO_ANSWER
    key = canonical(found)
    lenient = key == canonical(expected)
    strict = boxed is not None and normalised(boxed) == normalised(expected)
    return Verdict(float(lenient), strict and lenient, lenient, key)


def normalised(text: str) -> str:
    """The answer without Unicode spelling, letter case, hyphens, an article before and punctuation around it."""
    words = re.sub(r"[\s_\u2010-\u2015-]+", " ", unicodedata.normalize("NFKC", text).casefold())
    words = re.sub(r"^\W+|\W+$", "", words)
    for article in _ARTICLES:
        words = words.removeprefix(article)
    return words


def canonical(text: str) -> str:
    """The one spelling of an answer: every word in its singular, then the synonym that is counted."""
    words = " ".join(singular(word) for word in normalised(text).split(" "))
    return _SYNONYMS.get(words, words)


def singular(word: str) -> str:
    """The singular of an English noun by its ending; what has none stays as it is."""
    if word in _SINGULAR:
        return _SINGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies") and len(word) > 4:
        return f"{word[:-3]}y"
    if word.endswith(_WITHOUT_ES) and not word.endswith(_WITHOUT_S):
        return word[:-2]
    return word[:-1]


def _extract(tail: str, response: str) -> str:
    """The normalised answer, empty when there is none."""
    if found := _filled_box(tail):
        return found
    stated = [match.end() for match in _STATED.finditer(tail)]
    if stated:
        clause = re.split(r"[.\n;]", tail[stated[-1] : stated[-1] + 200].lstrip(), maxsplit=1)[0]
        if found := normalised(clause):
            return found
    opening = _OPENING.match(response)
    if opening:
        return opening[1].casefold()
    last = tail.rstrip().rpartition("\n")[2]
    line = normalised(last)
    return line if len(line.split(" ")) <= _MAX_WORDS and r"\boxed" not in last else ""


def _filled_box(text: str) -> str:
    """What the last box that is not empty holds, normalised."""
    for _ in range(_MAX_BOXES):
        if found := normalised(find.last_boxed(text) or ""):
            return found
        text = text[: max(0, text.rfind(r"\boxed{"))]
    return ""


def _expected(scorer: str, reference: Any) -> str:
    answer = reference.get("answer") if isinstance(reference, dict) else reference
    if not isinstance(answer, str) or not normalised(answer):
        raise bad_reference(scorer, reference, 'text such as "left", or {"answer": "left"}')
    return answer


def paper(response: str, reference: Any) -> Verdict:
    r"""The verdict of the published experiments; kept with its faults, so that numbers compare.

    The answer is the last \boxed{} that is not empty, else the first yes or no, else all of the text. It is right when
    it equals the reference, also as a singular or a synonym, or when one is a part of the other: snow is right for no.
    strict: the reward, which a yes or no also earns by standing anywhere in the text; lenient: the vote.
    """
    expected = _plain(_expected("gqa_paper", reference))
    text = response.strip().lower()
    boxes = [box for box in re.findall(r"\\boxed\{([^{}]+)\}", response) if box.strip()]
    said = re.search(r"\b(?:yes|no)\b", text)
    answer = _plain(boxes[-1] if boxes else said.group() if said else text)
    voted = bool(answer) and (_stem(answer) == _stem(expected) or answer in expected or expected in answer)
    scanned = expected in ("yes", "no") and re.search(rf"\b{expected}\b", text) is not None
    right = voted or scanned
    return Verdict(float(right), right, voted, answer or None)


def _plain(text: str) -> str:
    words = text.strip().lower().strip(" .,!?;:\"'")
    for article in _ARTICLES:
        words = words.removeprefix(article)
    return words


def _stem(text: str) -> str:
    words = " ".join(singular(word) for word in text.split())
    return _SYNONYMS.get(words, words)
