"""randopt rescore: what a corrected scorer, or another one, changes, told from the kept texts before it is adopted.

Texts are judged anew, shard by shard, and held against stored scores. Scores are never written here: Snakemake makes
them, when the installed version's are missing.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from randopt import layout, plan, select, tables
from randopt.errors import UserError
from randopt.experiment import Experiment, Run, load_run
from randopt.requests import Request
from randopt.score import ScorerFailed, check_scored, read_texts, verdicts
from randopt.tasks.scorers import Scorer, judges, resolve

JUDGED = ("reward", "strict", "lenient", "vote_key")
_KEY = ["request_id", "item_id"]
_TAIL = 240  # characters of a text that are shown; answers stand at the end
_BASE = Request().request_id


@dataclass
class Comparison:
    """Stored verdicts of one run against those of the scorer that judged its texts now."""

    run: Run
    old: str  # folder name of the stored scores, as in gsm8k-v1
    new: Scorer
    differences: Path  # folder of the DIFFERENCES, a file for each shard that has some
    counts: pl.DataFrame = field(default_factory=pl.DataFrame)  # a row for each stage, see `_count`
    base: pl.DataFrame = field(default_factory=pl.DataFrame)  # the base's greedy answers, a row for each split
    candidates: pl.DataFrame = field(default_factory=pl.DataFrame)  # request_id, and its mean rewards old and new
    examples: list[dict] = field(default_factory=list)  # rows of DIFFERENCES, with the reference
    left_out: list[str] = field(default_factory=list)  # shards without texts or without stored scores

    @property
    def name(self) -> str:
        """The scorer and its version, spelled like the folder of its scores."""
        return _folder(self.new)

    @property
    def differing(self) -> int:
        """Answers with any verdict that is not the stored one."""
        return int(self.counts["differ"].sum())


def rescore(experiment: Experiment, scorer: str | None, old: str | None, examples: int) -> list[Comparison]:
    """A comparison for each run; differences are written below the experiment's folder.

    `scorer`: None is each task's own, "paper" its twin, else a name: then of the runs which have that scorer's
    verdicts, or of all runs if none has. `old`: a folder name of stored scores; without it the newest stored version
    of the scorer that is older than the installed one, else the installed one, else the task's own scorer's.
    `examples`: differing answers of each run that are kept for the eye.

    Raises UserError when there are no such scores, a table is not what it should be, or the scorer fails on a text.
    """
    runs = [run for run in experiment.runs if _has_verdicts(run, scorer)] or experiment.runs
    found = []
    for run in map(_with_texts, runs):
        new = resolve(run.task.scorer, scorer)
        stored = old or _previous(run, new)
        folder = experiment.folder / "rescore" / f"{stored}--{_folder(new)}" / run.name
        found.append(Comparison(run, stored, new, folder))
    work = [(comparison, *place) for comparison in found for place in _places(comparison)]
    for comparison in found:
        shutil.rmtree(comparison.differences, ignore_errors=True)
    for comparison, stage, shard in tqdm(work, desc="judging", unit="shard"):
        _compare(comparison, stage, shard, examples)
    for comparison in found:
        if not comparison.counts.width:
            raise UserError(
                f"run {comparison.run.name} has no scores {comparison.old} to compare with; stored are: "
                f"{', '.join(_stored(comparison.run)) or 'none'}. Give one of these with --old, or run the workflow."
            )
    return found


def compare(scorer: Scorer, texts: pl.DataFrame, references: dict[str, object], stored: pl.DataFrame) -> pl.DataFrame:
    """A row per text in its order: request_id, item_id, text, old_X and new_X of each X of JUDGED, and `differs`.

    `texts`: as `score.read_texts` gives them; `stored`: SCORES of the same answers in any order. Null vote keys are
    equal. UserError when the stored scores are of other answers.
    """
    new = verdicts(scorer, texts, references)
    both = (
        texts.select(*_KEY, "text")
        .with_columns(new[name].alias(f"new_{name}") for name in JUDGED)
        .join(
            stored.select(*_KEY, *(pl.col(name).alias(f"old_{name}") for name in JUDGED)),
            on=_KEY,
            how="left",
            maintain_order="left",
        )
    )
    if stored.height != texts.height or both["old_reward"].null_count():
        raise UserError(
            f"the {stored.height} stored scores are not of the {texts.height} texts that they lie beside. Remove them "
            "and run the workflow: they are made again from the texts."
        )
    changed = [pl.col(f"old_{name}").ne_missing(pl.col(f"new_{name}")) for name in JUDGED]
    return both.with_columns(differs=pl.any_horizontal(changed))


def _compare(comparison: Comparison, stage: str, shard: layout.Shard, examples: int) -> None:
    """Add one shard to the comparison and write its differences."""
    run, name = comparison.run, layout.shard_name(shard)
    texts, references, place = read_texts(run.folder, stage, shard)
    path = _old_file(comparison, stage, shard)
    stored = tables.read(path, tables.SCORES, None, **place)
    try:
        check_scored(path, stored)
    except ScorerFailed:
        comparison.left_out.append(f"{stage} {name}")
        return
    both = compare(comparison.new, texts, references, stored).with_columns(
        stage=pl.lit(stage), split=pl.col("item_id").str.split("-").list.first()
    )
    comparison.counts = _added(comparison.counts, both, "stage")
    if layout.stage_kind(stage) == "controls":
        comparison.base = _added(comparison.base, both.filter(pl.col("request_id") == _BASE), "split")
    if layout.stage_kind(stage) == "search":
        means = both.group_by("request_id", maintain_order=True).agg(
            pl.col("old_reward", "new_reward").cast(pl.Float64).mean()
        )
        comparison.candidates = pl.concat([comparison.candidates, means]) if comparison.candidates.width else means
    different = both.filter("differs")
    if different.height:
        output = comparison.differences / stage / f"{name}.parquet"
        said = {"run_id": run.run_id, "stage": stage, "old": comparison.old, "new": comparison.name}
        tables.write(different, tables.DIFFERENCES, output, **said)
    for row in different.head(examples - len(comparison.examples)).iter_rows(named=True):
        comparison.examples.append({**row, "reference": references[row["item_id"]]})


def _added(sums: pl.DataFrame, both: pl.DataFrame, by: str) -> pl.DataFrame:
    """`sums`, and the counts of more answers: a row for each value of `by`, in order of appearance."""
    parts = [sums, _count(both, by)] if sums.width else [_count(both, by)]
    return pl.concat(parts).group_by(by, maintain_order=True).sum()


def _count(both: pl.DataFrame, by: str) -> pl.DataFrame:
    """answers; differ; changed_X; of strict and lenient those that became right and wrong, and were and are right."""
    right = {
        f"{word}_{name}": expression
        for name in ("strict", "lenient")
        for word, expression in (
            ("old", pl.col(f"old_{name}")),
            ("new", pl.col(f"new_{name}")),
            ("gained", pl.col(f"new_{name}") & ~pl.col(f"old_{name}")),
            ("lost", pl.col(f"old_{name}") & ~pl.col(f"new_{name}")),
        )
    }
    changed = {f"changed_{name}": pl.col(f"old_{name}").ne_missing(pl.col(f"new_{name}")) for name in JUDGED}
    counted = {"differ": pl.col("differs"), **changed, **right}
    return both.group_by(by, maintain_order=True).agg(
        pl.len().cast(pl.Int64).alias("answers"),
        *(expression.sum().cast(pl.Int64).alias(name) for name, expression in counted.items()),
    )


def _has_verdicts(run: Run, scorer: str | None) -> bool:
    names = [judge.name for judge in judges(run.task.scorer)]
    return scorer is None or scorer in names or (scorer == "paper" and len(names) > 1)


def _with_texts(run: Run) -> Run:
    """The run, or with a race, which is of its scorer's version, the one of the newest version that has texts."""
    race = run.description.get("race")
    if race is None:
        return run
    for version in range(race["scorer_version"], 0, -1):
        found = replace(run, description={**run.description, "race": {**race, "scorer_version": version}})
        if (found.folder / "search" / "completions").is_dir():
            return replace(found, description=load_run(found.folder))
    return run


def _folder(scorer: Scorer) -> str:
    return Path(layout.scores(scorer.name, scorer.version)).name


def _stored(run: Run) -> list[str]:
    """Folder names of the scores that any stage has."""
    return sorted({path.name for stage in run.stages() for path in (run.folder / stage / "scores").glob("*")})


def _previous(run: Run, new: Scorer) -> str:
    """What is compared with when nobody says it, see `rescore`."""
    own = resolve(run.task.scorer)
    for scorer in (new, own):
        pattern = re.compile(rf"{re.escape(scorer.name)}-v(\d+)")
        versions = [int(match[1]) for name in _stored(run) if (match := pattern.fullmatch(name))]
        if versions:
            older = [version for version in versions if version < scorer.version]
            chosen = max(older) if older else min(versions)
            return _folder(scorer._replace(version=chosen))
    return _folder(own)


def _old_file(comparison: Comparison, stage: str, shard: layout.Shard) -> Path:
    return layout.shard_file(comparison.run.folder, stage, f"scores/{comparison.old}", shard)


def _places(comparison: Comparison) -> list[tuple[str, layout.Shard]]:
    """Stages and shards that have texts and old scores; the others are noted."""
    run, found = comparison.run, []
    for stage in run.stages():
        for shard in run.shards(stage):
            texts = layout.shard_file(run.folder, stage, "completions", shard)
            if texts.exists() and _old_file(comparison, stage, shard).exists():
                found.append((stage, shard))
            else:
                comparison.left_out.append(f"{stage} {layout.shard_name(shard)}")
    return found


def experts_kept(comparison: Comparison) -> int | None:
    """How many of the K max experts both scorers select; None where the search is incomplete or raced.

    A race left out answers by the old scorer's word, so nobody knows what the new one would have selected.
    """
    run, means = comparison.run, comparison.candidates
    if "race" in run.description or means.height < run.candidates:
        return None
    terms = {request.request_id: request.perturbation[0] for request in plan.search(run.description, run.candidates)}
    ranked = means.with_columns(
        status=pl.lit("complete"),
        seed=pl.Series([terms[name][0] for name in means["request_id"]], dtype=pl.UInt64),
        sigma=pl.Series([terms[name][1] for name in means["request_id"]], dtype=pl.Float64),
    )
    old, new = (
        set(select.rank(ranked.with_columns(reward=pl.col(name)))["request_id"].head(run.members))
        for name in ("old_reward", "new_reward")
    )
    return len(old & new)


def render(comparisons: Sequence[Comparison], config: Path) -> Group:
    """Counts, what becomes of the base and of the experts, examples, and what to run; for a terminal.

    `config`: the experiment's config file, for the command that adopts the new verdicts.
    """
    parts: list[RenderableType] = []
    for comparison in comparisons:
        answers = int(comparison.counts["answers"].sum())
        parts.append(
            Text(
                f"{comparison.run.name}: {comparison.old} → {comparison.name}: {comparison.differing:,} of {answers:,} "
                "answers are judged differently.",
                style="bold",
            )
        )
        parts += [_counts_table(comparison), *map(Text, _notes(comparison, config))]
        if comparison.examples:
            parts.append(_examples_table(comparison))
        parts.append(Text())
    return Group(*parts)


def _counts_table(comparison: Comparison) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("stage", overflow="fold")
    for column in ("answers", "differ", *(name.replace("_", " ") for name in JUDGED), "strict ±", "lenient ±"):
        table.add_column(column, justify="right")
    for row in comparison.counts.iter_rows(named=True):
        numbers = [row["answers"], row["differ"], *(row[f"changed_{name}"] for name in JUDGED)]
        moved = [f"+{row[f'gained_{name}']:,} −{row[f'lost_{name}']:,}" for name in ("strict", "lenient")]
        table.add_row(row["stage"], *(f"{number:,}" for number in numbers), *moved)
    return table


def _notes(comparison: Comparison, config: Path) -> list[str]:
    run, notes = comparison.run, []
    for row in comparison.base.iter_rows(named=True):
        told = []
        for name in ("strict", "lenient"):
            before, after = (100 * row[f"{word}_{name}"] / row["answers"] for word in ("old", "new"))
            net = row[f"new_{name}"] - row[f"old_{name}"]
            told.append(f"{name} {before:.1f} → {after:.1f} % (net {net:+,} of {row['answers']:,})".replace("-", "−"))
        notes.append(f"base on {row['split']}: {', '.join(told)}")
    kept = experts_kept(comparison)
    if kept is not None:
        notes.append(
            f"experts (N = {run.candidates:,}, K = {run.members:,}): {kept:,} of {run.members:,} stay selected"
        )
    if "race" in run.description:
        notes.append("what the race left out was never answered and counts as no answer for both.")
    if comparison.left_out:
        more = ", ..." if len(comparison.left_out) > 5 else ""
        notes.append(
            f"left out, without texts or without scores {comparison.old}: {len(comparison.left_out):,} shards "
            f"({', '.join(comparison.left_out[:5])}{more})."
        )
    if comparison.differing:
        notes.append(f"all differences: {comparison.differences}/**/*.parquet")
        notes.append(_adoption(comparison, config))
    if not comparison.differing:
        notes.append("Nothing differs.")
    return notes


def _adoption(comparison: Comparison, config: Path) -> str:
    """How the new verdicts become the run's."""
    run, new = comparison.run, comparison.new
    command = f"snakemake --cores all --configfile {config} (or as you started it)"
    if comparison.old == comparison.name:
        return (
            f"{new.name} changed, but its version did not: raise it in workflow/randopt/tasks/scorers/__init__.py, "
            "or the stored scores stay as they are."
        )
    if new.name not in [scorer.name for scorer in judges(run.task.scorer)]:
        return f"to adopt it: `scorer: {new.name}` for the task {run.task.label} in {config}, then {command}."
    if new.name == run.task.scorer and "race" in run.description:
        return (
            f"to adopt it: {command}. A raced search follows its scorer's version: it is generated again, on the GPU."
        )
    return (
        f"to adopt it: {command}. Scores {comparison.name} that are missing and what follows are made, with a GPU only "
        f"for experts that are new; the scores {comparison.old} stay."
    )


def _examples_table(comparison: Comparison) -> Table:
    title = f"the first {len(comparison.examples)} that differ"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_lines=True)
    for column, ratio in (("answer", 2), ("end of the text", 5), ("reference", 2), ("old → new", 3)):
        table.add_column(column, overflow="fold", ratio=ratio)
    for row in comparison.examples:
        changes = [
            f"{name.replace('_', ' ')} {_spelled(row[f'old_{name}'])} → {_spelled(row[f'new_{name}'])}"
            for name in JUDGED
            if row[f"old_{name}"] != row[f"new_{name}"]
        ]
        table.add_row(
            Text(f"{row['stage']}\n{row['item_id']}\n{row['request_id']}"),
            Text(_visible(row["text"][-_TAIL:])),
            Text(_visible(str(row["reference"])[:_TAIL])),
            Text("\n".join(changes)),
        )
    return table


def _spelled(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "right" if value else "wrong"
    return f"{value:.3g}" if isinstance(value, float) else _visible(repr(value))[:_TAIL]


def _visible(text: str) -> str:
    """Control characters spelled out: a model's text must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
