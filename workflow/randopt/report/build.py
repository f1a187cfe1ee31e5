"""The report of an experiment: all metrics in one table, a Markdown page, the figures."""

from collections.abc import Iterable

import polars as pl

from randopt import layout, tables
from randopt.experiment import Experiment
from randopt.files import write_text_atomic
from randopt.report import figures, savings, table
from randopt.tasks.scorers import judges


def metrics_of(experiment: Experiment) -> list[pl.DataFrame]:
    """METRICS of every run at every N, in the config's order."""
    return [
        tables.read(run.folder / layout.prefix_name(n) / "metrics.parquet", tables.METRICS, run_id=run.run_id)
        for run in experiment.runs
        for n in run.prefixes
    ]


def write_report(experiment: Experiment) -> None:
    """metrics.parquet, report.md and figures/ of the experiment."""
    frames = metrics_of(experiment)
    confidence = experiment.config["statistics"]["confidence"]
    tables.write(pl.concat(frames), tables.METRICS, experiment.folder / "metrics.parquet")
    folder = experiment.folder / "figures"
    for run in experiment.runs:
        prefix = run.folder / layout.prefix_name(run.candidates)
        metrics = tables.read(prefix / "metrics.parquet", tables.METRICS, run_id=run.run_id)
        candidates = tables.read(
            layout.candidates_file(run.folder, run.candidates), tables.CANDIDATES, run_id=run.run_id
        )
        name = f"{run.description['model']['name']}-{run.task.label}-{run.folder.name}"
        for kind, figure in (
            ("candidates", figures.score_histogram(candidates, metrics)),
            ("accuracy", figures.accuracy_against_k(metrics)),
        ):
            for suffix in ("png", "svg"):
                figures.save(figure, folder / f"{name}-{kind}.{suffix}")
    heading = f"# {experiment.config['experiment']}\n\n{sampling_note(experiment)}\n\n"
    saved = "".join(f"\n- {note}" for note in (*missing_paper(experiment, frames), *savings.notes(experiment)))
    text = heading + table.to_markdown(frames, confidence) + saved + "\n"
    write_text_atomic(experiment.folder / "report.md", text)


def missing_paper(experiment: Experiment, frames: Iterable[pl.DataFrame]) -> list[str]:
    """A sentence for each run whose `metrics_of` lack the paper verdicts that they should have."""
    told = {frame["run_id"][0] for frame in frames if "paper" in frame["metric"]}
    return [
        f"Run {run.name} has no paper verdicts: {judges(run.task.scorer)[1].name} failed on one of the texts; "
        f"logs/metrics/{run.name}/ names it."
        for run in experiment.runs
        if len(run.verdicts) > 1 and run.run_id not in told
    ]


def sampling_note(experiment: Experiment) -> str:
    """How answers were decoded, which the metrics do not say."""
    temperature = experiment.config["controls"]["self_consistency_temperature"]
    return f"Decoding is greedy; self-consistency samples at temperature {temperature:g}."
