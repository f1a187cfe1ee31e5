"""Problems from reasoning-gym's procedural data sets.

They are made in a process of their own with PYTHONHASHSEED=0: five of the 106 data sets in version
0.1.25 (word_ladder, ransom_note, ...) depend on the order of a set of strings, which Python
otherwise changes with every start.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randopt.errors import UserError
from randopt.tasks.row import Row, normalised

_SEED_STEP = 10_000_000  # between the splits' seeds; a data set uses seed + index for each problem


def rows(source: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, list[Row]]:
    """Split -> rows of distinct questions; the reference is the whole entry, with data set and params.

    Raises UserError for an unknown data set, bad parameters, or too few distinct questions.
    """
    question = {"dataset": source["reasoning_gym"], "params": source["params"], "seed": source["seed"]}
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-P", "-m", __name__],
        input=json.dumps({**question, "sizes": sizes}),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path},
    )
    name = f"reasoning_gym:{source['reasoning_gym']}"
    try:
        answer = json.loads(done.stdout)
    except ValueError as error:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{name}: the problems could not be made ({last}); is reasoning-gym installed?") from error
    if "error" in answer:
        raise UserError(f"{name}: {answer['error']}")
    return {split: [_row(entry, source) for entry in entries] for split, entries in answer["splits"].items()}


def _row(entry: dict[str, Any], source: Mapping[str, Any]) -> Row:
    reference = {**entry, "dataset": source["reasoning_gym"], "params": source["params"]}
    return Row(normalised(entry["question"]), {"question": entry["question"]}, reference)


def _make(dataset: str, params: dict[str, Any], seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    """{"splits": split -> entries} or {"error": text}; runs in the process of its own."""
    import difflib

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if dataset not in DATASETS or dataset == "composite":
        close = ", ".join(difflib.get_close_matches(dataset, DATASETS, n=5)) or ", ".join(sorted(DATASETS))
        return {"error": f"this data set is unknown (or composite); try one of {close}."}
    seen: set[str] = set()
    splits: dict[str, list] = {}
    for number, (split, size) in enumerate(sizes.items()):
        tries = 4 * size + 100
        try:
            made = reasoning_gym.create_dataset(dataset, **params, seed=seed + number * _SEED_STEP, size=tries)
        except Exception as error:
            return {"error": f"source.params {params!r} were refused ({type(error).__name__}: {error}); mend it."}
        splits[split] = []
        for index in range(tries):
            if len(splits[split]) == size:
                break
            entry = made[index]
            problem = normalised(entry["question"])
            if problem not in seen:
                seen.add(problem)
                splits[split].append({key: entry.get(key) for key in ("question", "answer", "metadata")})
        if len(splits[split]) < size:
            return {
                "error": f"the split {split} needs {size} items, but only {len(splits[split])} new questions "
                f"came in {tries} tries; lower the sizes in splits or widen source.params."
            }
    return {"splits": splits}


if __name__ == "__main__":
    print(json.dumps(_make(**json.loads(sys.stdin.read()))))
