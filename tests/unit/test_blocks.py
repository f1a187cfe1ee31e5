"""A search that is gathered in blocks: the same bytes as in one go, and every fault named after its file."""

from pathlib import Path

import polars as pl
import pytest

from randopt import blocks, layout, tables
from randopt.errors import UserError
from randopt.gather import gather, shard_range
from randopt.requests import candidate
from tests.unit.test_gather import ITEMS, RUN, change, make_stage

SCORER = "scores/number-v1"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(layout, "GATHER_BLOCK", 2)


def make_blocks(folder: Path, first: int, total: int = 23, size: int = 4) -> tuple[Path, list[Path]]:
    """A search in shards of `size`: its requests, and the blocks of its first `first` candidates."""
    requests, scores, completions = make_stage(folder, [candidate(i, 0.1) for i in range(total)], size)
    return requests, gather_blocks(folder, requests, scores, completions, first, total, size)


def gather_blocks(folder, requests, scores, completions, first, total, size, items=ITEMS) -> list[Path]:
    shards = [shard for shard in layout.shards(total, size) if shard[0] < first]
    paths = []
    for rows in layout.gather_blocks(shards, first):
        held = [[p for p in files if overlap(p, rows)] for files in (scores, completions)]
        frame = gather(requests, *held, RUN, rows[1], begin=rows[0], scorer=("number", 1), items=items)
        paths.append(layout.block_file(folder, SCORER, rows))
        tables.write(frame, tables.BLOCK, paths[-1], **blocks.footer(RUN, SCORER, rows))
    return paths


def overlap(path: Path, rows: layout.Shard) -> bool:
    start, stop = shard_range(path)
    return start < rows[1] and stop > rows[0]


def same_bytes(folder: Path, *frames: pl.DataFrame) -> bool:
    """Whether the frames make one and the same candidates.parquet."""
    written = set()
    for frame in frames:
        tables.write(frame, tables.CANDIDATES, folder / "candidates.parquet", run_id=RUN)
        written.add((folder / "candidates.parquet").read_bytes())
    return len(written) == 1


@pytest.mark.parametrize("first", [23, 20, 18, 16, 9])
def test_blocks_give_the_bytes_of_a_single_gather(tmp_path, first) -> None:
    requests, paths = make_blocks(tmp_path, first)
    assert [shard_range(path) for path in paths] == [(at, min(at + 8, first)) for at in range(0, first, 8)]
    shards = [sorted((tmp_path / name).glob("*.parquet")) for name in ("scores", "completions")]
    once = gather(requests, *shards, RUN, first, items=ITEMS)
    assert same_bytes(tmp_path, once, blocks.join(requests, paths, RUN, first, SCORER))


def test_more_rows_than_a_row_group_are_the_same_bytes_too(tmp_path) -> None:
    """Polars cuts tables of more than 2^18 rows by the chunks they lie in, which blocks bring along."""
    total, first, size = 290_000, 280_001, 70_000
    ids = [f"{row:016x}" for row in range(total)]
    plan = pl.DataFrame({"request_id": ids}).with_columns(
        perturbation=pl.concat_list(pl.struct(seed=pl.int_range(total, dtype=pl.UInt64), coefficient=pl.lit(0.1))),
        temperature=0.0,
        sample_seed=0,
    )
    tables.write(plan, tables.REQUESTS, tmp_path / "requests.parquet", run_id=RUN)
    files: tuple[list[Path], list[Path]] = ([], [])
    for shard in layout.shards(total, size):
        rows = pl.DataFrame({"request_id": ids[slice(*shard)]}).with_columns(
            item_id=pl.lit(ITEMS[0]),
            reward=pl.int_range(pl.len()) % 2,
            strict=True,
            lenient=True,
            vote_key=None,
            scorer=pl.lit("number"),
            scorer_version=1,
            text=pl.lit("4"),
            finish_reason=pl.lit("stop"),
            prompt_tokens=9,
            completion_tokens=1,
        )
        place = {"run_id": RUN, "stage": "search", "start": shard[0], "stop": shard[1]}
        for table, into in zip((tables.SCORES, tables.COMPLETIONS), files, strict=True):
            into.append(layout.shard_file(tmp_path, "search", table.name, shard))
            tables.write(rows, table, into[-1], **place)
    requests = tmp_path / "requests.parquet"
    paths = gather_blocks(tmp_path, requests, *files, first, total, size, ITEMS[:1])
    assert [shard_range(path) for path in paths] == [(0, 140_000), (140_000, 280_000), (280_000, 280_001)]
    once = gather(requests, *files, RUN, first, items=ITEMS[:1])
    assert same_bytes(tmp_path, once, blocks.join(requests, paths, RUN, first, SCORER))


def test_few_shards_are_gathered_in_one_go() -> None:
    assert layout.gather_blocks(layout.shards(8, 4), 8) == []
    assert layout.gather_blocks(layout.shards(9, 4), 9) == [(0, 8), (8, 9)]


def test_a_larger_n_shares_the_full_blocks(tmp_path) -> None:
    fewer = layout.gather_blocks(layout.shards(18, 4), 18)
    more = layout.gather_blocks(layout.shards(40, 4), 40)
    assert fewer[:2] == more[:2] and fewer[2] not in more


def test_every_fault_names_its_file(tmp_path) -> None:
    requests, paths = make_blocks(tmp_path, 23)
    first, second, third = paths
    content = second.read_bytes()

    def refused(message: str, files=paths, n: int = 23, run: str = RUN, scorer: str = SCORER) -> None:
        with pytest.raises(UserError, match=message):
            blocks.join(requests, files, run, n, scorer)

    refused("no file of blocks covers rows 00008-00015 of", [first, third])
    refused("24 were asked for", n=24)
    refused(f"{third} reaches past the first 20 candidates", n=20)
    doubled = layout.block_file(tmp_path, SCORER, (16, 20))
    refused(f"{doubled} and {third} both hold row 16", [*paths, doubled])
    refused("does not belong here: its scores is 'scores/number-v1', expected", scorer="scores/number-v2")

    second.unlink()
    refused(f"{second} is missing")
    second.write_bytes(content[: len(content) // 2])
    refused(f"{second} cannot be read")
    second.write_bytes(first.read_bytes())
    refused(f"{second} does not belong here: its start is 0, expected 8")

    frame = tables.read(first, tables.BLOCK)
    tables.write(frame, tables.BLOCK, second, **blocks.footer(RUN, SCORER, (8, 16)))
    refused(f"{second} does not hold the rows 8-15")
    tables.write(frame, tables.BLOCK, second, **blocks.footer("bbbbbbbbbb", SCORER, (8, 16)))
    refused(f"{second} does not belong here: its run_id is 'bbbbbbbbbb'")
    tables.write(frame, tables.CANDIDATES, second, **blocks.footer(RUN, SCORER, (8, 16)))
    refused(f"{second} does not belong here: its table is 'candidates', expected 'block'")


def test_a_shard_of_another_scorer_does_not_get_into_a_block(tmp_path) -> None:
    """Two blocks of one scorer each would otherwise be ranked against each other."""
    requests, scores, completions = make_stage(tmp_path, [candidate(i, 0.1) for i in range(16)], 4)
    for path in scores[2:]:
        change(path, tables.SCORES, lambda frame: frame.with_columns(scorer_version=pl.lit(2, pl.UInt32)))
    with pytest.raises(UserError, match=r"00008-00011\.parquet was scored by \('number', 2\), but it stands for"):
        gather_blocks(tmp_path, requests, scores, completions, 16, 16, 4)
