"""Racing: candidates that can no longer be selected, or very probably will not be, are stopped early.

The pilot, the first candidates of the plan, answers every item. The sum of rewards of its keep-th best is the
bound: at least `keep` candidates reach it, so whoever stays strictly below it is not among the best `keep`. Each time
the plan has doubled, all that came before gives a new, higher bound.
Nothing here knows of engines or of files' places; docs/racing.md has the proof and the measurements.
"""

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from randopt import layout, tables
from randopt.engines import Completion, Item
from randopt.errors import UserError

PRUNED = "pruned"  # finish_reason of an item that was never answered, and status of its candidate

# Rewards are float32, which float64 adds up with an error below 1e-13 of the sum; a sum that is short of the bound by
# less than this share of the largest possible one counts as a tie, and ties are never lost.
_ROUNDING = 1e-9

_GRID = 41  # abilities that the posterior is kept for
_WIDEST = 0.05  # prior share of abilities that no pilot candidate has, better ones included
_RIDGE = 1 / 9  # abilities and difficulties are N(0, 3²) before anything is seen: items that nobody solves stay finite
_NEWTON_STEPS = 30


@dataclass(frozen=True)
class Pilot:
    """What the pilot earned: `rewards` (P, n) by candidate in plan order, then item; `tokens` (n,) its mean tokens."""

    item_ids: tuple[str, ...]
    rewards: np.ndarray
    tokens: np.ndarray

    def hardest_first(self, items: Iterable[Item]) -> list[Item]:
        """The items by the pilot's mean reward, ascending; equals in the order of their ids."""
        means = dict(zip(self.item_ids, self.rewards.mean(axis=0).tolist(), strict=True))
        return sorted(items, key=lambda item: (means[item.item_id], item.item_id))


class Abilities:
    """An item response model of the pilot: P(reward is earned) = 1 / (1 + exp(difficulty - ability)) (Rasch 1960).

    A reward between 0 and `max_reward` counts as that share of a success, whose variance is never above that of the
    success itself. The prior of a new candidate's ability is the pilot's distribution, smoothed, with a floor over
    the whole grid, which reaches beyond the pilot's best.
    """

    def __init__(self, rewards: np.ndarray, max_reward: float) -> None:
        shares = np.clip(rewards / max_reward, 0.0, 1.0)
        ability, difficulty = _fit_rasch(shares)
        grid = np.linspace(min(ability.min(), -6.0), ability.max() + 2.0, _GRID)
        width = max(0.2, 1.06 * ability.std() * len(ability) ** -0.2)  # Silverman's rule
        density = np.exp(-0.5 * ((grid[:, None] - ability) / width) ** 2).sum(axis=1)
        self.max_reward = max_reward
        self.prior = np.log((1 - _WIDEST) * density / density.sum() + _WIDEST / _GRID)  # (G,)
        success = 1 / (1 + np.exp(difficulty[:, None] - grid))  # (n, G)
        self.success, self.variance = success, success * (1 - success)
        self.gain, self.loss = np.log(success + 1e-12), np.log(1 - success + 1e-12)


class Outlook:
    """What one candidate may still earn, given the rewards of any of its items in any order."""

    def __init__(self, model: Abilities) -> None:
        self.model = model
        self._posterior = model.prior.copy()  # (G,) log, not normalised
        self._mean = model.success.sum(axis=0)  # (G,) successes on the items that are left
        self._variance = model.variance.sum(axis=0)

    def see(self, item: int, reward: float) -> None:
        """One more item is answered."""
        model = self.model
        share = min(max(reward / model.max_reward, 0.0), 1.0)
        self._posterior += share * model.gain[item] + (1 - share) * model.loss[item]
        self._mean -= model.success[item]
        self._variance -= model.variance[item]

    def chance(self, needed: float) -> float:
        """P(the items that are left earn at least `needed`): normal given the ability, averaged over its posterior.

        Half a success is granted (the usual correction for whole numbers), and a quarter is added to the variance:
        with few items left a normal tail is too thin.
        """
        weights = np.exp(self._posterior - self._posterior.max())
        gap = needed / self.model.max_reward - 0.5 - self._mean
        scaled = gap / np.sqrt(2 * (np.maximum(self._variance, 0.0) + 0.25))
        tails = np.array([math.erfc(z) for z in scaled.tolist()])
        return float(0.5 * (weights @ tails) / weights.sum())


class Standing:
    """One candidate's rewards so far against a `bound` on its sum over `items` items.

    It is lost when it cannot reach the bound; with an `outlook` also when it reaches `likely`, a bound that is not
    above the first, with a probability below `delta`.
    """

    def __init__(
        self,
        bound: float,
        items: int,
        max_reward: float,
        outlook: Outlook | None = None,
        likely: float = -math.inf,
        delta: float = 0.0,
    ) -> None:
        margin = _ROUNDING * items * max(1.0, abs(max_reward))
        self._bound, self._likely = bound - margin, likely - margin
        self._left = items
        self._sum = 0.0
        self._max = max_reward
        self._outlook = outlook
        self._delta = delta

    def lost(self, item: int, reward: float) -> bool:
        """Whether the candidate is lost, now that `item` (its row of the items table) has earned `reward`."""
        self._sum += reward
        self._left -= 1
        if self._sum + self._max * self._left < self._bound:
            return True
        if self._outlook is None:
            return False
        self._outlook.see(item, reward)
        return self._outlook.chance(self._likely - self._sum) < self._delta


@dataclass
class Race:
    """The race of one round: follows each candidate's completions and ends the stream when it is lost.

    `bound`: on the sum of rewards. `judge`: a completion's reward. `model`, `likely` and `delta` are those of a
    confident race, see Standing.
    """

    pilot: Pilot
    bound: float
    max_reward: float
    judge: Callable[[Completion], float]
    model: Abilities | None = None
    likely: float = -math.inf
    delta: float = 0.0
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._rows = {item_id: row for row, item_id in enumerate(self.pilot.item_ids)}
        # as the scores table holds it: 1.1 in float32 is more than 1.1
        self.max_reward = float(np.float32(self.max_reward))

    def watch(self, stream: Generator[Completion, None, None]) -> list[Completion]:
        """A completion for every item: those that came before the candidate was lost, and for the rest `pruned`.

        Raises UserError for a reward above what the scorer declares: the bound would be wrong.
        """
        outlook = Outlook(self.model) if self.model else None
        standing = Standing(self.bound, len(self._rows), self.max_reward, outlook, self.likely, self.delta)
        found: dict[str, Completion] = {}
        with closing(stream):
            for completion in stream:
                found[completion.item_id] = completion
                lost = standing.lost(self._rows[completion.item_id], self._reward(completion))
                if lost and len(found) < len(self._rows):
                    break
        return [found.get(item_id) or Completion(item_id, "", PRUNED, 0, 0) for item_id in self._rows]

    def _reward(self, completion: Completion) -> float:
        reward = float(np.float32(self.judge(completion)))
        if not reward <= self.max_reward:
            raise UserError(
                f"the scorer gave item {completion.item_id} a reward of {reward:g}, more than the {self.max_reward:g} "
                "it declares as max_reward, on which a race relies. Mend the scorer, raise its version and run again."
            )
        return reward


def bound(candidates: pl.DataFrame, keep: int, items: int) -> float:
    """The keep-th largest sum of rewards over `items` items among the complete rows of CANDIDATES."""
    complete = candidates.filter(pl.col("status") == "complete")["reward"]
    return float(complete.top_k(keep).min()) * items  # type: ignore[arg-type]


def likely_bound(candidates: pl.DataFrame, keep: int, items: int, pilot: int) -> float:
    """The bound that a confident race holds candidates against: of a sixth of the rows before, and of the pilot.

    The best of the whole search are far above it, so the few that are stopped wrongly are hardly ever among them;
    held against the round's own bound, up to 6 % of the experts were lost (docs/racing.md).
    """
    return bound(candidates.head(max(pilot, candidates.height // 6)), keep, items)


def pruned_items(completions: pl.DataFrame) -> int:
    """Rows of COMPLETIONS that were never answered."""
    return completions.filter(pl.col("finish_reason") == PRUNED).height


def write_pilot(answers: pl.DataFrame, path: Path, run: Mapping[str, Any]) -> None:
    """race.parquet from the pilot's `answers` (gather.answers)."""
    frame = (
        answers.sort("position")
        .group_by("item_id")
        .agg(rewards="reward", tokens=pl.col("completion_tokens").mean())
        .sort("item_id")
    )
    tables.write(frame, tables.RACE, path, run_id=run["run_id"], race=layout.race_mark(run))


def read_pilot(path: Path, run: Mapping[str, Any], item_ids: Sequence[str]) -> Pilot:
    """The pilot of a run, whose run.yaml holds `run`; `item_ids` in the order of its items table.

    Raises UserError when the file is of another race or of other items.
    """
    frame = tables.read(path, tables.RACE, run_id=run["run_id"], race=layout.race_mark(run))
    rewards = np.array(frame["rewards"].to_list(), dtype=np.float64).T
    if frame["item_id"].to_list() != list(item_ids) or len(rewards) != run["race"]["pilot"]:
        raise UserError(f"{path} does not hold the pilot of this race on these items; remove it and run again.")
    return Pilot(tuple(item_ids), rewards, frame["tokens"].to_numpy())


def _fit_rasch(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Abilities (P,) and difficulties (n,) of the largest posterior, by Newton steps in turn; `shares` is (P, n)."""
    ability, difficulty = np.zeros(shares.shape[0]), np.zeros(shares.shape[1])

    def residuals() -> tuple[np.ndarray, np.ndarray]:
        success = 1 / (1 + np.exp(difficulty - ability[:, None]))
        return shares - success, success * (1 - success)

    for _ in range(_NEWTON_STEPS):
        off, weight = residuals()
        step = (-off.sum(axis=0) - _RIDGE * difficulty) / (weight.sum(axis=0) + _RIDGE)
        difficulty = difficulty + np.clip(step, -1, 1)
        off, weight = residuals()
        step = (off.sum(axis=1) - _RIDGE * ability) / (weight.sum(axis=1) + _RIDGE)
        ability = ability + np.clip(step, -1, 1)
    return ability, difficulty
