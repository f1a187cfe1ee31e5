"""Verdicts by reasoning-gym's own scorers, reached through a process that may be killed (`worker.py`).

About ten of those scorers pass the model's text to eval() or SymPy, where 9**9**9 never returns. They
run in `sandboxed_worker.py`.
"""

from typing import Any

from randopt.errors import UserError
from randopt.tasks.scorers.text import last_block
from randopt.tasks.scorers.verdict import NO_ANSWER, Verdict, bad_reference
from randopt.tasks.scorers.worker import Worker

MAX_ANSWER = 20_000  # characters; the longest answers of the data sets (grids) have about 3,000
SECONDS = 5.0  # for one answer; the usual ones take under 50 ms, most under 1 ms
_WORKER = Worker(
    "sandboxed_worker.py",
    "reasoning_gym",
    "Install reasoning-gym into this environment (pip install reasoning-gym), and see that 4 GB of memory are free.",
)


def score(response: str, reference: Any) -> Verdict:
    """Verdict by the data set's own score_answer, in bounded time (SECONDS, and a restart).

    reference: {question, answer, metadata} as the data set made it, with `dataset` (or
    metadata.source_dataset) its name and `params` its configuration, if not the default.
    The reward is the data set's score of the extracted answer, 0 to 1: the last answer block, else
    the last line.
    strict: a score of 1 for an answer inside tags; lenient: also without tags.
    vote key: the extracted answer, white space normalised and case-folded.
    """
    entry = _entry(reference)
    tagged = last_block(response, "<answer>", "</answer>")
    answer = (response.rstrip().rpartition("\n")[2] if tagged is None else tagged).strip()
    if not answer or len(answer) > MAX_ANSWER:
        return NO_ANSWER
    reward = _reward({"answer": answer, **entry})
    right = reward >= 1 - 1e-9
    key = " ".join(answer.split()).casefold().encode("utf-8", "replace").decode()
    return Verdict(reward, right and tagged is not None, right, key)


def _entry(reference: Any) -> dict[str, Any]:
    try:
        metadata = reference["metadata"]
        entry = {"question": reference["question"], "answer": reference["answer"], "metadata": metadata}
        dataset = reference["dataset"] if "dataset" in reference else metadata["source_dataset"]
        params = reference.get("params") or {}
    except (TypeError, KeyError) as error:
        expected = 'an entry {"question", "answer", "metadata", "dataset"} of reasoning-gym'
        raise bad_reference("reasoning_gym", reference, expected) from error
    return {"dataset": dataset, "params": params, "entry": entry}


def _reward(question: dict[str, Any]) -> float:
    """The data set's score, 0 when the worker failed on it or did not answer in time."""
    reply = _WORKER.ask(question, SECONDS, SECONDS + 2.0)
    if reply is None:
        return 0.0
    if "error" in reply:
        raise UserError(
            f"reasoning_gym:{question['dataset']} cannot score: {reply['error']}. "
            "Check the data set's name and params with the installed version of reasoning-gym."
        )
    return min(1.0, max(0.0, float(reply["score"])))
