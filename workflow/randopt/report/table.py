"""The results table, in the terminal and in Markdown: numbers, their intervals, and what they cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl
from rich import box
from rich.console import Group, JustifyMethod
from rich.table import Table
from rich.text import Text

from randopt.errors import UserError
from randopt.metrics import chosen_k

LABELS = {
    "base": "base",
    "self_consistency": "self-consistency",
    "random": "random vote",
    "member_mean": "member mean",
    "top1": "top-1",
    "randopt": "RandOpt",
}
SEARCHED = ("member_mean", "top1", "randopt")  # these differ from one N to the next
INTERVAL = len("[36.6–60.4]")
_RUN = ["model", "task", "run_id"]


@dataclass(frozen=True)
class _Report:
    title: str
    header: list[str]
    rows: list[list[str]]
    bold: set[int]  # rows at the K chosen on confirm
    notes: list[str]


def render(metrics: pl.DataFrame | Sequence[pl.DataFrame], confidence: float = 0.95) -> Group:
    """A table and its reading for each model × task of METRICS frames, for a terminal.

    `confidence` is the level the metrics were made with; it is only printed. UserError when empty.
    """
    parts: list[Table | Text] = []
    for report in _reports(metrics, confidence):
        table = Table(title=report.title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for index, name in enumerate(report.header):
            # At 80 columns (100 with paper verdicts) a label is folded and an interval goes below its value; no number
            # is cut.
            widest = max(len(row[index]) for row in report.rows)
            whole = INTERVAL if "%" in name else widest if index else None
            title = name.replace("generations", "genera-\ntions")
            justify: JustifyMethod = "right" if index else "left"
            table.add_column(title, justify=justify, min_width=whole, overflow="fold", vertical="top")
        for index, row in enumerate(report.rows):
            table.add_row(*row, style="bold" if index in report.bold else "")
        parts += [table, *(Text(note) for note in report.notes), Text()]
    return Group(*parts)


def to_markdown(metrics: pl.DataFrame | Sequence[pl.DataFrame], confidence: float = 0.95) -> str:
    """The same as `render`, as Markdown."""
    lines = []
    for report in _reports(metrics, confidence):
        lines += [f"### {report.title}", ""]
        lines.append("| " + " | ".join(_break(name) for name in report.header) + " |")
        lines.append("|:--" + "|--:" * (len(report.header) - 1) + "|")
        for index, row in enumerate(report.rows):
            cells = [f"**{_escape(row[0])}**" if index in report.bold else _escape(row[0]), *row[1:]]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *(f"- {_escape(note)}" for note in report.notes), ""]
    return "\n".join(lines)


def difference_sentence(row: dict, other: str, confidence: float = 0.95) -> str:
    """One METRICS row of a difference, in words that claim no more than its interval does."""
    value, low, high = (100 * row[name] for name in ("value", "ci_low", "ci_high"))
    if row["ci_low"] <= 0 <= row["ci_high"]:
        reading = "the interval includes 0: no difference shown"
    else:
        reading = f"RandOpt is {'higher' if row['ci_low'] > 0 else 'lower'}"
    return (
        f"RandOpt − {other}: {_signed(value)} points "
        f"[{100 * confidence:g} % CI {_signed(low)}, {_signed(high)}]; {reading}."
    )


def _reports(metrics: pl.DataFrame | Sequence[pl.DataFrame], confidence: float) -> Iterator[_Report]:
    frames = [metrics] if isinstance(metrics, pl.DataFrame) else list(metrics)
    whole = pl.concat(frames) if frames else None
    if whole is None or whole.is_empty():
        raise UserError("there are no metrics to show yet; run the workflow first.")
    for _, run in whole.group_by(_RUN, maintain_order=True):
        yield _report(run, confidence)


def _report(run: pl.DataFrame, confidence: float) -> _Report:
    model, task, run_id = run.select(_RUN).row(0)
    prefixes = sorted(run["candidates"].unique())
    chosen = {n: _chosen(run.filter(pl.col("candidates") == n)) for n in prefixes}
    # one look-up for all cells: (N, method, K, split, metric) -> row
    cells = {
        (row["candidates"], row["method"], row["top_k"], row["split"], row["metric"]): row
        for row in run.iter_rows(named=True)
    }
    columns = [("select", "lenient"), ("confirm", "lenient"), ("test", "lenient"), ("test", "strict")]
    by_paper = "paper" in run["metric"]
    if by_paper:
        columns.append(("test", "paper"))
    rows: list[list[str]] = []
    bold: set[int] = set()
    for n, method, k in _lines(run, prefixes):
        label = LABELS[method]
        if len(prefixes) > 1 and method in SEARCHED:
            label = f"{label} (N = {n:,})"
        shown = [_cell(cells.get((n, method, k, split, metric))) for split, metric in columns]
        test = cells.get((n, method, k, "test", "lenient"))
        cost = [f"{test[name]:,}" if test else "–" for name in ("generations", "tokens")]
        if method == "randopt" and k == chosen[n]:
            bold.add(len(rows))
        rows.append([label, str(k), *shown, *cost])
    sizes = {split: _items(run, split) for split in ("select", "confirm", "test")}
    header = [
        "method",
        "K",
        f"select\nlenient %\n(seen by\nthe search)\n{sizes['select']} items",
        f"confirm\nlenient %\n\n\n{sizes['confirm']} items",
        f"test\nlenient %\n\n\n{sizes['test']} items",
        f"test\nstrict %\n\n\n{sizes['test']} items",
        *([f"test\npaper %\n\n\n{sizes['test']} items"] if by_paper else []),
        "generations",
        "tokens",
    ]
    plan = ", ".join(f"{n:,}" for n in prefixes)
    notes = [
        f"In brackets: {100 * confidence:g} % confidence intervals over items. Generations and completion "
        "tokens: all that the test answers cost, the search included.",
        "base: one greedy answer. self-consistency: vote of K sampled answers of the base. random vote: of K "
        "candidates nobody selected. RandOpt: vote of the best K.",
    ]
    if by_paper:
        notes.append(
            "paper: the same answers by the rules of the published experiments, faults included, and votes by their "
            "keys; only these numbers compare with the paper's."
        )
    for n in prefixes:
        notes += _verdict(cells, n, chosen[n], confidence)
    return _Report(f"{model} × {task}, N = {plan} (run {run_id})", header, rows, bold, notes)


def _verdict(cells: dict, n: int, k: int | None, confidence: float) -> list[str]:
    if k is None:
        return [f"N = {n:,}: no confirm items, so no K can be chosen and no difference is stated."]
    notes = [f"N = {n:,}: K = {k} is the best on confirm. On test, lenient, paired by item:"]
    randopt = cells.get((n, "randopt", k, "test", "lenient"))
    rivals = (
        ("base", "base"),
        ("self_consistency", f"self-consistency (K = {k})"),
        ("random", f"random vote (K = {k})"),
    )
    for method, other in rivals:
        row = cells.get((n, "randopt", k, "test", f"lenient_minus_{method}"))
        rival = cells.get((n, method, 1 if method == "base" else k, "test", "lenient"))
        if row is None or rival is None or randopt is None:
            notes.append(f"RandOpt − {other}: no test items.")
            continue
        times = randopt["generations"] / rival["generations"]
        cost = f"RandOpt spent {_times(times)} the generations."
        notes.append(f"{difference_sentence(row, other, confidence)} {cost}")
    return notes


def _lines(run: pl.DataFrame, prefixes: list[int]) -> Iterator[tuple[int, str, int]]:
    """(N, method, K) of the table's rows; what no search enters is shown once."""
    pairs = run.select("candidates", "method", "top_k").unique()
    for method in LABELS:
        for n in prefixes if method in SEARCHED else prefixes[-1:]:
            chosen = pairs.filter((pl.col("method") == method) & (pl.col("candidates") == n))
            for k in sorted(chosen["top_k"]):
                yield n, method, k


def _chosen(metrics: pl.DataFrame) -> int | None:
    has_confirm = "confirm" in metrics["split"]
    return chosen_k(metrics) if has_confirm else None


def _items(run: pl.DataFrame, split: str) -> str:
    n = run.filter(pl.col("split") == split)["n"]
    return f"{n[0]:,}" if len(n) else "0"


def _cell(row: dict | None) -> str:
    """An accuracy is never negative, so an en dash between the bounds cannot be read as a sign."""
    if row is None:
        return "–"
    return f"{100 * row['value']:.1f} [{100 * row['ci_low']:.1f}–{100 * row['ci_high']:.1f}]"


def _signed(points: float) -> str:
    """One decimal with its sign; a value that rounds to zero has none."""
    text = f"{points:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _break(text: str) -> str:
    """Lines of a heading in Markdown."""
    return "<br>".join(_escape(line) for line in text.split("\n") if line)


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
