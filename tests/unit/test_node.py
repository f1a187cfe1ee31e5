"""Slices of a shard, devices of its workers, sums of what they say: pure functions."""

from dataclasses import replace

import pytest

from randopt import node
from randopt.errors import UserError
from randopt.parts import Parts, Progress
from randopt.requests import candidate

REQUESTS = [candidate(seed, 0.1) for seed in range(10)]


@pytest.mark.parametrize(("workers", "sizes"), [(1, [10]), (3, [3, 3, 4]), (4, [2, 3, 2, 3]), (10, [1] * 10)])
def test_slices_are_the_requests_in_order_and_even(workers, sizes) -> None:
    found = node.slices(REQUESTS, workers)
    assert [len(part) for part in found] == sizes
    assert [request for part in found for request in part] == REQUESTS


def test_no_worker_is_left_without_a_request() -> None:
    assert node.slices(REQUESTS[:2], 5) == [REQUESTS[:1], REQUESTS[1:2]]
    assert node.slices([], 5) == []


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        ("0", ["0"]),
        ("2,3", ["2", "3"]),
        (" 5 , 1", ["5", "1"]),
        ("GPU-8932f937-d72c,MIG-a1", ["GPU-8932f937-d72c", "MIG-a1"]),
        ("0,-1,1", ["0"]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_devices_are_those_that_the_job_was_given(visible, devices) -> None:
    assert node.parse_devices(visible) == devices
    assert node.visible_devices({"CUDA_VISIBLE_DEVICES": visible}) == devices


def test_a_worker_owns_a_group_and_more_workers_share_them() -> None:
    groups = node.device_groups(["2", "3", "6", "7"], 1)
    assert node.assign(groups, 4) == [("2",), ("3",), ("6",), ("7",)]
    assert node.assign(groups, 6) == [("2",), ("3",), ("6",), ("7",), ("2",), ("3",)]
    assert node.assign(node.device_groups(["2", "3", "6", "7"], 2), 2) == [("2", "3"), ("6", "7")]
    assert node.device_groups(["2", "3", "6"], 2) == [("2", "3")], "half an engine is none"
    assert node.assign(node.device_groups(["0"], 1), 2) == [("0",), ("0",)]
    assert node.assign(node.device_groups([], 4), 2) == [(), ()], "the CPU"
    with pytest.raises(UserError, match=r"needs 4 devices, this job sees 2 \(2, 3\)"):
        node.device_groups(["2", "3"], 4)


def test_each_worker_sees_its_devices_and_its_share_of_the_threads(tmp_path, monkeypatch) -> None:
    """In real processes; CUDA itself is not needed to be told what to look at."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-8932f937-d72c")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # set by `generate`, and taken back by the test

    def work(requests, kept, progress, threads) -> None:
        import os

        progress.device, progress.done = "cuda", len(requests)
        for request in requests:
            kept.path(request).write_text(f"{os.environ['CUDA_VISIBLE_DEVICES']} {threads}")

    kept = Parts(tmp_path / "00000-00009.parquet", {}, [])
    progress = Progress("r", "search", 0, 10)
    node.generate(work, REQUESTS, kept, progress, 3, 8)
    seen = [kept.path(request).read_text() for request in REQUESTS]
    assert seen == ["2 2"] * 3 + ["GPU-8932f937-d72c 2"] * 3 + ["2 2"] * 4
    assert (progress.done, progress.workers) == (10, 3)
    assert progress.device == "2 × cuda 2, cuda GPU-8932f937-d72c"


def test_the_sum_of_workers_stands_on_what_was_there_before() -> None:
    before = Progress("r", "search", 0, 10, done=4, seconds_loading=5.0, seconds_total=50.0, digests={"a": "1"})
    first = Progress(
        "r", "search", 0, 10, done=2, state="running", device="cuda", seconds_loading=1.0, seconds_total=7.0
    )
    second = replace(first, done=1, digests={"b": "2"})
    progress = replace(before)
    for _ in range(2):  # a look at the same state changes nothing
        node.add_up(progress, before, [(("2",), first), (("3",), second)])
    assert (progress.done, progress.seconds_loading, progress.seconds_total) == (7, 7.0, 64.0)
    assert (progress.state, progress.device) == ("running", "cuda 2, cuda 3")
    assert progress.digests == {"a": "1", "b": "2"} and before.digests == {"a": "1"}
    node.add_up(progress, before, [(("0", "1"), first), ((), replace(first, device=""))])
    assert progress.device == "cuda 0+1", "the second is not loaded yet"
    node.add_up(progress, before, [((), replace(first, device="cpu"))] * 3)
    assert progress.device == "3 × cpu"
