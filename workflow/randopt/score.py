"""score: from kept texts to verdicts, on a CPU, as often as a scorer changes."""

import logging
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from randopt import layout, race, tables
from randopt.errors import UserError
from randopt.experiment import load_run
from randopt.items import items_hash, read_items, references
from randopt.tasks.scorers import NO_ANSWER, Scorer, Verdict, judges

log = logging.getLogger(__name__)

Place = dict[str, str | int | None]  # what the footers of a shard's tables say


class ScorerFailed(UserError):
    """There are no scores, because the scorer could not judge one of the texts."""


def score(run_folder: Path, stage: str, shard: layout.Shard, scorer_name: str) -> None:
    """Make a shard's scores from its completions: the scorer's, and those of its twin if it has one.

    Raises UserError when the completions are of another run, shard or set of items, or when the
    scorer fails on a text; the texts are kept, so no generation is lost. A paper twin that fails is no reason to
    stop: its file then says why it holds no scores, and whoever needs them gets that reason as ScorerFailed.
    """
    texts, known, place = read_texts(run_folder, stage, shard)
    first, *twins = judges(scorer_name)
    path = layout.shard_file(run_folder, stage, layout.scores(first.name, first.version), shard)
    tables.write(verdicts(first, texts, known), tables.SCORES, path, **place)
    for twin in twins:
        path = layout.shard_file(run_folder, stage, layout.scores(twin.name, twin.version), shard)
        try:
            frame, failed = verdicts(twin, texts, known), None
        except Exception as error:
            frame, failed = tables.SCORES.schema.to_frame(), str(error)
            log.warning("%s holds no scores: %s", path, failed)
        tables.write(frame, tables.SCORES, path, **place, failed=failed)


def read_texts(run_folder: Path, stage: str, shard: layout.Shard) -> tuple[pl.DataFrame, dict[str, object], Place]:
    """A shard's texts (request_id, item_id, text, finish_reason), its references, and what its footers must say."""
    run = load_run(run_folder)
    items = read_items(run["task_id"], layout.stage_splits(stage))
    place: Place = {
        "run_id": run["run_id"],
        "items_hash": items_hash(items),
        "stage": stage,
        "start": shard[0],
        "stop": shard[1],
        "race": layout.stage_race(run, stage),
    }
    path = layout.shard_file(run_folder, stage, "completions", shard)
    columns = ["request_id", "item_id", "text", "finish_reason"]
    return tables.read(path, tables.COMPLETIONS, columns, **place), references(items), place


def verdicts(scorer: Scorer, texts: pl.DataFrame, references: dict[str, object]) -> pl.DataFrame:
    """SCORES of the rows of `texts`, in their order."""
    found = judge_all(scorer, texts, references)
    return texts.select("request_id", "item_id").with_columns(
        reward=pl.Series([v.reward for v in found], dtype=pl.Float32),
        strict=pl.Series([v.strict for v in found], dtype=pl.Boolean),
        lenient=pl.Series([v.lenient for v in found], dtype=pl.Boolean),
        vote_key=pl.Series([v.vote_key for v in found], dtype=pl.String),
        scorer=pl.lit(scorer.name),
        scorer_version=pl.lit(scorer.version, dtype=pl.UInt32),
    )


def check_scored(path: Path, scores: pl.DataFrame) -> None:
    """Raise ScorerFailed when the file says that it holds no `scores` because its scorer failed."""
    if scores.is_empty() and (failed := tables.footer(path).get("failed")):
        raise ScorerFailed(f"{path} holds no scores: {failed}")


def judge_all(scorer: Scorer, texts: pl.DataFrame, references: dict[str, object]) -> list[Verdict]:
    """A verdict per row of `texts` (item_id, text, finish_reason); equal texts on an item are judged once.

    What a race left out is not judged: no answer.
    """
    rows = texts.select("item_id", "text", pl.col("finish_reason") == race.PRUNED).rows()
    distinct = list(dict.fromkeys((item_id, text) for item_id, text, pruned in rows if not pruned))
    verdicts = dict(zip(distinct, _judge(scorer, distinct, references), strict=True))
    return [NO_ANSWER if pruned else verdicts[item_id, text] for item_id, text, pruned in rows]


def _judge(scorer: Scorer, pairs: Sequence[tuple[str, str]], references: dict[str, object]) -> list[Verdict]:
    if scorer.batch is not None:
        return list(scorer.batch([(text, references[item_id]) for item_id, text in pairs]))
    return [judge(scorer, item_id, text, references[item_id]) for item_id, text in pairs]


def judge(scorer: Scorer, item_id: str, text: str, reference: object) -> Verdict:
    """The verdict on one text; UserError that shows it when the scorer fails."""
    try:
        return scorer.score(text, reference)
    except Exception as error:
        raise UserError(
            f"the scorer {scorer.name} failed on item {item_id} with {type(error).__name__}: {error}. "
            f"The text was {text[:200]!r}. The completions are kept: mend the scorer, raise its version "
            "and run again."
        ) from error
