"""What a run shows: every method on every split, with intervals and with what it cost.

A search over thousands of candidates overfits the items it selects on, and many votes against one
greedy pass is no fair race. So RandOpt stands beside the base's own vote of the same size, beside
candidates that were never selected, and on items the search has not seen; K is chosen on confirm.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from randopt import stats, tables
from randopt.errors import UserError
from randopt.select import rank

SPLITS = ("select", "confirm", "test")
# Metric -> the column of a single answer's scores and the one of a vote that say whether it is right. `paper` is told
# by the paper-compatible twin, whose strict says whether the reward counts as right and whose lenient is the vote's.
VERDICTS = {"strict": ("strict", "strict"), "lenient": ("lenient", "lenient")}
PAPER = {"paper": ("strict", "lenient")}
VOTED = ("self_consistency", "random", "randopt")
# Votes that a vote is compared with at equal K: is it more than sampling the base, more than any perturbations?
RIVALS = {"randopt": ("self_consistency", "random"), "random": ("self_consistency",)}
BASE, SIGMA_ZERO, SAMPLES = 0, 1, 2  # rows of the controls: base, σ = 0, then the base's samples


@dataclass(frozen=True)
class _Result:
    """One method at one K on one split. `correct`: verdict -> (items,) whole numbers of `of` answers."""

    method: str
    top_k: int
    correct: Mapping[str, np.ndarray]
    generations: int
    tokens: int
    of: int = 1


def metrics(
    *,
    model: str,
    task: str,
    run_id: str,
    candidates: pl.DataFrame,
    votes: pl.DataFrame,
    members: pl.DataFrame,
    controls: pl.DataFrame,
    random: pl.DataFrame,
    paper: Mapping[str, pl.DataFrame] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> pl.DataFrame:
    """METRICS of one run at one N, the height of `candidates`.

    `votes`: VOTES of randopt, random and self_consistency, each at the same sizes K, on all splits.
    `members`, `random`: `gather.with_select` of the members (rank order) and of the plan's first
    candidates; `controls`: `gather.answers` of the controls. The splits are those of the controls.
    `paper`: votes, members, controls and random once more, by the scorer's paper-compatible twin.

    Metrics: strict, lenient and, with `paper`, paper (Wilson for one answer per item; member_mean, the mean accuracy of
    the K members, by bootstrap over items); *_minus_base of every other method, and at equal K
    *_minus_self_consistency of randopt and random and *_minus_random of randopt (paired bootstrap
    over the same items).
    Differences carry the first method's cost. `resamples` and `seed` are the bootstrap's; all
    methods of a split see the same resamples.

    Raises UserError when the frames do not belong together: other members than the candidates'
    best, or methods that answered other items or at other K.
    """
    judged = {"votes": votes, "members": members, "controls": controls, "random": random}
    told = [(judged, VERDICTS), *([(paper, PAPER)] if paper else [])]
    for frames, _ in told:
        _check_members(candidates, frames["members"])
    sizes = _sizes(votes)
    searched = (int(candidates["items"].sum()), int(candidates["tokens"].sum()))
    rows: list[dict] = []
    for index, split in enumerate(SPLITS):
        for frames, verdicts in told:
            here = {name: frame.filter(pl.col("split") == split) for name, frame in frames.items()}
            if here["controls"].is_empty():
                continue
            results = list(_results(split, here, verdicts, sizes, searched))
            for row in _rows(results, confidence, resamples, (seed, index)):
                rows.append(
                    {"model": model, "task": task, "run_id": run_id, "candidates": candidates.height,
                     "split": split, **row}
                )  # fmt: skip
    return pl.DataFrame(rows, schema_overrides=dict(tables.METRICS.schema)).select(list(tables.METRICS.schema))


def chosen_k(metrics: pl.DataFrame) -> int:
    """The K at which RandOpt is best on confirm (lenient accuracy); the smallest of equals.

    `metrics`: of one run at one N (ValueError otherwise). Test plays no part in the choice.
    """
    if metrics.select("model", "task", "run_id", "candidates").n_unique() != 1:
        raise ValueError("K is chosen within one run at one N")
    rows = metrics.filter(
        (pl.col("method") == "randopt") & (pl.col("split") == "confirm") & (pl.col("metric") == "lenient")
    )
    if rows.is_empty():
        raise UserError("there is no confirm result of randopt to choose K on; give the task confirm items.")
    return int(rows.sort("value", "top_k", descending=[True, False])["top_k"][0])


def sigma_zero_reproduces_base(requests: pl.DataFrame, completions: pl.DataFrame) -> None:
    """Raise UserError, naming the items, unless σ = 0 answers as the base does, letter by letter.

    `requests`: the controls' (row 0 the base, row 1 one term with coefficient 0); `completions`:
    theirs, columns request_id, item_id, text. Where the texts differ, setting and restoring the
    weights changes something, or the engine is not deterministic: then no score can be trusted.
    """
    terms = requests["perturbation"].head(2).to_list()
    greedy = not (requests["temperature"].head(2) != 0).any()
    if len(terms) < 2 or terms[0] or [term["coefficient"] for term in terms[1]] != [0.0] or not greedy:
        raise UserError(
            f"the controls begin with the perturbations {terms}; expected the base [], then one term "
            "with σ = 0, both greedy. Remove the controls and run again."
        )
    base, zero = (
        completions.filter(pl.col("request_id") == requests["request_id"][row]).select("item_id", "text")
        for row in (BASE, SIGMA_ZERO)
    )
    both = base.join(zero, on="item_id", how="full", coalesce=True, suffix="_zero")
    differing = both.filter(pl.col("text").ne_missing(pl.col("text_zero")))["item_id"].sort().to_list()
    if differing or both.is_empty():
        named = ", ".join(differing[:10]) + (", ..." if len(differing) > 10 else "")
        raise UserError(
            f"the σ = 0 request does not reproduce the base on {len(differing)} of {both.height} items: "
            f"{named}. The weights are not restored exactly, or the engine's answers depend on how requests "
            "are batched. Check the engine's settings before believing any score of this run."
        )


def _results(
    split: str,
    frames: Mapping[str, pl.DataFrame],
    verdicts: Mapping[str, tuple[str, str]],
    sizes: list[int],
    searched: tuple[int, int],
) -> Iterator[_Result]:
    """Every method at every K on one split, told by `verdicts` (VERDICTS or PAPER)."""
    answers = {name: frame.sort("position", "item_id") for name, frame in frames.items() if name != "votes"}
    votes = frames["votes"]
    controls = answers["controls"]
    items = controls["item_id"].unique().sort()
    n = len(items)

    def grid(name: str, column: str) -> np.ndarray:
        """(answers per item, items)"""
        frame = answers[name]
        if not frame["item_id"].equals(pl.concat([items] * max(1, frame.height // n))):
            raise UserError(f"the {name} did not answer the same {split} items as the base; run again.")
        return frame[column].to_numpy().reshape(-1, n)

    def spent(name: str, k: int, skip: int = 0) -> tuple[int, int]:
        """(generations, tokens) of the first k answers to each item."""
        return k * n, int(grid(name, "completion_tokens")[skip : skip + k].sum(dtype=np.uint64))

    def with_search(k: int) -> tuple[int, int]:
        """The search answered the select items already; other splits cost k answers more."""
        more = (0, 0) if split == "select" else spent("members", k)
        return searched[0] + more[0], searched[1] + more[1]

    def singles(name: str) -> dict[str, np.ndarray]:
        """Verdict -> (answers per item, items)"""
        return {verdict: grid(name, single).astype(np.int64) for verdict, (single, _) in verdicts.items()}

    base = {name: right[BASE] for name, right in singles("controls").items()}
    yield _Result("base", 1, base, *spent("controls", 1, BASE))
    member = singles("members")
    top1 = {name: right[0] for name, right in member.items()}
    yield _Result("top1", 1, top1, *with_search(1))
    for k in sizes:
        total = {name: right[:k].sum(axis=0) for name, right in member.items()}
        yield _Result("member_mean", k, total, *with_search(k), of=k)
        for method in VOTED:
            voted = votes.filter((pl.col("method") == method) & (pl.col("top_k") == k)).sort("item_id")
            if not voted["item_id"].equals(items):
                raise UserError(f"the votes of {method} at K = {k} are not on the {split} items of the base.")
            correct = {name: voted[column].to_numpy().astype(np.int64) for name, (_, column) in verdicts.items()}
            cost = {
                "self_consistency": lambda k=k: spent("controls", k, SAMPLES),
                "random": lambda k=k: spent("random", k),
                "randopt": lambda k=k: with_search(k),
            }[method]()
            yield _Result(method, k, correct, *cost)


def _rows(results: list[_Result], confidence: float, resamples: int, seed: tuple[int, int]) -> Iterator[dict]:
    """Values and intervals of one split. Differences are kept as whole numbers, `of` divides later."""
    base = next(result for result in results if result.method == "base")
    voted = {(result.method, result.top_k): result for result in results if result.method in VOTED}
    n = len(next(iter(base.correct.values())))
    resampled: list[tuple[_Result, str, np.ndarray]] = []
    for result in results:
        for name, correct in result.correct.items():
            if result.of == 1:
                low, high = stats.wilson(int(correct.sum()), n, confidence)
                yield _row(result, name, n, float(correct.mean()), low, high)
            else:
                resampled.append((result, name, correct))
            if result is not base:
                difference = correct - result.of * base.correct[name]
                resampled.append((result, f"{name}_minus_base", difference))
            for rival in RIVALS.get(result.method, ()):
                difference = correct - voted[rival, result.top_k].correct[name]
                resampled.append((result, f"{name}_minus_{rival}", difference))
    values = np.stack([column for _, _, column in resampled], axis=1)
    lows, highs = stats.percentile_interval(stats.bootstrap_means(values, resamples, seed), confidence)
    for (result, metric, column), low, high in zip(resampled, lows, highs, strict=True):
        mean, low, high = column.mean() / result.of, low / result.of, high / result.of
        yield _row(result, metric, n, float(mean), float(low), float(high))


def _row(result: _Result, metric: str, n: int, value: float, low: float, high: float) -> dict:
    return {
        "method": result.method,
        "top_k": result.top_k,
        "metric": metric,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": n,
        "generations": result.generations,
        "tokens": result.tokens,
    }


def _sizes(votes: pl.DataFrame) -> list[int]:
    sizes = {method: sorted(votes.filter(pl.col("method") == method)["top_k"].unique()) for method in VOTED}
    if not sizes["randopt"] or any(sizes[method] != sizes["randopt"] for method in VOTED):
        raise UserError(f"the methods were voted at different K: {sizes}; run the votes again.")
    return sizes["randopt"]


def _check_members(candidates: pl.DataFrame, members: pl.DataFrame) -> None:
    found = members.select("position", "request_id").unique().sort("position")["request_id"].to_list()
    expected = rank(candidates)["request_id"].head(len(found)).to_list()
    if not found or found != expected:
        raise UserError(
            f"the members are not the best {len(found)} of these {candidates.height} candidates. "
            "Remove the members of this prefix and run again."
        )
