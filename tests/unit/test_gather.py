"""Gathering: right numbers, the same bytes each time, and every fault named after its file."""

import math
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from randopt import tables
from randopt.errors import UserError
from randopt.gather import answers, gather, shard_range, with_select
from randopt.requests import Request, candidate, to_rows

RUN = "aaaaaaaaaa"
ITEMS = [f"select-{i:05d}" for i in range(5)]


def make_stage(
    folder: Path,
    requests: list[Request],
    shard: int,
    stage: str = "search",
    items: list[str] = ITEMS,
    run_id: str = RUN,
    shuffle: bool = False,
) -> tuple[Path, list[Path], list[Path]]:
    """Requests, scores and completions as the workflow leaves them; rewards are not just 0 and 1."""
    frame = pl.DataFrame(to_rows(requests), schema=tables.REQUESTS.schema)
    tables.write(frame, tables.REQUESTS, folder / "requests.parquet", run_id=run_id)
    scores, completions = [], []
    for start in range(0, len(requests), shard):
        ids = [request.request_id for request in requests[start : start + shard]]
        rows = pl.DataFrame({"request_id": ids}).join(pl.DataFrame({"item_id": items}), how="cross")
        generator = np.random.default_rng(start)
        rows = rows.with_columns(
            reward=pl.Series(generator.random(rows.height), dtype=pl.Float32),
            strict=pl.Series(generator.random(rows.height) < 0.4),
            lenient=pl.Series(generator.random(rows.height) < 0.6),
            vote_key=pl.Series(generator.integers(0, 3, rows.height)).cast(pl.String),
            scorer=pl.lit("number"),
            scorer_version=pl.lit(1),
            text=pl.lit("so 4"),
            finish_reason=pl.lit("stop"),
            prompt_tokens=pl.lit(9),
            completion_tokens=pl.Series(generator.integers(1, 50, rows.height)),
        )
        if shuffle:
            rows = rows.sample(fraction=1, shuffle=True, seed=start)
        footer = {"run_id": run_id, "stage": stage, "start": start, "stop": start + len(ids)}
        name = f"{start:05d}-{start + len(ids) - 1:05d}.parquet"
        for table, into in ((tables.SCORES, scores), (tables.COMPLETIONS, completions)):
            into.append(folder / table.name / name)
            tables.write(rows, table, into[-1], **footer)
    return folder / "requests.parquet", scores, completions


def change(path: Path, table: tables.Table, edit) -> None:
    """Rewrite a shard with `edit(frame)`, footer kept; past our own writer's checks."""
    footer = pl.read_parquet_metadata(path)[tables.FOOTER_KEY]
    edit(tables.read(path, table)).write_parquet(path, metadata={tables.FOOTER_KEY: footer})


@pytest.fixture
def plan() -> list[Request]:
    return [candidate(42 + i, (0.001, 0.002)[i % 2]) for i in range(10)]


def test_numbers(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 4)
    got = gather(requests, scores, completions, RUN, 10)
    tables.write(got, tables.CANDIDATES, tmp_path / "candidates.parquet", run_id=RUN)
    assert got["seed"].to_list() == list(range(42, 52))
    assert got["sigma"].to_list() == [0.001, 0.002] * 5
    scored, counted = tables.read_all(scores, tables.SCORES), tables.read_all(completions, tables.COMPLETIONS)
    for row in got.iter_rows(named=True):
        mine = scored.filter(pl.col("request_id") == row["request_id"])
        reward = mine["reward"].cast(pl.Float64).to_list()
        mean = math.fsum(reward) / 5
        variance = math.fsum((value - mean) ** 2 for value in reward) / 4
        assert row["reward"] == pytest.approx(mean, abs=1e-15)
        assert row["standard_error"] == pytest.approx(math.sqrt(variance / 5), rel=1e-12)
        assert row["strict"] == mine["strict"].mean() and row["lenient"] == mine["lenient"].mean()
        tokens = counted.filter(pl.col("request_id") == row["request_id"])["completion_tokens"].sum()
        assert (row["tokens"], row["items"], row["status"]) == (tokens, 5, "complete")


def test_same_bytes_whatever_the_order_and_the_threads(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path / "a", plan, 3)
    expected = gather(requests, scores, completions, RUN, 10, threads=1)
    _, mixed, mixed_completions = make_stage(tmp_path / "b", plan, 3, shuffle=True)
    # the shuffled files hold the same values: only rows moved
    for threads in (1, 8):
        got = gather(requests, mixed[::-1], mixed_completions[::-1], RUN, 10, threads=threads)
        assert got.equals(expected)
        for name, frame in (("x", expected), ("y", got)):
            tables.write(frame, tables.CANDIDATES, tmp_path / name, run_id=RUN)
        assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_prefix_is_the_smaller_run(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 4)
    whole = gather(requests, scores, completions, RUN, 10)
    for first in range(1, 11):
        assert gather(requests, scores, completions, RUN, first).equals(whole.head(first))
    # shards past the prefix may be absent, or broken
    scores[2].write_bytes(b"torn")
    assert gather(requests, scores, completions[:2], RUN, 6).equals(whole.head(6))


def test_one_item_has_no_standard_error(tmp_path: Path, plan: list[Request]) -> None:
    files = make_stage(tmp_path, plan, 10, items=ITEMS[:1])
    assert gather(*files, RUN, 10)["standard_error"].to_list() == [0.0] * 10


def test_missing_shards_are_named_by_range(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 2)
    with pytest.raises(UserError, match=r"no file of scores covers rows 00002-00003, 00008-00009 of"):
        gather(requests, [scores[0], *scores[2:4]], completions, RUN, 10)
    with pytest.raises(UserError, match=r"no file of completions covers rows 00000-00009"):
        gather(requests, scores, [], RUN, 10)


@pytest.mark.parametrize("first", [0, 11])
def test_a_prefix_outside_the_plan(tmp_path: Path, plan: list[Request], first: int) -> None:
    with pytest.raises(UserError, match=f"holds 10 candidates; {first} were asked for"):
        gather(*make_stage(tmp_path, plan, 5), RUN, first)


def test_overlapping_shards(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path / "a", plan, 5)
    _, others, _ = make_stage(tmp_path / "b", plan, 4)
    with pytest.raises(UserError, match=r"00000-00003\.parquet and .*00000-00004\.parquet both hold row 0"):
        gather(requests, [*scores, others[0]], completions, RUN, 10)


def test_a_shard_past_the_plan(tmp_path: Path, plan: list[Request]) -> None:
    requests, _, _ = make_stage(tmp_path / "a", plan[:9], 5)
    _, scores, completions = make_stage(tmp_path / "b", plan, 5)
    with pytest.raises(UserError, match=r"00005-00009\.parquet reaches past the 9 rows"):
        gather(requests, scores, completions, RUN, 9)


def test_a_shard_of_another_run_or_stage_or_range(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path / "a", plan, 5)
    _, foreign, _ = make_stage(tmp_path / "b", plan, 5, run_id="bbbbbbbbbb")
    with pytest.raises(UserError, match=r"b/scores/00005-00009\.parquet .* its run_id is 'bbbbbbbbbb'"):
        gather(requests, [scores[0], foreign[1]], completions, RUN, 10)
    _, members, _ = make_stage(tmp_path / "c", plan, 5, stage="n00048/members")
    with pytest.raises(UserError, match=r"c/scores/00005-00009\.parquet .* its stage is"):
        gather(requests, [scores[0], members[1]], completions, RUN, 10)
    shutil.copy(scores[0], scores[1])
    with pytest.raises(UserError, match=r"00005-00009\.parquet .* its start is 0, expected 5"):
        gather(requests, scores, completions, RUN, 10)
    with pytest.raises(UserError, match=r"its table is 'completions', expected 'scores'"):
        gather(requests, completions, completions, RUN, 10)


def test_a_shard_of_another_plan(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path / "a", plan, 5)
    _, others, _ = make_stage(tmp_path / "b", [candidate(900 + i, 0.001) for i in range(10)], 5)
    with pytest.raises(UserError, match=r"b/scores/00005-00009\.parquet holds request .* none of the rows 5-9"):
        gather(requests, [scores[0], others[1]], completions, RUN, 10)


@pytest.mark.parametrize("table", [tables.SCORES, tables.COMPLETIONS])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda frame: frame.filter(pl.col("item_id") != ITEMS[3]),
            r"lacks request .*, item select-00003 \(5",
        ),
        (lambda frame: frame.head(23), r"lacks request .* \(2 of 25 rows"),
        (lambda frame: pl.concat([frame, frame.tail(1)]), "item select-00004 more than once"),
        (lambda frame: pl.concat([frame.head(24), frame.head(1)]), "item select-00000 more than once"),
        (
            lambda frame: frame.with_columns(pl.col("item_id").str.replace("00002", "00009")),
            "holds item select-00009",
        ),
    ],
)
def test_wrong_rows(tmp_path: Path, plan: list[Request], table: tables.Table, edit, message: str) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 5)
    broken = {"scores": scores, "completions": completions}[table.name][1]
    change(broken, table, edit)
    with pytest.raises(UserError, match=rf"{table.name}/00005-00009\.parquet .*{message}"):
        gather(requests, scores, completions, RUN, 10)


def test_the_first_shard_is_held_against_the_items_when_given(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 10)
    for path, table in ((scores[0], tables.SCORES), (completions[0], tables.COMPLETIONS)):
        change(path, table, lambda frame: frame.filter(pl.col("item_id") != ITEMS[3]))
    assert gather(requests, scores, completions, RUN, 10)["items"].unique().to_list() == [4]
    with pytest.raises(UserError, match=r"00000-00009\.parquet lacks request"):
        gather(requests, scores, completions, RUN, 10, items=ITEMS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rewards_are_finite(tmp_path: Path, plan: list[Request], value: float) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 5)
    bad = pl.when(pl.int_range(pl.len()) == 7).then(value).otherwise(pl.col("reward")).cast(pl.Float32)
    change(scores[1], tables.SCORES, lambda frame: frame.with_columns(reward=bad))
    with pytest.raises(UserError, match=r"00005-00009\.parquet holds a reward of .* item select-00002"):
        gather(requests, scores, completions, RUN, 10)


def test_two_scorers_are_not_compared(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 5)
    newer = pl.lit(2, pl.UInt32).alias("scorer_version")
    change(scores[1], tables.SCORES, lambda frame: frame.with_columns(newer))
    with pytest.raises(UserError, match=r"00005-00009\.parquet was scored by \('number', 2\)"):
        gather(requests, scores, completions, RUN, 10)


def test_a_torn_shard(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 5)
    scores[1].write_bytes(scores[1].read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00005-00009\.parquet cannot be read"):
        gather(requests, scores, completions, RUN, 10)


def test_only_candidates_are_gathered(tmp_path: Path, plan: list[Request]) -> None:
    with pytest.raises(UserError, match="row 2 is no candidate"):
        gather(*make_stage(tmp_path, [*plan[:2], Request()], 3), RUN, 3)


def test_shard_names() -> None:
    assert shard_range(Path("a/00064-00127.parquet")) == (64, 128)
    assert shard_range(Path("123456-123456.parquet")) == (123456, 123457)
    for name in ("0-63.parquet", "00064-00063.parquet", "00000-00063.part", "00000-00063.parquet.tmp"):
        with pytest.raises(UserError, match="is not a shard's name"):
            shard_range(Path(name))


def test_answers_read_only_the_files_they_need(tmp_path: Path, plan: list[Request]) -> None:
    requests, scores, completions = make_stage(tmp_path, plan, 2)
    ids = [plan[7].request_id, plan[0].request_id]
    for number in (1, 2, 4):
        scores[number].unlink()
    got = answers(requests, scores, completions, RUN, "search", only=ids)
    assert got["position"].to_list() == [0] * 5 + [7] * 5
    assert got["item_id"].to_list() == ITEMS * 2 and set(got["split"]) == {"select"}
    expected = tables.read(scores[3], tables.SCORES).filter(pl.col("request_id") == ids[0])
    for name in ("strict", "lenient", "vote_key"):
        assert got.tail(5)[name].to_list() == expected[name].to_list()
    with pytest.raises(UserError, match="lacks the request feed"):
        answers(requests, scores, completions, RUN, "search", only=["feed"])


def test_members_join_what_the_search_knows(tmp_path: Path, plan: list[Request]) -> None:
    search = make_stage(tmp_path / "search", plan, 4)
    chosen = [plan[6], plan[1], plan[3]]
    later = [f"{split}-{i:05d}" for split in ("confirm", "test") for i in range(3)]
    stage = make_stage(tmp_path / "n00010" / "members", chosen, 2, stage="n00010/members", items=later)
    members = answers(*stage, RUN, "n00010/members", items=later)
    found = answers(*search, RUN, "search", only=[member.request_id for member in chosen])
    whole = with_select(members, found)
    assert whole.columns == members.columns and whole.height == 3 * (5 + 6)
    order = whole.select("position", "request_id").unique().sort("position")["request_id"].to_list()
    assert order == [member.request_id for member in chosen]
    assert whole.filter(pl.col("split") != "select").equals(members)
    with pytest.raises(UserError, match=f"no scores of request {plan[1].request_id}"):
        with_select(members, found.filter(pl.col("request_id") != plan[1].request_id))
