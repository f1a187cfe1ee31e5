"""The answer in a text of any task, and the one spelling of it that is compared and counted."""

import re
import unicodedata

from randopt.tasks.scorers.text import last_block, last_boxed

MAX_TEXT = 20_000  # characters at the end of a response that are examined
MAX_ANSWER = 2_000  # characters of an answer; longer ones are a stuck model

_STATED = re.compile(r"\banswer\s{0,3}(?:is|:|=)[ \t:*]{0,9}", re.IGNORECASE)
_EDGES = " \t\n*_`\"'“”‘’«».,;:!?$"  # Markdown, quotation marks, the end of a sentence


def final(response: str) -> tuple[str, bool]:
    r"""The answer that a response ends in, and whether it stands in <answer> tags.

    The first of these that is there and not blank: the last <answer> block, the last \boxed{}, the rest of the line
    after the last "####", the rest of the line after the last "answer is" (or ":", "="), the last line.
    """
    text = response[-MAX_TEXT:]
    tagged = last_block(text, "<answer>", "</answer>")
    if tagged is not None and tagged.strip():
        return tagged.strip(), True
    boxed = last_boxed(text)
    if boxed is not None and boxed.strip():
        return boxed.strip(), False
    _, hashes, rest = text.rpartition("####")
    if hashes and rest.strip():
        return rest.strip().partition("\n")[0].strip(), False
    stated = [match.end() for match in _STATED.finditer(text)]
    if stated and text[stated[-1] :].strip():
        return text[stated[-1] :].strip().partition("\n")[0].strip(), False
    return text.rstrip().rpartition("\n")[2].strip(), False


def normal(text: str) -> str:
    """Text in its one spelling: Unicode form, case and white space, without what stands around an answer."""
    folded = " ".join(unicodedata.normalize("NFKC", text[: 4 * MAX_ANSWER]).casefold().split())
    # a lone surrogate, which no table can hold, becomes a question mark
    return (folded.strip(_EDGES) or folded).encode("utf-8", "replace").decode()
