"""A search that is gathered in blocks: the same bytes as in one go, and every fault named after its file."""

from pathlib import Path

import pytest

from randopt import blocks, layout, tables
from randopt.errors import UserError
from randopt.gather import gather
from randopt.requests import candidate
from tests.unit.test_gather import ITEMS, RUN, make_stage

SCORER = "scores/number-v1"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(layout, "GATHER_BLOCK", 2)


def make_blocks(folder: Path, first: int, total: int = 23, size: int = 4) -> tuple:
    """A search in shards of `size`, and the blocks of its first `first` candidates."""
    requests, scores, completions = make_stage(folder, [candidate(i, 0.1) for i in range(total)], size)
    shards = [shard for shard in layout.shards(total, size) if shard[0] < first]
    files = []
    for rows in layout.gather_blocks(shards, first):
        frame = gather(requests, scores, completions, RUN, rows[1], begin=rows[0], items=ITEMS)
        files.append((rows, layout.block_file(folder, SCORER, rows)))
        tables.write(frame, tables.CANDIDATES, files[-1][1], **blocks.footer(RUN, SCORER, rows))
    return requests, scores, completions, files


@pytest.mark.parametrize("first", [23, 20, 18, 16, 9])
def test_blocks_give_the_bytes_of_a_single_gather(tmp_path, first) -> None:
    requests, scores, completions, files = make_blocks(tmp_path, first)
    assert [rows for rows, _ in files] == [(at, min(at + 8, first)) for at in range(0, first, 8)]
    once = gather(requests, scores, completions, RUN, first, items=ITEMS)
    for frame, name in ((once, "once"), (blocks.join(requests, files, RUN, SCORER), "blocks")):
        tables.write(frame, tables.CANDIDATES, tmp_path / f"{name}.parquet", run_id=RUN)
    assert (tmp_path / "once.parquet").read_bytes() == (tmp_path / "blocks.parquet").read_bytes()


def test_few_shards_are_gathered_in_one_go() -> None:
    assert layout.gather_blocks(layout.shards(8, 4), 8) == []
    assert layout.gather_blocks(layout.shards(9, 4), 9) == [(0, 8), (8, 9)]


def test_a_larger_n_shares_the_full_blocks(tmp_path) -> None:
    fewer = layout.gather_blocks(layout.shards(18, 4), 18)
    more = layout.gather_blocks(layout.shards(40, 4), 40)
    assert fewer[:2] == more[:2] and fewer[2] not in more


def test_every_fault_names_its_file(tmp_path) -> None:
    requests, _, _, files = make_blocks(tmp_path / "a", 23)
    (_, first), (rows, second), _ = files
    content = second.read_bytes()

    second.unlink()
    with pytest.raises(UserError, match=f"{second} is missing"):
        blocks.join(requests, files, RUN, SCORER)
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{second} cannot be read"):
        blocks.join(requests, files, RUN, SCORER)
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=f"{second} does not belong here: its start is 0, expected 8"):
        blocks.join(requests, files, RUN, SCORER)
    second.write_bytes(content)
    with pytest.raises(UserError, match="its scores is 'scores/number-v1', expected 'scores/number-v2'"):
        blocks.join(requests, files, RUN, "scores/number-v2")
    with pytest.raises(UserError, match="its run_id is"):
        blocks.join(requests, files, "bbbbbbbbbb", SCORER)

    frame = tables.read(second, tables.CANDIDATES).reverse()
    tables.write(frame, tables.CANDIDATES, second, **blocks.footer(RUN, SCORER, rows))
    with pytest.raises(UserError, match=f"{second} does not hold the requests 8-15"):
        blocks.join(requests, files, RUN, SCORER)
