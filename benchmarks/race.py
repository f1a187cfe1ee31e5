"""What a race saves and what it costs, on simulated searches: the share of item evaluations, and the experts found.

    PYTHONPATH=workflow python benchmarks/race.py                    # the table of docs/racing.md, minutes
    PYTHONPATH=workflow python benchmarks/race.py --order random --modes lossless

Candidates are followed by randopt.race itself, one after the other. An engine takes `chunk` items at once; a chunk that
was begun counts as evaluated. Prints one JSON object per line.
"""

import argparse
import json
import time
from collections.abc import Callable, Generator
from itertools import pairwise

import numpy as np
import polars as pl

from randopt import layout
from randopt.engines import Completion, Item
from randopt.race import PRUNED, Abilities, Pilot, Race, bound, likely_bound
from randopt.select import rank

SPREAD = np.array([0.15, 0.4, 0.8])  # of abilities at the three σ, in logits
DRIFT = np.array([0.0, 0.1, 0.4])  # what the noise costs on average, in logits
BROKEN = np.array([0.05, 0.2, 0.5])  # share of candidates that the noise has broken


def success(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits."""
    return 1 / (1 + np.exp(-logits))


def logit_items(generator: np.random.Generator, n: int, a: float = 0.8, b: float = 0.8) -> np.ndarray:
    """Logits of items that the base solves with probability Beta(a, b)."""
    share = np.clip(generator.beta(a, b, n), 1e-4, 1 - 1e-4)
    return np.log(share / (1 - share))


def one_ability(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """One ability for all items (N, n)."""
    ability = generator.normal(0, SPREAD[which]) - DRIFT[which]
    return success(ability[:, None] + logit_items(generator, n))


def hard_task(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """As one_ability, where the base solves an eighth of the items."""
    return success(generator.normal(0, SPREAD[which])[:, None] + logit_items(generator, n, 0.3, 2))


def rare_gems(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """Nearly all candidates are alike; one in twelve is much better."""
    ability = 1.5 * (generator.random(len(which)) < 1 / 12) + generator.normal(0, 0.3, len(which))
    return success(ability[:, None] + logit_items(generator, n))


def additive(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """Abilities that add to the probability itself."""
    gain = generator.normal(0, np.array([0.02, 0.05, 0.1])[which]) - np.array([0, 0.02, 0.06])[which]
    return np.clip(generator.beta(2, 2, n) + gain[:, None], 0.01, 0.99)


def flips(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """The base's answers are fixed; each candidate makes right ones wrong and wrong ones right, at rates of its own."""
    down = np.array([0.05, 0.15, 0.3])[which] * generator.lognormal(0, 0.4, len(which))
    up = down * generator.lognormal(-0.3, 0.4, len(which))
    return np.clip(np.where(generator.random(n) < 0.4, 1 - down[:, None], up[:, None]), 0, 1)


def topics(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """Five topics; a candidate has another ability in each, so its items are correlated."""
    ability = generator.normal(0, SPREAD[which][:, None], (len(which), 5)) - DRIFT[which][:, None]
    return success(ability[:, generator.integers(0, 5, n)] + logit_items(generator, n))


def two_skills(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """Hard and easy items need unrelated abilities: what comes first says nothing of what comes later."""
    items = logit_items(generator, n)
    ability = generator.normal(0, SPREAD[which][:, None], (len(which), 2))
    return success(ability[:, (items < 0).astype(int)] + items)


def alike(generator: np.random.Generator, which: np.ndarray, n: int) -> np.ndarray:
    """Every candidate answers as the base does: all are tied, and none may be lost."""
    return np.tile(generator.random(n) < 0.4, (len(which), 1)).astype(float)


CASES: dict[str, Callable[[np.random.Generator, np.ndarray, int], np.ndarray]] = {
    case.__name__: case for case in (one_ability, hard_task, rare_gems, additive, flips, topics, two_skills, alike)
}


def simulate(case: str, candidates: int, items: int, seed: int) -> tuple[np.ndarray, float]:
    """Rewards (N, n) of a search with three σ in turn, as float32 holds them, and the largest possible reward.

    "graded" is one_ability with countdown's rewards: a format share of 0, 0.06 or 0.1 on top of 0 or 1.
    """
    generator = np.random.default_rng(seed)
    which = np.arange(candidates) % 3
    chances = CASES["one_ability" if case == "graded" else case](generator, which, items)
    if case != "alike":
        broken = generator.random(candidates) < BROKEN[which]
        chances = np.where(broken[:, None], chances * generator.uniform(0, 0.3, candidates)[:, None], chances)
    rewards = (generator.random(chances.shape) < chances).astype(np.float32)
    if case == "graded":
        form = generator.choice(np.array([0, 0.06, 0.1], np.float32), rewards.shape, p=[0.2, 0.3, 0.5])
        return rewards + form, 1.1
    return rewards, 1.0


def table(rewards: np.ndarray, complete: np.ndarray) -> pl.DataFrame:
    """What selection reads of the candidates table: `rewards` (N, n), `complete` (N,)."""
    return pl.DataFrame(
        {
            "seed": np.arange(len(rewards)),
            "sigma": np.full(len(rewards), 0.001),
            "reward": rewards.astype(np.float64).mean(axis=1),
            "status": np.where(complete, "complete", PRUNED),
        }
    )


def run(
    rewards: np.ndarray,
    max_reward: float,
    *,
    pilot: int,
    keep: int,
    mode: str,
    delta: float = 0.01,
    rounds: bool = True,
    order: str = "hardest",
) -> tuple[np.ndarray, np.ndarray]:
    """(answered items, bound on the sum) of each candidate when `rewards` (N, n) are raced.

    Without `rounds` the pilot's bound is everyone's.
    """
    total, n = rewards.shape
    ids = tuple(f"select-{item:05d}" for item in range(n))
    known = Pilot(ids, rewards[:pilot].astype(np.float64), np.ones(n))
    items = known.hardest_first([Item(item_id, ()) for item_id in ids])
    if order == "easiest":
        items = items[::-1]
    elif order == "random":
        items = [items[index] for index in np.random.default_rng(0).permutation(n)]
    columns = [ids.index(item.item_id) for item in items]
    answered, bounds = np.full(total, n), np.full(total, -np.inf)
    for rows, race in races(
        known, rewards, answered, keep, mode, max_reward, lambda c: float(c.text), delta=delta, rounds=rounds
    ):
        for row in rows:
            bounds[row] = race.bound
            found = race.watch(stream(rewards[row], ids, columns))
            answered[row] = sum(completion.finish_reason != PRUNED for completion in found)
    return answered, bounds


def races(
    known: Pilot,
    rewards: np.ndarray,
    answered: np.ndarray,
    keep: int,
    mode: str,
    max_reward: float,
    judge: Callable[[Completion], float],
    *,
    delta: float = 0.01,
    rounds: bool = True,
) -> Generator[tuple[range, Race], None, None]:
    """The rows and the race of each round after the pilot.

    rewards: (N, n), of every answer. answered: (N,) answered items; the caller lowers those of candidates that were
    stopped before it asks for the next round, whose bound is that of the complete ones.
    """
    pilot, (total, n) = len(known.rewards), rewards.shape
    model = Abilities(known.rewards, max_reward) if mode == "confident" else None
    begins = layout.race_rounds({"race": {"pilot": pilot}}, total) if rounds else [pilot]
    for begin, end in pairwise([*begins, total]):
        before = table(rewards[:begin], answered[:begin] == n)
        least, likely = bound(before, keep, n), likely_bound(before, keep, n, pilot)
        yield range(begin, end), Race(known, least, max_reward, judge, model, likely, delta)


def stream(rewards: np.ndarray, ids: tuple[str, ...], columns: list[int]) -> Generator[Completion, None, None]:
    """Completions whose text is their reward."""
    for column in columns:
        yield Completion(ids[column], repr(float(rewards[column])), "stop", 1, 1)


def evaluated(answered: np.ndarray, items: int, chunk: int) -> float:
    """Share of the item evaluations when `chunk` items are begun at once."""
    return round(float(np.minimum(-(-answered // chunk) * chunk, items).mean() / items), 3)


def measure(case: str, mode: str, seed: int, candidates: int, items: int, chunks: list[int], **settings) -> dict:
    """One simulated search, raced and exhaustive. Keys: see the report's columns in docs/racing.md."""
    rewards, max_reward = simulate(case, candidates, items, seed)
    pilot, keep = settings["pilot"], settings["keep"]
    begun = time.perf_counter()
    answered, bounds = run(rewards, max_reward, mode=mode, **settings)
    seconds = time.perf_counter() - begun
    complete = answered == items
    best, raced = (rank(table(rewards, kept)).head(keep) for kept in (np.ones(candidates, bool), complete))
    reach = rewards.astype(np.float64).sum(axis=1) > bounds - 1e-9
    lost = ~complete
    return {
        **{"case": case, "mode": mode, "seed": seed, **settings},
        **{f"evaluated by {chunk}": evaluated(answered, items, chunk) for chunk in chunks},
        "experts found": len(set(best["seed"]) & set(raced["seed"])) / keep,
        "mean reward lost": round(float(best["reward"].mean() - raced["reward"].mean()), 5),
        "identical": best.equals(raced),
        "lost that would reach the bound": round(float((reach & lost).sum() / max(1, lost.sum())), 5),
        "microseconds per item": round(1e6 * seconds / answered[pilot:].sum(), 1),
    }


def main() -> None:
    """Every case, mode, chunk and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[*CASES, "graded"])
    parser.add_argument("--modes", nargs="+", default=["lossless", "confident"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[1, 25])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=5000)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--pilot", type=int, default=250)
    parser.add_argument("--keep", type=int, default=50)
    parser.add_argument("--rounds", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--delta", type=float, default=0.01)
    parser.add_argument("--order", choices=["hardest", "random", "easiest"], default="hardest")
    given = vars(parser.parse_args())
    cases, modes, chunks, seeds = (given.pop(name) for name in ("cases", "modes", "chunks", "seeds"))
    for case in cases:
        for mode in modes:
            for seed in range(seeds):
                print(json.dumps(measure(case, mode, seed, chunks=chunks, **given)), flush=True)


if __name__ == "__main__":
    main()
