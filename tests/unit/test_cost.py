"""What an experiment will take: the arithmetic by hand, and where a speed comes from."""

import io
from pathlib import Path

import pytest

from randopt import cost, layout, resources, speed, tables
from randopt.config import resolve
from randopt.errors import UserError
from randopt.experiment import Experiment, build, describe
from randopt.speed import Speed

ROOT = Path(__file__).resolve().parents[2]
SHARD = 4


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def experiment(tiny_model: Path, **search: object) -> Experiment:
    """16 candidates on 10 select items; 2 experts on 5 confirm and 15 test items."""
    config = {
        "experiment": "tiny",
        "models": [{"name": "tiny", "source": f"path:{tiny_model}"}],
        "tasks": [{"name": "times_table", "splits": {"select": 10, "confirm": 5, "test": 15}, "max_tokens": 4}],
        "search": {"candidates": 16, "sigmas": [0.1], **(search or {"shard_size": SHARD})},
        "ensemble": {"top_k": [2]},
    }
    return build(resolve(config), ROOT)


def finish(run, stage: str, shard: layout.Shard, here: int, attempts: int = 1, seconds: float = 8.0) -> Path:
    """A finished shard's ledger and completions (whose content nobody reads here)."""
    row = {
        **{"run_id": run.run_id, "stage": stage, "start": shard[0], "stop": shard[1], "host": "n1", "device": "H200"},
        **{"scheduler_job_id": None, "attempts": attempts, "requests_here": here, "seconds_loading": 30.0 * attempts},
        **{"seconds_perturbing": 0.0, "seconds_generating": seconds, "seconds_total": seconds + 30.0},
        **{"prompt_tokens": 1, "completion_tokens": 1, "weights_digest": "", "versions": "{}"},
        **{"workers": 1, "digests": []},
    }
    path = layout.shard_file(run.folder, stage, "ledger", shard)
    tables.write(tables.pl.DataFrame([row], schema=tables.LEDGER.schema), tables.LEDGER, path, run_id=run.run_id)
    completions = layout.shard_file(run.folder, stage, "completions", shard)
    completions.parent.mkdir(parents=True, exist_ok=True)
    completions.touch()
    return path


def test_jobs_and_completions_of_every_stage(tiny_model) -> None:
    (run,) = experiment(tiny_model).runs
    known = Speed(40.0, 0.5, "by hand")
    found = {stage.stage: stage for stage in cost.stage_costs(run, known)}
    assert {name: (stage.shards, stage.completions) for name, stage in found.items()} == {
        "controls-t0.7": (4, 4 * 30),
        "search": (4, 16 * 10),
        "random": (1, 2 * 20),
        "n00016/members": (1, 2 * 20),
    }
    assert found["search"].seconds == (speed.SECONDS_STARTING + 40 + 40 * 0.5,) * 4
    finish(run, "search", (4, 8), here=SHARD)
    again = {stage.stage: stage for stage in cost.stage_costs(run, known)}
    assert len(again["search"].seconds) == 3 and again["search"].shards == 4


def test_members_wait_for_all_else(tiny_model) -> None:
    (run,) = experiment(tiny_model).runs
    stages = [
        cost.StageCost(run, "search", 3, 0, (10.0, 10.0, 10.0)),
        cost.StageCost(run, "random", 1, 0, (4.0,)),
        cost.StageCost(run, "n00016/members", 2, 0, (3.0, 3.0)),
    ]
    assert cost.finishing_seconds(stages, 1) == 40
    assert cost.finishing_seconds(stages, 2) == 20 + 3  # the random shard fits beside the third of the search
    assert cost.finishing_seconds(stages, 100) == 10 + 3
    assert cost.finishing_seconds([], 4) == 0


def test_where_the_speed_comes_from(tiny_model) -> None:
    loaded = experiment(tiny_model)
    (run,) = loaded.runs
    assert not cost.known_speed(run).measured and "guess" in cost.in_short(loaded)

    describe(loaded)
    (other,) = experiment(tiny_model, shard_size=SHARD, first_seed=100).runs
    assert other.run_id != run.run_id
    finish(run, "search", (0, 4), here=SHARD)
    known = cost.known_speed(other)
    assert f"of run {run.run_id} (H200)" in known.source and known.seconds_per_completion == 8 / 40

    speed.write_probe(other.folder, Speed(1.0, 2.0, "a probe"))
    (other,) = experiment(tiny_model, shard_size=SHARD, first_seed=100).runs
    assert cost.known_speed(other) == Speed(1.0, 2.0, "a probe")
    describe(experiment(tiny_model, shard_size=SHARD, first_seed=100))
    finish(other, "search", (0, 4), here=1, seconds=4.0)  # three were taken over from elsewhere
    finish(other, "search", (4, 8), here=1, attempts=2, seconds=16.0)  # three were made by the first attempt
    known = cost.known_speed(other)
    assert "2 shard(s) of this run" in known.source
    assert known.seconds_per_completion == pytest.approx((4 + 16) / (10 + 40))
    assert known.seconds_loading == 30


def test_a_torn_ledger_is_passed_over(tiny_model) -> None:
    loaded = experiment(tiny_model)
    (run,) = loaded.runs
    describe(loaded)
    finish(run, "search", (0, 4), here=SHARD).write_bytes(b"PAR1")
    assert not cost.known_speed(run).measured


def test_a_probe_gives_runtime_room_and_chooses_the_shard_size(tiny_model) -> None:
    (run,) = experiment(tiny_model, shard_minutes=10).runs
    assert run.description["shard_size"] == 16, "the guess says that all fit into ten minutes"
    # 10 min are 600 s; less 20 to start and 80 to load, 500 s are 10 candidates of 10 completions of 5 s
    speed.write_probe(run.folder, Speed(80.0, 5.0, "a probe"))
    loaded = experiment(tiny_model, shard_minutes=10)
    (run,) = loaded.runs
    assert run.description["shard_size"] == 10
    minutes = 10 * 10 * 5 / 60
    expected = int(resources.START_MINUTES + resources.MEASURED_FACTOR * minutes)
    assert resources.generate_runtime(run, "search", "00000-00009", 1) == expected

    describe(loaded)
    (run.folder / "search").mkdir()  # planned
    speed.write_probe(run.folder, Speed(80.0, 1.0, "a later probe"))
    (run,) = experiment(tiny_model, shard_minutes=10).runs
    assert run.description["shard_size"] == 10, "files are named after it"
    (run,) = experiment(tiny_model, shard_size=10).runs
    with pytest.raises(UserError, match="fixed it at 10"):
        experiment(tiny_model, shard_size=8)


def test_minutes_that_cannot_be_kept(tiny_model) -> None:
    with pytest.raises(UserError, match=r"shard_minutes: 1 was given, but a job needs 1\.3 minutes before"):
        experiment(tiny_model, shard_minutes=1)
    with pytest.raises(UserError, match="were both given"):
        experiment(tiny_model, shard_minutes=10, shard_size=4)


def test_the_page_names_the_total_and_the_times(tiny_model) -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    console.print(cost.render(experiment(tiny_model), [2]))
    text = console.export_text()
    assert "10" in text and "360" in text and "on 2 GPUs" in text and "--probe" in text
