"""What a race saves on the demo: `python benchmarks/demo_race.py [transformers|vllm]`.

The demo's search for real, 64 candidates on its 48 selection items: once with every answer, then in each mode with a
pilot of 16. All items of a candidate are in flight at once, so only the tail of the longest answers can be cut. Where
seconds are compared, each candidate answers with and without the race in turn: the machine's speed changes by a fifth
between minutes.
"""

import argparse
import json
import time
from typing import Any

import numpy as np
from engine import ROOT, demo_manifest
from race import races, table
from tqdm import tqdm

from randopt import engines
from randopt.engines import Completion, EngineSettings
from randopt.items import references, to_items
from randopt.race import PRUNED, Pilot, Race
from randopt.requests import Decoding, candidate
from randopt.score import judge
from randopt.select import rank
from randopt.tasks import scorers
from randopt.tasks.items import make_items
from randopt.tasks.spec import load_task

CANDIDATES, PILOT, KEEP = 64, 16, 8
SIGMAS = (0.002, 0.004, 0.008)


class Search:
    """The demo's search on one engine: rewards and tokens (N, n) of every answer."""

    def __init__(self, name: str) -> None:
        engines.share_cores()
        import torch

        task = load_task("times_table", ROOT / "config" / "tasks")
        items = make_items(task, ROOT)["select"].sort("item_id")
        self.scorer = scorers.get(task.scorer)
        self.expected = references(items)
        self.items = to_items(items, ROOT)
        self.ids = tuple(items["item_id"])
        self.plan = [candidate(1 + index, SIGMAS[index % 3]) for index in range(CANDIDATES)]
        threads = torch.get_num_threads()
        settings = EngineSettings("bfloat16", task.max_tokens, 64, "auto", "iid", (), threads, ordered=True)
        self.engine = engines.load(name, demo_manifest(ROOT / "results" / "bench" / "model"), settings)
        self.answers(0)  # compiles the kernel and tokenises the items
        shape = (CANDIDATES, len(self.ids))
        self.rewards, self.tokens = np.zeros(shape), np.zeros(shape)
        for row in tqdm(range(CANDIDATES), "every answer"):
            found = {completion.item_id: completion for completion in self.answers(row)}
            self.rewards[row] = [self.reward(found[item_id]) for item_id in self.ids]
            self.tokens[row] = [found[item_id].completion_tokens for item_id in self.ids]

    def reward(self, completion: Completion) -> float:
        """As the scores table holds it."""
        item_id = completion.item_id
        return float(np.float32(judge(self.scorer, item_id, completion.text, self.expected[item_id]).reward))

    def answers(self, row: int, race: Race | None = None) -> list[Completion]:
        """A candidate's completions, to the end or until it is lost."""
        self.engine.set_weights(())  # so that the second of two turns sets the weights too
        self.engine.set_weights(self.plan[row].perturbation)
        stream = self.engine.generate(self.items, Decoding())
        return race.watch(stream) if race else list(stream)

    def raced(self, mode: str) -> dict[str, Any]:
        """What is left of the search's items, tokens and, after the pilot, seconds; are the experts the same?"""
        n = len(self.ids)
        known = Pilot(self.ids, self.rewards[:PILOT], self.tokens[:PILOT].mean(axis=0))
        tokens, seconds, answered = self.tokens.copy(), np.zeros(2), np.full(CANDIDATES, n)
        for rows, race in races(known, self.rewards, answered, KEEP, mode, self.scorer.max_reward, self.reward):
            for row in tqdm(rows, f"{mode}, bound {race.bound:g}"):
                begun = time.perf_counter()
                self.answers(row)
                between = time.perf_counter()
                found = self.answers(row, race)
                seconds += between - begun, time.perf_counter() - between
                kept = np.array([completion.finish_reason != PRUNED for completion in found])
                tokens[row] *= kept  # an answer is the same with and without a race
                answered[row] = kept.sum()
        best, ours = (
            rank(table(self.rewards, complete)).head(KEEP) for complete in (np.ones(CANDIDATES, bool), answered == n)
        )
        return {
            "candidates stopped": int((answered < n).sum()),
            "share of the items": round(float(answered.sum() / (CANDIDATES * n)), 3),
            "share of the tokens": round(float(tokens.sum() / self.tokens.sum()), 3),
            "share of the seconds after the pilot": round(float(seconds[1] / seconds[0]), 3),
            "same experts": best.equals(ours),
        }


def main() -> None:
    """Print the figures of both modes as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", nargs="?", choices=["transformers", "vllm"], default="transformers")
    search = Search(parser.parse_args().engine)
    print(json.dumps({mode: search.raced(mode) for mode in ("lossless", "confident")}, indent=2))


if __name__ == "__main__":
    main()
