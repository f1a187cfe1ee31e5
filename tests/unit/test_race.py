"""Racing: the best candidates are those of the exhaustive search, whatever the scores, the order and the shards."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from benchmarks.race import CASES, run, simulate, stream, table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from randopt import layout, tables
from randopt.cluster import leftovers, slurm
from randopt.config import resolve
from randopt.engines import Completion, Item
from randopt.engines.prompts import batches
from randopt.errors import UserError
from randopt.experiment import build
from randopt.gather import answers, gather
from randopt.race import PRUNED, Abilities, Outlook, Pilot, Race, Standing, bound, pruned_items, read_pilot, write_pilot
from randopt.requests import candidate
from randopt.score import judge_all
from randopt.select import rank, select_members
from randopt.tasks.scorers import SCORERS, get
from tests.unit.test_gather import ITEMS, RUN, make_stage

ROOT = Path(__file__).resolve().parents[2]


def race_of(rewards: np.ndarray, pilot: int, keep: int, max_reward: float = 1.0, **rules) -> Race:
    """The race of all rows after the pilot against its bound; a completion's text is its reward."""
    ids = tuple(f"select-{item:05d}" for item in range(rewards.shape[1]))
    known = Pilot(ids, rewards[:pilot].astype(np.float64), np.ones(len(ids)))
    least = bound(table(rewards[:pilot], np.ones(pilot, bool)), keep, len(ids))
    return Race(known, least, max_reward, lambda completion: float(completion.text), **rules)


REWARDS = (
    st.sampled_from([0.0, 1.0]),
    st.sampled_from([0.0, 0.06, 0.1, 1.0, 1.1]),
    st.floats(-0.5, 1.0, width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_lossless_keeps_the_best_whatever_happens(data: st.DataObject) -> None:
    n, total = data.draw(st.integers(1, 9)), data.draw(st.integers(4, 24))
    pilot = data.draw(st.integers(1, total))
    keep = data.draw(st.integers(1, pilot))
    elements = REWARDS[data.draw(st.integers(0, len(REWARDS) - 1))]
    rewards = data.draw(arrays(np.float32, (total, n), elements=elements))
    order = data.draw(st.sampled_from(["hardest", "random", "easiest"]))
    answered, _ = run(
        rewards, 1.1, pilot=pilot, keep=keep, mode="lossless", rounds=data.draw(st.booleans()), order=order
    )
    raced, whole = table(rewards, answered == n), table(rewards, np.ones(total, bool))
    for k in range(1, keep + 1):
        assert rank(raced).head(k).equals(rank(whole).head(k))
    for first in range(keep, total):  # and of every prefix
        assert rank(raced.head(first)).head(keep).equals(rank(whole.head(first)).head(keep))


@pytest.mark.parametrize("case", [*CASES, "graded"])
@pytest.mark.parametrize("order", ["hardest", "random"])
def test_lossless_on_simulated_searches(case: str, order: str) -> None:
    rewards, max_reward = simulate(case, 400, 40, seed=1)
    answered, _ = run(rewards, max_reward, pilot=60, keep=12, mode="lossless", order=order)
    complete = answered == 40
    best = rank(table(rewards, np.ones(400, bool))).head(12)
    assert rank(table(rewards, complete)).head(12).equals(best)
    if case == "alike":
        assert complete.all(), "a tie with the bound is never lost"
    else:
        assert answered.sum() < 400 * 40, "something must be saved for this to mean anything"


def test_a_tie_with_the_bound_is_never_lost_whatever_the_rounding() -> None:
    """Ten times 0.1 in another order adds up to another float; the candidate has what the bound has."""
    row = np.array([0.1] * 10 + [1.1] * 10 + [0.06] * 10, np.float32)
    rewards = np.stack([row, *(np.random.default_rng(seed).permutation(row) for seed in range(50))])
    race = race_of(rewards, 1, 1, 1.1)
    for index in range(1, len(rewards)):
        found = race.watch(stream(rewards[index], race.pilot.item_ids, list(range(30))))
        assert PRUNED not in {completion.finish_reason for completion in found}
    standing = Standing(race.bound, 30, 1.1)
    short = [0.0, *row[:9], *row[10:]]  # a tenth short of the bound
    assert any(standing.lost(item, float(reward)) for item, reward in enumerate(sorted(short)))


def test_the_stream_is_closed_and_what_it_did_not_give_is_pruned() -> None:
    rewards = np.array([[1, 1, 1, 0], [0, 0, 1, 1]], np.float32)
    closed = []

    def engine():
        try:
            for column in (3, 0, 1, 2):
                yield Completion(f"select-{column:05d}", str(rewards[1, column]), "stop", 5, 7)
        finally:
            closed.append(column)

    found = race_of(rewards, 1, 1).watch(engine())
    assert closed == [1], "1 of 3 is possible after item 0, 2 of 3 is what the bound asks"
    assert [(c.item_id, c.finish_reason, c.completion_tokens) for c in found] == [
        ("select-00000", "stop", 7),
        ("select-00001", "stop", 7),
        ("select-00002", PRUNED, 0),
        ("select-00003", "stop", 7),
    ]


def test_a_candidate_that_answered_everything_is_complete_even_if_lost_at_the_last_item() -> None:
    rewards = np.array([[1, 1], [1, 0]], np.float32)
    race = race_of(rewards, 1, 1)
    found = race.watch(stream(rewards[1], race.pilot.item_ids, [0, 1]))
    assert [completion.finish_reason for completion in found] == ["stop", "stop"]


def test_the_bound_is_of_complete_candidates() -> None:
    rewards = np.array([[1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 1]], np.float32)
    complete = np.array([True, True, False, True])
    assert [bound(table(rewards, complete), keep, 3) for keep in (1, 2, 3)] == pytest.approx([2, 2, 1])


def test_a_reward_above_the_declared_one_is_an_error() -> None:
    rewards = np.array([[1, 0], [1, 1.5]], np.float32)
    race = race_of(rewards, 1, 1)
    with pytest.raises(UserError, match="max_reward"):
        race.watch(stream(rewards[1], race.pilot.item_ids, [0, 1]))
    with pytest.raises(UserError, match="max_reward"):
        race.watch(iter_of(float("nan"), race.pilot.item_ids))


def iter_of(reward: float, ids: tuple[str, ...]):
    """A stream in which every item earns the same."""
    yield from (Completion(item_id, str(reward), "stop", 1, 1) for item_id in ids)


def test_every_scorer_declares_what_its_cases_earn() -> None:
    cases = [json.loads(line) for line in (ROOT / "tests/data/scoring_cases.jsonl").read_text().splitlines()]
    assert {name: scorer.max_reward for name, scorer in SCORERS.items() if scorer.max_reward != 1} == {
        "countdown": 1.1,
        "countdown_paper": 1.1,
    }
    perfect = "<think>a</think>\n<answer>1 + 2</answer>"
    for name in ("countdown", "countdown_paper"):
        assert get(name).score(perfect, {"numbers": [1, 2], "target": 3}).reward == get(name).max_reward
    assert cases


@pytest.mark.parametrize("case", ["one_ability", "flips", "topics", "graded"])
def test_confident_is_calibrated(case: str) -> None:
    """Of those it stops, few more than delta would have reached their bound; the best are kept."""
    rewards, max_reward = simulate(case, 900, 60, seed=3)
    delta, keep = 0.02, 30
    answered, bounds = run(rewards, max_reward, pilot=200, keep=keep, mode="confident", delta=delta)
    lost = answered < 60
    reach = rewards.astype(np.float64).sum(axis=1) > bounds - 1e-6
    assert (reach & lost).sum() / lost.sum() < 1.5 * delta
    whole, raced = (rank(table(rewards, kept)).head(keep) for kept in (np.ones(900, bool), ~lost))
    assert len(set(whole["seed"]) & set(raced["seed"])) >= 0.9 * keep
    assert whole["reward"].mean() - raced["reward"].mean() < 0.005
    exact, _ = run(rewards, max_reward, pilot=200, keep=keep, mode="lossless")
    assert answered.sum() < exact.sum()


def test_the_outlook_is_sure_of_what_is_certain_and_hopes_beyond_the_pilot() -> None:
    rewards, _ = simulate("one_ability", 200, 50, seed=0)
    model = Abilities(rewards.astype(np.float64), 1.0)
    perfect, failing = Outlook(model), Outlook(model)
    for item in range(40):
        perfect.see(item, 1.0)
        failing.see(item, 0.0)
    assert failing.chance(10.0) < 1e-3 < perfect.chance(10.0), "no pilot candidate is perfect, yet one may be"
    assert perfect.chance(0.0) > 0.99 and perfect.chance(12.0) < 0.05
    assert perfect.chance(5.0) > perfect.chance(9.0)


def test_batches_in_the_order_given_are_longest_first_only_inside() -> None:
    lengths = [1, 5, 2, 9, 3]
    assert batches(lengths, 2) == [[3, 1], [4, 2], [0]]
    assert batches(lengths, 2, ordered=True) == [[1, 0], [3, 2], [4]]
    assert batches(lengths, 5, ordered=True) == batches(lengths, 5) == [[3, 1, 4, 2, 0]]


def test_items_come_hardest_first_and_ties_by_name() -> None:
    pilot = Pilot(("a", "b", "c"), np.array([[1, 0, 0], [1, 0, 0]]), np.ones(3))
    items = [Item(name, ()) for name in "cba"]
    assert [item.item_id for item in pilot.hardest_first(items)] == ["b", "c", "a"]


def test_shards_are_cut_where_rounds_begin() -> None:
    assert layout.shards(20, 8) == [(0, 8), (8, 16), (16, 20)]
    assert layout.shards(20, 8, [10]) == [(0, 8), (8, 10), (10, 18), (18, 20)]
    assert layout.shards(20, 8, [20, 40]) == layout.shards(20, 8, [0]) == layout.shards(20, 8)
    run = {"race": {"pilot": 10}}
    assert layout.race_rounds(run, 40) == [10, 20] and layout.race_rounds(run, 41) == [10, 20, 40]
    assert layout.race_rounds({}, 41) == [], "no race, no rounds"
    rounds = [layout.race_round(run, "search", (row, row + 1)) for row in (0, 9, 10, 19, 20, 39, 40, 79)]
    assert rounds == [None, None, 10, 10, 20, 20, 40, 40]
    assert layout.race_round(run, "random", (20, 21)) is None
    larger = layout.shards(50, 8, layout.race_rounds(run, 50))
    assert larger[:4] == layout.shards(36, 8, layout.race_rounds(run, 36))[:4], "a larger N keeps full shards"


def configured(tiny_model: Path, task: str = "times_table", **race):
    return build(
        resolve(
            {
                "experiment": "tiny",
                "models": [{"name": "tiny", "source": f"path:{tiny_model}"}],
                "tasks": [task],
                "search": {"candidates": 64, "sigmas": [0.1], **({"race": race} if race else {})},
                "ensemble": {"top_k": [4]},
            }
        ),
        ROOT,
    )


def test_a_race_names_the_folder_and_not_the_run(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (plain,), (off,) = configured(tiny_model).runs, configured(tiny_model, mode=False).runs
    (race,) = configured(tiny_model, mode="lossless", pilot=16).runs
    assert plain == off and "race" not in plain.description and plain.folder.name == plain.run_id
    assert race.run_id == plain.run_id and race.folder.name.startswith(f"{plain.run_id}-lossless-")
    assert race.description["race"] == {
        **{"mode": "lossless", "pilot": 16, "keep": 4, "rule": 1, "scorer": "number", "scorer_version": 1}
    }
    assert race.shards("search") == [(0, 16), (16, 32), (32, 64)] and plain.shards("search") == [(0, 64)]
    assert race.shards("random") == plain.shards("random")
    names = {race.folder.name}
    for change in ({"pilot": 17}, {"keep": 5}, {"mode": "confident"}, {"mode": "confident", "delta": 0.02}):
        (other,) = configured(tiny_model, **{"mode": "lossless", "pilot": 16, **change}).runs
        names.add(other.folder.name)
    (same,) = configured(tiny_model, mode="lossless", pilot=16, delta=0.02).runs
    assert len(names) == 5 and same.folder == race.folder, "delta is nothing to a lossless race"


@pytest.mark.parametrize(
    ("race", "said"),
    [
        ({"mode": "lossless"}, "search.race.pilot: 0 was given, expected 4"),
        ({"mode": "lossless", "pilot": 3}, "search.race.pilot: 3 was given"),
        ({"mode": "lossless", "pilot": 65}, "to 64 (search.candidates)"),
        ({"mode": "lossless", "pilot": 8, "keep": 9}, "expected 9"),
        ({"mode": "lossless", "pilot": 8, "keep": 2}, "less than ensemble.members = 4"),
        ({"mode": "confident", "pilot": 16, "delta": 0.2}, "at most half of keep / pilot"),
        ({"mode": "fast"}, "expected one of off, lossless, confident"),
    ],
)
def test_a_race_that_cannot_work_is_refused(tiny_model, race: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        configured(tiny_model, **race)
    assert said in str(error.value)


def test_a_sandboxed_scorer_is_too_slow(tiny_model) -> None:
    with pytest.raises(UserError, match="processes of its own"):
        configured(tiny_model, "reasoning_gym:basic_arithmetic", mode="lossless", pilot=16)


def test_jobs_of_another_race_are_not_ours(tiny_model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (plain,) = configured(tiny_model).runs
    (race,) = configured(tiny_model, mode="lossless", pilot=16).runs
    jobs = [
        slurm.Job(str(number), "RUNNING", "p", "n", "", "j", "/", comment)
        for number, comment in enumerate(
            [
                *(leftovers.shard_comment(run, "search", (16, 64)) for run in (plain, race)),
                *(slurm.comment("score", run.name, "search", "number", "1", "00000-00015") for run in (plain, race)),
                slurm.comment("race", race.name),
                "somebody's own " + plain.name,
            ]
        )
    ]
    assert [job.id for job in leftovers.ours([plain], jobs)] == ["0", "2"]
    assert [job.id for job in leftovers.ours([race], jobs)] == ["1", "3", "4"]
    assert leftovers.ours([], jobs) == []


def prune(completions: Path, scores: Path, pairs: set[tuple[str, str]], race: str) -> None:
    """Rewrite a shard's tables as a race that left out `pairs` makes them."""
    gone = pl.Series([json.dumps(pair) for pair in pairs])
    mine = pl.struct("request_id", "item_id").map_elements(
        lambda pair: json.dumps((pair["request_id"], pair["item_id"])), pl.String
    )
    for path, kind, empty in (
        (completions, tables.COMPLETIONS, {"text": "", "finish_reason": PRUNED, "completion_tokens": 0}),
        (scores, tables.SCORES, {"reward": 0.0, "strict": False, "lenient": False, "vote_key": None}),
    ):
        frame = tables.read(path, kind)
        changed = [
            pl.when(mine.is_in(gone.implode())).then(pl.lit(value)).otherwise(pl.col(name)).alias(name)
            for name, value in empty.items()
        ]
        footer = {key: value for key, value in tables.footer(path).items() if key != "table"}
        tables.write(frame.with_columns(changed), kind, path, **footer, race=race)


def test_gathered_means_are_over_what_was_answered(tmp_path) -> None:
    plan = [candidate(seed, 0.1) for seed in range(1, 7)]
    requests, scores, completions = make_stage(tmp_path, plan, 6)
    whole = gather(requests, scores, completions, RUN, 6)
    first, second = plan[1].request_id, plan[4].request_id
    left_out = {(first, ITEMS[0]), (first, ITEMS[3]), *((second, item) for item in ITEMS[1:])}
    kept = tables.read(scores[0], tables.SCORES).filter(
        ~pl.struct("request_id", "item_id").map_elements(
            lambda pair: (pair["request_id"], pair["item_id"]) in left_out, pl.Boolean
        )
    )
    prune(completions[0], scores[0], left_out, "lossless-aaaaaa")
    with pytest.raises(UserError, match="its race is 'lossless-aaaaaa'"):
        gather(requests, scores, completions, RUN, 6)
    with pytest.raises(UserError, match="expected 'lossless-bbbbbb'"):
        gather(requests, scores, completions, RUN, 6, race="lossless-bbbbbb")

    found = gather(requests, scores, completions, RUN, 6, race="lossless-aaaaaa")
    assert found["status"].to_list() == ["complete", PRUNED, "complete", "complete", PRUNED, "complete"]
    assert found["items"].to_list() == [5, 3, 5, 5, 1, 5]
    complete = pl.col("status") == "complete"
    assert found.filter(complete).equals(whole.filter(pl.Series(found["status"] == "complete")))
    by_hand = kept.group_by("request_id", maintain_order=True).agg(
        pl.col("reward", "strict", "lenient").cast(pl.Float64).mean(),
        error=(pl.col("reward").cast(pl.Float64).std() / pl.len().sqrt()).fill_null(0.0),
    )
    for name in ("reward", "strict", "lenient"):
        assert found[name].to_list() == pytest.approx(by_hand[name].to_list())
    assert found["standard_error"].to_list() == pytest.approx(by_hand["error"].to_list(), abs=1e-7)
    assert {first, second}.isdisjoint(member.request_id for member in select_members(found, 4))


def test_the_pilot_is_kept_and_refused_elsewhere(tmp_path) -> None:
    plan = [candidate(seed, 0.1) for seed in range(1, 5)]
    requests, scores, completions = make_stage(tmp_path, plan, 2)
    run = {"run_id": RUN, "race": {"mode": "lossless", "pilot": 2, "keep": 1}}
    found = answers(requests, scores[:1], completions[:1], RUN, "search", only=[r.request_id for r in plan[:2]])
    write_pilot(found, tmp_path / "race.parquet", run)
    pilot = read_pilot(tmp_path / "race.parquet", run, ITEMS)
    by_hand = tables.read(scores[0], tables.SCORES)["reward"].to_numpy().reshape(2, len(ITEMS))
    assert np.array_equal(pilot.rewards, by_hand.astype(np.float64))
    with pytest.raises(UserError, match="its race is"):
        read_pilot(tmp_path / "race.parquet", {"run_id": RUN, "race": {**run["race"], "keep": 2}}, ITEMS)
    with pytest.raises(UserError, match="these items"):
        read_pilot(tmp_path / "race.parquet", run, ITEMS[::-1])


def test_what_was_left_out_is_not_judged() -> None:
    rows = pl.DataFrame(
        {"item_id": ["a", "a", "a"], "text": ["5", "", ""], "finish_reason": ["stop", "length", PRUNED]}
    )
    verdicts = judge_all(get("number"), rows, {"a": "5"})
    assert [verdict.reward for verdict in verdicts] == [1, 0, 0] and pruned_items(rows) == 1
