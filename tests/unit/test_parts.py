"""Part files without Snakemake and without a model: what counts as finished, and what does not."""

import logging
import random
import shutil
from pathlib import Path

import polars as pl
import pytest

from randopt import layout, parts, tables
from randopt.engines import Completion
from randopt.errors import UserError
from randopt.requests import Request, candidate

ITEMS = ["select-00000", "select-00001", "select-00002"]
FOOTER = {"run_id": "aaaaaaaaaa", "items_hash": "bbbbbbbbbbbbbbbb"}
REQUESTS = [candidate(seed, 0.1) for seed in range(4)]


def shard(run: Path, name: str = "00000-00003", stage: str = "search", **footer: str) -> parts.Parts:
    return parts.Parts(run / stage / f"completions/{name}.parquet", {**FOOTER, **footer}, ITEMS)


def answers(request: Request, items: list[str] = ITEMS) -> pl.DataFrame:
    """Completions in the order in which an engine might finish them, as rows."""
    made = [Completion(item, f"{request.request_id} on {item}", "stop", 7, 3) for item in reversed(items)]
    return parts.rows(request, made, items)


def keep(kept: parts.Parts, requests: list[Request] = REQUESTS) -> None:
    for request in requests:
        kept.write(request, answers(request))


def finished(kept: parts.Parts, requests: list[Request] = REQUESTS) -> Path:
    """A shard's output, as generate writes it."""
    keep(kept, requests)
    tables.write(kept.merge(requests), tables.COMPLETIONS, kept.completions, **kept.footer)
    kept.remove()
    return kept.completions


def test_a_part_is_read_as_it_was_written_in_the_items_order(tmp_path) -> None:
    kept = shard(tmp_path)
    assert kept.read(REQUESTS[0]) is None
    kept.write(REQUESTS[0], answers(REQUESTS[0]))
    read = kept.read(REQUESTS[0])
    assert read is not None and read["item_id"].to_list() == ITEMS
    assert read["text"].to_list() == [f"{REQUESTS[0].request_id} on {item}" for item in ITEMS]
    assert kept.read(REQUESTS[1]) is None
    assert [path.name for path in kept.folder.iterdir()] == [f"{REQUESTS[0].request_id}.parquet"]


@pytest.mark.parametrize("changed", [{"run_id": "cccccccccc"}, {"items_hash": "dddddddddddddddd"}])
def test_a_part_of_another_run_or_other_items_is_ignored_and_redone(tmp_path, caplog, changed) -> None:
    keep(shard(tmp_path, **changed), REQUESTS[:1])
    kept = shard(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert kept.read(REQUESTS[0]) is None
    assert "part ignored and redone" in caplog.text and kept.path(REQUESTS[0]).name in caplog.text
    assert not kept.path(REQUESTS[0]).exists(), "nothing may take it for finished"


def test_a_part_that_lacks_an_item_or_answers_another_request_is_ignored(tmp_path) -> None:
    kept = shard(tmp_path)
    kept.write(REQUESTS[0], answers(REQUESTS[0], ITEMS[:2]))
    kept.write(REQUESTS[1], answers(REQUESTS[2]))
    assert kept.read(REQUESTS[0]) is None
    assert kept.read(REQUESTS[1]) is None


def test_a_damaged_part_is_never_an_exception(tmp_path) -> None:
    """Cut short, overwritten or zeroed anywhere; Polars answers some of it with a panic."""
    kept = shard(tmp_path)
    keep(kept, REQUESTS[:1])
    path = kept.path(REQUESTS[0])
    whole = path.read_bytes()
    rng = random.Random(0)
    ignored = 0
    for trial in range(600):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        if trial % 3 == 0:
            del damaged[place:]
        elif trial % 3 == 1:
            damaged[place : place + 64] = bytes(len(damaged[place : place + 64]))
        else:
            for _ in range(rng.choice([1, 4, 50])):
                damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged)
        ignored += kept.read(REQUESTS[0]) is None
    assert ignored > 300


def test_merge_keeps_the_order_of_requests_and_remove_leaves_nothing(tmp_path) -> None:
    kept = shard(tmp_path)
    keep(kept, REQUESTS[::-1])
    merged = kept.merge(REQUESTS)
    assert merged["request_id"].unique(maintain_order=True).to_list() == [r.request_id for r in REQUESTS]
    assert merged["item_id"].to_list() == ITEMS * len(REQUESTS)
    kept.remove()
    assert not kept.folder.exists()
    kept.remove()


def test_merge_never_leaves_a_request_out(tmp_path) -> None:
    kept = shard(tmp_path)
    keep(kept, REQUESTS[:3])
    with pytest.raises(UserError, match="is missing"):
        kept.merge(REQUESTS)
    other = shard(tmp_path / "short")
    shutil.copytree(kept.folder, other.folder)
    tables.write(other.merge(REQUESTS[:2]), tables.COMPLETIONS, other.completions, **FOOTER)
    with pytest.raises(UserError, match=f"lost 1 finished request.*{REQUESTS[3].request_id}"):
        other.merge(REQUESTS)


def test_merge_takes_what_a_second_copy_of_the_job_finished(tmp_path) -> None:
    kept = shard(tmp_path)
    whole = tables.read(finished(kept), tables.COMPLETIONS)
    keep(kept, REQUESTS[1:3])
    assert kept.merge(REQUESTS).equals(whole)


def test_finished_shards_of_the_same_rows_are_taken_over(tmp_path) -> None:
    shorter = finished(shard(tmp_path, "00000-00001"), REQUESTS[:2])
    before = shorter.read_bytes()
    kept = shard(tmp_path)
    kept.reuse(REQUESTS, parts.siblings(tmp_path, "search", kept.completions))
    assert [kept.read(request) is not None for request in REQUESTS] == [True, True, False, False]
    assert shorter.read_bytes() == before


def test_a_part_that_is_there_is_not_written_again(tmp_path) -> None:
    finished(shard(tmp_path, "00000-00001"), REQUESTS[:2])
    kept = shard(tmp_path)
    keep(kept, REQUESTS[:1])
    before = kept.path(REQUESTS[0]).stat()
    kept.reuse(REQUESTS, parts.siblings(tmp_path, "search", kept.completions))
    after = kept.path(REQUESTS[0]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert kept.path(REQUESTS[1]).exists()


@pytest.mark.parametrize("changed", [{"run_id": "cccccccccc"}, {"items_hash": "dddddddddddddddd"}])
def test_shards_of_another_run_or_other_items_are_not_taken_over(tmp_path, changed) -> None:
    finished(shard(tmp_path, "00000-00001", **changed), REQUESTS[:2])
    kept = shard(tmp_path)
    kept.reuse(REQUESTS, parts.siblings(tmp_path, "search", kept.completions))
    assert not kept.folder.exists()


def test_a_torn_sibling_is_passed_over(tmp_path) -> None:
    torn = finished(shard(tmp_path, "00000-00001"), REQUESTS[:2])
    torn.write_bytes(torn.read_bytes()[:100])
    finished(shard(tmp_path, "00000-00002"), REQUESTS[:3])
    kept = shard(tmp_path)
    kept.reuse(REQUESTS, parts.siblings(tmp_path, "search", kept.completions))
    assert [kept.path(request).exists() for request in REQUESTS] == [True, True, True, False]


def test_siblings_are_shards_that_can_hold_the_same_requests(tmp_path) -> None:
    for name in (
        "search/completions/00000-00003.parquet",
        "search/completions/00004-00005.kept",
        "search/completions/00004-00005.parquet",
        "search/completions/00004-00007.parquet",
        "search/completions/00008-00011.parquet",
        "search/completions/00004-00007 (copy).parquet",
        "controls-t0.7/completions/00000-00004.parquet",
        "controls-t1/completions/00000-00004.parquet",
        "random/completions/00000-00002.parquet",
        "n00008/members/completions/00000-00002.parquet",
        "n00016/members/completions/00000-00002.retired",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def found(stage: str, name: str) -> list[str]:
        own = tmp_path / stage / "completions" / f"{name}.parquet"
        return [str(path.relative_to(tmp_path)) for path in parts.siblings(tmp_path, stage, own)]

    folder = "search/completions"
    assert found("search", "00004-00007") == [
        f"{folder}/00004-00005.parquet",
        f"{folder}/00004-00007.parquet",
        f"{folder}/00004-00005.kept",
    ]
    assert found("controls-t1", "00000-00004") == [
        "controls-t0.7/completions/00000-00004.parquet",
        "controls-t1/completions/00000-00004.parquet",
    ]
    assert found("n00016/members", "00000-00002") == [
        "random/completions/00000-00002.parquet",
        "n00008/members/completions/00000-00002.parquet",
        "n00016/members/completions/00000-00002.retired",
    ]


def test_attempts_add_up_and_progress_survives_a_torn_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    kept = shard(tmp_path)
    assert kept.load_progress() is None
    first = parts.begin_attempt(None, "aaaaaaaaaa", "search", (0, 4))
    assert (first.attempts, first.state, first.scheduler_job_id) == (1, "loading", "42")
    first.state, first.error, first.seconds_generating, first.done = "failed", "disk full", 12.5, 3
    kept.save_progress(first)

    second = parts.begin_attempt(kept.load_progress(), "aaaaaaaaaa", "search", (0, 4))
    assert (second.attempts, second.state, second.error) == (2, "loading", "")
    assert second.seconds_generating == 12.5, "seconds add up over attempts"
    kept.save_progress(second)
    assert kept.load_progress() == second

    for torn in ("", '{"run_id": "aaaa', "[]", '{"unknown": 1}'):
        (kept.folder / parts.PROGRESS).write_text(torn)
        assert kept.load_progress() is None
    third = parts.begin_attempt(kept.load_progress(), "aaaaaaaaaa", "search", (0, 4))
    assert third.attempts == 1


def test_the_second_name_lies_beside_the_output(tmp_path) -> None:
    own = shard(tmp_path).completions
    assert layout.kept_file(own).name == "00000-00003.kept"
    assert layout.parts_folder(own).name == "00000-00003.parts"
