"""Tables: whole or absent, checked when written and when read."""

import os
import stat

import polars as pl
import pytest

from randopt import files, tables
from randopt.errors import UserError
from randopt.requests import Decoding, Request, candidate, from_rows, to_rows


@pytest.fixture
def frame() -> pl.DataFrame:
    return pl.DataFrame(to_rows([Request(), candidate(3, 1e-3)]), schema=tables.REQUESTS.schema)


def test_equal_content_is_equal_bytes(frame, tmp_path) -> None:
    for name in ("a", "b"):
        tables.write(frame, tables.REQUESTS, tmp_path / name, run_id="r")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert tables.read(tmp_path / "a", tables.REQUESTS, run_id="r").equals(frame)


def test_foreign_torn_and_missing_files_are_named(frame, tmp_path) -> None:
    path = tmp_path / "requests.parquet"
    with pytest.raises(UserError, match="missing"):
        tables.read(path, tables.REQUESTS)
    tables.write(frame, tables.REQUESTS, path, run_id="mine")
    with pytest.raises(UserError, match=r"requests\.parquet does not belong here: its run_id is 'mine'"):
        tables.read(path, tables.REQUESTS, run_id="other")
    with pytest.raises(UserError, match="its table is 'requests', expected 'items'"):
        tables.read(path, tables.ITEMS)
    whole = path.read_bytes()
    for torn in (whole[:100], whole[:-3], b""):
        path.write_bytes(torn)
        with pytest.raises(UserError, match=r"requests\.parquet cannot be read"):
            tables.read(path, tables.REQUESTS)
    frame.write_parquet(path)
    with pytest.raises(UserError, match="no table of this workflow"):
        tables.read(path, tables.REQUESTS)


def test_damage_inside_the_data_is_noticed(frame, tmp_path) -> None:
    path = tmp_path / "requests.parquet"
    tables.write(frame, tables.REQUESTS, path)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(UserError, match="torn or damaged"):
        tables.read(path, tables.REQUESTS)


def test_the_writer_checks_key_nulls_and_columns(frame, tmp_path) -> None:
    path = tmp_path / "x.parquet"
    with pytest.raises(ValueError, match="not unique"):
        tables.write(pl.concat([frame, frame]), tables.REQUESTS, path)
    with pytest.raises(ValueError, match="missing"):
        tables.write(frame.drop("temperature"), tables.REQUESTS, path)
    with pytest.raises(ValueError, match="nulls"):
        tables.write(frame.with_columns(temperature=pl.lit(None, pl.Float64)), tables.REQUESTS, path)
    assert not path.exists()


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path) -> None:
    path = tmp_path / "file"
    files.write_text_atomic(path, "old")

    def fail(temporary) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device"):
        files.write_atomic(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_files_follow_the_umask(tmp_path) -> None:
    old = os.umask(0o027)
    try:
        files.write_text_atomic(tmp_path / "file", "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_request_ids_are_content_and_stay_what_they_were() -> None:
    # golden: an id found today names the same perturbation next year
    assert Request().request_id == "61cfd31c195c8397"
    assert candidate(3, 1e-3).request_id == "6550b890b5aba82b"
    assert candidate(3, 1).request_id == candidate(3, 1.0).request_id
    distinct = [
        Request(),
        candidate(3, 0.0),
        candidate(4, 0.0),
        Request((), Decoding(0.7, 0)),
        Request((), Decoding(0.7, 1)),
    ]
    assert len({request.request_id for request in distinct}) == len(distinct)
    rows = to_rows(distinct)
    assert from_rows(rows) == distinct
    rows[1]["perturbation"][0]["seed"] = 5
    with pytest.raises(UserError, match="was altered"):
        from_rows(rows)


@pytest.mark.parametrize("terms", [((-1, 0.1),), ((2**64, 0.1),), ((1, float("inf")),), ((1, float("nan")),)])
def test_impossible_terms_are_refused(terms) -> None:
    with pytest.raises(UserError):
        Request(terms)
