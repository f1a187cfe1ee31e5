"""Metrics by hand on a few items, and on a synthetic population whose truth is known."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from randopt import stats, tables
from randopt.errors import UserError
from randopt.metrics import chosen_k, metrics, sigma_zero_reproduces_base
from randopt.report.table import difference_sentence, render, to_markdown
from randopt.requests import Decoding, Request, candidate, to_rows
from randopt.select import rank
from randopt.vote import votes

SIZES = {"select": 40, "confirm": 30, "test": 60}


@dataclass(frozen=True)
class Population:
    """The frames that `metrics` takes, made up."""

    candidates: pl.DataFrame
    votes: pl.DataFrame
    members: pl.DataFrame
    controls: pl.DataFrame
    random: pl.DataFrame

    def metrics(self, **changes) -> pl.DataFrame:
        given = {
            "model": "tiny", "task": "sums", "run_id": "aaaaaaaaaa", "resamples": 400,
            **{name: getattr(self, name) for name in self.__dataclass_fields__}, **changes,
        }  # fmt: skip
        return metrics(**given)


def answer_rows(
    generator: np.random.Generator, ids: list[str], skills: np.ndarray, sizes: dict[str, int], easy: dict
) -> pl.DataFrame:
    """Answers of requests of given skill to every item: right where skill + the item's ease is high."""
    frames = []
    for position, (request_id, skill) in enumerate(zip(ids, skills, strict=True)):
        for split, n in sizes.items():
            right = generator.random(n) < np.clip(skill + easy[split], 0.02, 0.98)
            wrong = generator.integers(1, 6, n).astype(str)
            silent = ~right & (generator.random(n) < 0.2)
            keys = [None if s else ("0" if r else w) for r, w, s in zip(right, wrong, silent, strict=True)]
            frames.append(
                pl.DataFrame(
                    {
                        "position": pl.Series([position] * n, dtype=pl.UInt32),
                        "request_id": [request_id] * n,
                        "item_id": [f"{split}-{i:05d}" for i in range(n)],
                        "split": [split] * n,
                        "strict": right & (generator.random(n) < 0.85),
                        "lenient": right,
                        "vote_key": pl.Series(keys, dtype=pl.String),
                        "completion_tokens": pl.Series(generator.integers(3, 20, n), dtype=pl.UInt32),
                    }
                )
            )
    return pl.concat(frames)


def populate(
    n: int = 48,
    top_k: tuple[int, ...] = (1, 3, 5, 9),
    sigmas: tuple[float, ...] = (0.002, 0.005, 0.01),
    base: float = 0.45,
    sizes: dict[str, int] = SIZES,
    seed: int = 0,
) -> Population:
    """A search over n candidates whose skills scatter around the base's, more so at larger σ."""
    generator = np.random.default_rng(seed)
    easy = {split: generator.normal(0, 0.25, size) for split, size in sizes.items()}
    plan = [candidate(42 + i, sigmas[i % len(sigmas)]) for i in range(n)]
    ids = [request.request_id for request in plan]
    place = np.arange(n) % len(sigmas)
    skills = base - 0.04 * place + generator.normal(0, 1, n) * 0.06 * (1 + place)
    search = answer_rows(generator, ids, skills, {"select": sizes["select"]}, easy)
    means = search.group_by("request_id", maintain_order=True).agg(
        reward=pl.col("lenient").mean(),
        strict=pl.col("strict").mean(),
        lenient=pl.col("lenient").mean(),
        tokens=pl.col("completion_tokens").sum(),
    )
    candidates = means.with_columns(
        seed=pl.Series([request.perturbation[0][0] for request in plan], dtype=pl.UInt64),
        sigma=pl.Series([request.perturbation[0][1] for request in plan]),
        standard_error=pl.lit(0.05),
        items=pl.lit(sizes["select"], pl.UInt32),
        status=pl.lit("complete"),
    )
    k_max, later = max(top_k), {name: sizes[name] for name in sizes if name != "select"}

    def with_search(chosen: list[str]) -> pl.DataFrame:
        rows = answer_rows(generator, chosen, skills[[ids.index(name) for name in chosen]], later, easy)
        places = pl.DataFrame({"request_id": chosen}).with_row_index("position")
        seen = search.drop("position").join(places, on="request_id").select(rows.columns)
        return pl.concat([seen, rows])

    members = with_search(rank(candidates)["request_id"].head(k_max).to_list())
    random = with_search(ids[:k_max])
    controls = [Request(), candidate(42, 0.0), *(Request((), Decoding(0.7, i)) for i in range(k_max))]
    control = answer_rows(
        generator, [request.request_id for request in controls], np.full(len(controls), base), sizes, easy
    )
    voted = pl.concat(
        [
            votes(members, top_k, "randopt"),
            votes(random, top_k, "random"),
            votes(control.filter(pl.col("position") >= 2), top_k, "self_consistency"),
        ]
    )
    return Population(candidates, voted, members, control, random)


@pytest.fixture(scope="module")
def population() -> Population:
    return populate()


@pytest.fixture(scope="module")
def frame(population: Population) -> pl.DataFrame:
    return population.metrics()


def pick(frame: pl.DataFrame, method: str, k: int, split: str, metric: str) -> dict:
    rows = frame.filter(method=method, top_k=k, split=split, metric=metric)
    assert rows.height == 1
    return rows.row(0, named=True)


def test_the_table_is_complete(frame: pl.DataFrame, tmp_path) -> None:
    tables.write(frame, tables.METRICS, tmp_path / "metrics.parquet", run_id="aaaaaaaaaa")
    # per split: base 2; top1 4; K times (member_mean 4, self_consistency 4, random 6, randopt 8)
    assert frame.height == 3 * (2 + 4 + 4 * 22)
    assert frame["candidates"].unique().to_list() == [48]
    inside = frame.select((pl.col("ci_low") <= pl.col("value")) & (pl.col("value") <= pl.col("ci_high")))
    assert inside.to_series().all()


def test_values_and_wilson(population: Population, frame: pl.DataFrame) -> None:
    for split, n in SIZES.items():
        base = population.controls.filter(position=0, split=split)
        top1 = population.members.filter(position=0, split=split)
        for verdict in ("strict", "lenient"):
            for name, rows in (("base", base), ("top1", top1)):
                row = pick(frame, name, 1, split, verdict)
                assert (row["value"], row["n"]) == (rows[verdict].mean(), n)
                assert (row["ci_low"], row["ci_high"]) == stats.wilson(rows[verdict].sum(), n)
            for method in ("randopt", "random", "self_consistency"):
                voted = population.votes.filter(method=method, top_k=5, split=split)
                assert pick(frame, method, 5, split, verdict)["value"] == voted[verdict].mean()


def test_member_mean(population: Population, frame: pl.DataFrame) -> None:
    for k in (1, 3, 9):
        rows = population.members.filter(pl.col("position") < k, split="test")
        got = pick(frame, "member_mean", k, "test", "lenient")
        assert got["value"] == pytest.approx(rows["lenient"].mean())
        per_item = rows.group_by("item_id", maintain_order=True).agg(pl.col("lenient").mean()).sort("item_id")
        if k > 1:
            low, high = stats.bootstrap_interval(per_item["lenient"].to_numpy(), 0.95, 400, (0, 2))
            assert (got["ci_low"], got["ci_high"]) == pytest.approx((low, high))


def test_differences_are_paired_by_item(population: Population, frame: pl.DataFrame) -> None:
    voted = population.votes.filter(method="randopt", top_k=5, split="test").sort("item_id")
    peer = population.votes.filter(method="self_consistency", top_k=5, split="test").sort("item_id")
    base = population.controls.filter(position=0, split="test").sort("item_id")
    for verdict in ("strict", "lenient"):
        for name, other in (("base", base), ("self_consistency", peer)):
            row = pick(frame, "randopt", 5, "test", f"{verdict}_minus_{name}")
            expected = stats.paired_difference(voted[verdict].to_numpy(), other[verdict].to_numpy(), 0.95, 400, (0, 2))
            assert (row["value"], row["ci_low"], row["ci_high"]) == pytest.approx(expected)


def test_rows_may_come_in_any_order(population: Population, frame: pl.DataFrame) -> None:
    mixed = {
        name: getattr(population, name).sample(fraction=1, shuffle=True, seed=1)
        for name in ("votes", "members", "controls", "random", "candidates")
    }
    assert population.metrics(**mixed).equals(frame)


def test_the_paper_verdicts_stand_beside(population: Population, frame: pl.DataFrame) -> None:
    """By the twin's strict for single answers, by its lenient for votes; all else stays as it is."""
    twin = populate(seed=0)
    flip = {"strict": ~pl.col("strict"), "lenient": ~pl.col("lenient")}
    told = {name: getattr(twin, name).with_columns(**flip) for name in ("votes", "members", "controls", "random")}
    both = population.metrics(paper=told)
    by_paper = pl.col("metric").str.starts_with("paper")
    assert both.filter(~by_paper).equals(frame)
    assert both.filter(by_paper).height == frame.height / 2
    for method, k, column in (("base", 1, "strict"), ("member_mean", 5, "strict"), ("randopt", 5, "lenient")):
        value = pick(frame, method, k, "test", column)["value"]
        assert pick(both, method, k, "test", "paper")["value"] == pytest.approx(1 - value)
    assert both.filter(by_paper).select("generations").max().equals(frame.select("generations").max())
    assert "paper %" in shown(both) and "paper %" not in shown(frame)
    with pytest.raises(UserError, match="the members are not the best"):
        population.metrics(paper={**told, "members": told["members"].filter(pl.col("position") > 0)})


def test_costs(population: Population, frame: pl.DataFrame) -> None:
    def cost(method: str, k: int, split: str) -> tuple[int, int]:
        row = pick(frame, method, k, split, "lenient")
        return row["generations"], row["tokens"]

    def tokens(rows: pl.DataFrame, positions: range, split: str) -> int:
        chosen = rows.filter(pl.col("position").is_in(list(positions)), split=split)
        return chosen["completion_tokens"].sum()

    searched = population.candidates["tokens"].sum()
    assert cost("base", 1, "test") == (60, tokens(population.controls, range(1), "test"))
    assert cost("self_consistency", 5, "test") == (300, tokens(population.controls, range(2, 7), "test"))
    assert cost("random", 5, "select") == (200, tokens(population.random, range(5), "select"))
    assert cost("randopt", 5, "select") == (48 * 40, searched)
    assert cost("top1", 1, "select") == (48 * 40, searched)
    expected = (48 * 40 + 5 * 30, searched + tokens(population.members, range(5), "confirm"))
    assert cost("randopt", 5, "confirm") == cost("member_mean", 5, "confirm") == expected
    assert cost("top1", 1, "test") == (48 * 40 + 60, searched + tokens(population.members, range(1), "test"))


def test_confidence_resamples_and_seed_are_arguments(population: Population, frame: pl.DataFrame) -> None:
    wide = population.metrics(confidence=0.99)
    narrow = population.metrics(confidence=0.5)
    difference = ("randopt", 5, "test", "lenient_minus_base")
    for key in (difference, ("base", 1, "test", "lenient")):
        a, b = pick(wide, *key), pick(narrow, *key)
        assert a["ci_low"] < b["ci_low"] <= b["ci_high"] < a["ci_high"]
    assert pick(population.metrics(seed=1), *difference) != pick(frame, *difference)


def test_chosen_k_looks_at_confirm_alone(frame: pl.DataFrame) -> None:
    def with_values(split: str, values: dict[int, float]) -> pl.DataFrame:
        here = (pl.col("split") == split) & (pl.col("method") == "randopt") & (pl.col("metric") == "lenient")
        new = pl.col("top_k").replace_strict(values, return_dtype=pl.Float64, default=None)
        return frame.with_columns(value=pl.when(here).then(new).otherwise("value"))

    assert chosen_k(with_values("confirm", {1: 0.4, 3: 0.6, 5: 0.6, 9: 0.5})) == 3
    assert chosen_k(with_values("confirm", {1: 0.4, 3: 0.5, 5: 0.6, 9: 0.7})) == 9
    before = chosen_k(frame)
    assert chosen_k(with_values("test", {k: float(k != before) for k in (1, 3, 5, 9)})) == before
    with pytest.raises(UserError, match="no confirm result"):
        chosen_k(frame.filter(pl.col("split") != "confirm"))
    with pytest.raises(ValueError, match="one run at one N"):
        chosen_k(pl.concat([frame, frame.with_columns(candidates=pl.lit(9, pl.UInt32))]))


def test_members_must_be_the_best_of_these_candidates(population: Population) -> None:
    swapped = population.members.with_columns(position=pl.col("position").replace({0: 1, 1: 0}).cast(pl.UInt32))
    with pytest.raises(UserError, match="the members are not the best 9 of these 48 candidates"):
        population.metrics(members=swapped)


def test_methods_must_answer_the_same_items_at_the_same_k(population: Population) -> None:
    item = pl.col("item_id") != "test-00003"
    with pytest.raises(UserError, match="the random did not answer the same test items"):
        population.metrics(random=population.random.filter(item))
    with pytest.raises(UserError, match=r"votes of self_consistency at K = 1 are not on the test items"):
        population.metrics(votes=population.votes.filter(item | (pl.col("method") != "self_consistency")))
    missing = population.votes.filter((pl.col("method") != "random") | (pl.col("top_k") != 9))
    with pytest.raises(UserError, match="voted at different K"):
        population.metrics(votes=missing)


def test_a_task_without_a_split_lacks_its_rows(population: Population, frame: pl.DataFrame) -> None:
    keep = pl.col("split") != "confirm"
    got = population.metrics(
        **{name: getattr(population, name).filter(keep) for name in ("votes", "members", "controls", "random")}
    )
    assert got.equals(frame.filter(keep))


def control_texts() -> tuple[pl.DataFrame, pl.DataFrame]:
    requests = [Request(), candidate(42, 0.0), Request((), Decoding(0.7, 0))]
    rows = [
        {"request_id": request.request_id, "item_id": f"test-{i:05d}", "text": f"{i}" if number < 2 else "x"}
        for number, request in enumerate(requests)
        for i in range(4)
    ]
    return pl.DataFrame(to_rows(requests), schema=tables.REQUESTS.schema), pl.DataFrame(rows)


def test_sigma_zero_must_reproduce_the_base() -> None:
    requests, completions = control_texts()
    sigma_zero_reproduces_base(requests, completions)
    zero = pl.col("request_id") == requests["request_id"][1]
    wrong = zero & pl.col("item_id").is_in(["test-00001", "test-00003"])
    altered = completions.with_columns(text=pl.when(wrong).then(pl.lit("?")).otherwise("text"))
    with pytest.raises(UserError, match=r"on 2 of 4 items: test-00001, test-00003\."):
        sigma_zero_reproduces_base(requests, altered)
    with pytest.raises(UserError, match=r"on 2 of 4 items"):  # an absent answer is no equal answer
        sigma_zero_reproduces_base(requests, completions.filter(~wrong))
    with pytest.raises(UserError, match="0 of 0 items"):
        sigma_zero_reproduces_base(requests, completions.filter(pl.lit(False)))
    for other in (requests.reverse(), requests.head(1)):
        with pytest.raises(UserError, match="the controls begin with"):
            sigma_zero_reproduces_base(other, completions)


def test_a_difference_claims_no_more_than_its_interval() -> None:
    def said(value: float, low: float, high: float) -> str:
        return difference_sentence({"value": value, "ci_low": low, "ci_high": high}, "base")

    assert said(0.12, 0.03, 0.21) == "RandOpt − base: +12.0 points [95 % CI +3.0, +21.0]; RandOpt is higher."
    assert said(-0.12, -0.21, -0.03).endswith("−12.0 points [95 % CI −21.0, −3.0]; RandOpt is lower.")
    for low, high in ((-0.01, 0.2), (0.0, 0.2), (-0.2, 0.0), (0.0, 0.0)):
        assert said(0.0, low, high).endswith("the interval includes 0: no difference shown.")


def shown(frames) -> str:
    console = Console(width=170, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(frames))
    return console.export_text()


def test_the_table_shows_every_method_and_the_choice(frame: pl.DataFrame) -> None:
    text, markdown = shown(frame), to_markdown(frame)
    k = chosen_k(frame)
    base = pick(frame, "base", 1, "test", "lenient")
    cell = f"{100 * base['value']:.1f} [{100 * base['ci_low']:.1f}–{100 * base['ci_high']:.1f}]"
    for output in (text, markdown):
        assert cell in output and "1,920" not in output.split("K = ")[0].split("\n")[0]
        assert f"N = 48: K = {k} is the best on confirm" in output
        assert "RandOpt − base: " in output and f"RandOpt − self-consistency (K = {k}): " in output
    assert "seen by<br>the search" in markdown
    assert markdown.count("\n| ") == 1 + 2 + 4 * 4 and f"| **RandOpt** | {k} |" in markdown


def test_the_table_of_several_searches(frame: pl.DataFrame) -> None:
    smaller = frame.with_columns(candidates=pl.lit(24, pl.UInt32))
    markdown = to_markdown([smaller, frame])
    assert markdown.count("### ") == 1 and "N = 24, 48" in markdown
    assert markdown.count("| base |") == 1 and markdown.count("| self-consistency | 5 |") == 1
    assert "top-1 (N = 24)" in markdown and "RandOpt (N = 48)" in markdown
    other = frame.with_columns(task=pl.lit("other"))
    assert to_markdown([frame, other]).count("### ") == 2


def test_the_table_without_confirm_or_metrics(frame: pl.DataFrame) -> None:
    assert "no K can be chosen" in to_markdown(frame.filter(pl.col("split") != "confirm"))
    assert "no test items" in to_markdown(frame.filter(pl.col("split") != "test"))
    with pytest.raises(UserError, match="no metrics to show"):
        render([])
