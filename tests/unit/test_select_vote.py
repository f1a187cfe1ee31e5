"""Ranking is total; votes equal a naive count, ties and abstentions included."""

from collections import Counter

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from randopt import tables
from randopt.errors import UserError
from randopt.requests import candidate
from randopt.select import rank, select_members, selection
from randopt.vote import votes


def population(rows: list[tuple[int, float, float]], status: str = "complete") -> pl.DataFrame:
    """CANDIDATES from (seed, σ, reward)."""
    return pl.DataFrame(
        [
            {
                "request_id": candidate(seed, sigma).request_id,
                "seed": seed,
                "sigma": sigma,
                "reward": reward,
                "strict": reward,
                "lenient": reward,
                "standard_error": 0.0,
                "items": 4,
                "status": status,
                "tokens": 9,
            }
            for seed, sigma, reward in rows
        ],
        schema=tables.CANDIDATES.schema,
    )


def ensemble(keys: list[list[str | None]], right: str = "a") -> pl.DataFrame:
    """Answers of members (outer list, best first) to items; strict is lenient where the rank is even."""
    return pl.DataFrame(
        [
            {
                "position": position,
                "item_id": f"test-{item:05d}",
                "split": "test",
                "vote_key": key,
                "strict": key == right and position % 2 == 0,
                "lenient": key == right,
            }
            for position, row in enumerate(keys)
            for item, key in enumerate(row)
        ],
        schema_overrides={"vote_key": pl.String, "position": pl.UInt32},
    )


def test_rank_is_reward_then_seed_then_sigma() -> None:
    frame = population([(5, 0.002, 0.5), (5, 0.001, 0.5), (2, 0.002, 0.5), (9, 0.001, 0.75), (1, 0.001, 0.25)])
    ranked = rank(frame).select("seed", "sigma").rows()
    assert ranked == [(9, 0.001), (2, 0.002), (5, 0.001), (5, 0.002), (1, 0.001)]


@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.sampled_from([0.001, 0.002]), st.sampled_from([0.0, 0.25, 0.5])),
        min_size=1,
        max_size=12,
        unique_by=lambda row: row[:2],
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_rank_does_not_depend_on_the_order_of_rows(rows: list, random) -> None:
    shuffled = random.sample(rows, len(rows))
    expected = [(seed, sigma) for seed, sigma, _ in sorted(rows, key=lambda r: (-r[2], r[0], r[1]))]
    for order in (rows, shuffled):
        assert rank(population(order)).select("seed", "sigma").rows() == expected
    members = select_members(population(shuffled), len(rows))
    assert [member.perturbation[0] for member in members] == expected


def test_pruned_candidates_are_never_selected() -> None:
    frame = pl.concat([population([(1, 0.1, 1.0)], status="pruned"), population([(2, 0.1, 0.0)])])
    assert rank(frame)["seed"].to_list() == [2, 1]
    with pytest.raises(UserError, match="2 members were asked for, but 1 candidates were scored in full"):
        select_members(frame, 2)


def test_an_altered_candidate_is_refused() -> None:
    frame = population([(1, 0.1, 1.0)]).with_columns(sigma=pl.lit(0.2))
    with pytest.raises(UserError, match="was altered"):
        select_members(frame, 1)


def test_selection_carries_both_scores() -> None:
    frame = population([(1, 0.1, 0.5), (2, 0.1, 0.75), (3, 0.1, 0.25)])
    scores = [
        (2, "confirm", 1.0),
        (2, "confirm", 0.0),
        (1, "confirm", 1.0),
        (1, "confirm", 1.0),
        (1, "test", 0.0),
    ]
    members = pl.DataFrame(
        [
            {
                "request_id": candidate(seed, 0.1).request_id,
                "item_id": f"{split}-{i}",
                "split": split,
                "reward": r,
            }
            for i, (seed, split, r) in enumerate(scores)
        ]
    )
    got = selection(frame, 2, members)
    assert got.select("rank", "seed", "select_score", "confirm_score").rows() == [
        (1, 2, 0.75, 0.5),
        (2, 1, 0.5, 1.0),
    ]
    assert got["request_id"][0] == candidate(2, 0.1).request_id
    with pytest.raises(UserError, match="has no scores on the confirm items"):
        selection(frame, 3, members)


def test_vote_by_hand() -> None:
    keys = [["b", "b", None], ["a", "a", None], ["a", None, None], ["c", None, "c"], ["c", "b", None]]
    frame = votes(ensemble(keys), [1, 2, 3, 5], "randopt")
    got = frame.select("top_k", "vote_key", "votes", "valid_votes", "margin", "strict", "lenient").rows()
    none = (None, 0, 0, 0, False, False)
    assert got == [
        (1, "b", 1, 1, 1, False, False), (1, "b", 1, 1, 1, False, False), (1, *none),
        (2, "b", 1, 2, 0, False, False), (2, "b", 1, 2, 0, False, False), (2, *none),
        # the winner's best supporter is the member of rank 2, whose strict verdict is no
        (3, "a", 2, 3, 1, False, True), (3, "b", 1, 2, 0, False, False), (3, *none),
        (5, "a", 2, 5, 0, False, True), (5, "b", 2, 3, 1, False, False), (5, "c", 1, 1, 1, False, False),
    ]  # fmt: skip


def naive(keys: list[list[str | None]], k: int, item: int) -> tuple:
    """The rule, member by member."""
    cast = [(row[item], position) for position, row in enumerate(keys[:k]) if row[item] is not None]
    if not cast:
        return None, 0, 0, 0, False, False
    counts = Counter(key for key, _ in cast)
    first = {key: min(place for other, place in cast if other == key) for key in counts}
    winner = min(counts, key=lambda key: (-counts[key], first[key]))
    runner = max((count for key, count in counts.items() if key != winner), default=0)
    right = winner == "a"
    strict = right and first[winner] % 2 == 0
    return winner, counts[winner], len(cast), counts[winner] - runner, strict, right


@st.composite
def boards(draw) -> list[list[str | None]]:
    members, items = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    key = st.sampled_from(["a", "b", "c", "", None])
    return draw(st.lists(st.lists(key, min_size=items, max_size=items), min_size=members, max_size=members))


@given(boards(), st.data())
@settings(max_examples=150, deadline=None)
def test_votes_equal_a_naive_count(keys: list[list[str | None]], data) -> None:
    sizes = data.draw(st.lists(st.integers(1, len(keys)), min_size=1, unique=True))
    answers = ensemble(keys).sample(fraction=1, shuffle=True, seed=0)  # the order of rows is no vote
    frame = votes(answers, sizes, "random")
    expected = [(k, *naive(keys, k, item)) for k in sorted(sizes) for item in range(len(keys[0]))]
    columns = ("top_k", "vote_key", "votes", "valid_votes", "margin", "strict", "lenient")
    assert frame.select(columns).rows() == expected
    assert frame.schema == tables.VOTES.schema and set(frame["method"]) == {"random"}


def test_positions_need_not_begin_at_zero() -> None:
    samples = ensemble([["a"], ["b"], ["b"]])
    shifted = samples.with_columns(position=pl.col("position") + 2)
    assert votes(shifted, [1, 3], "x").equals(votes(samples, [1, 3], "x"))


def test_incomplete_ensembles_are_refused() -> None:
    frame = ensemble([["a", "b"], ["a", "b"]])
    for sizes in ([], [0], [1, 3]):
        with pytest.raises(UserError, match="must lie between 1 and the 2 members"):
            votes(frame, sizes, "x")
    with pytest.raises(UserError, match="1 of the 2 members answered test-00001"):
        votes(frame.head(3), [1], "x")
    with pytest.raises(UserError, match="the member at position 1 has test-00001 twice"):
        votes(pl.concat([frame, frame.tail(1)]), [1], "x")
