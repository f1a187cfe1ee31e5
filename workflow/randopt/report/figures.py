"""The two figures of a run. The same numbers give the same bytes: no date, no random ids."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.lines
import matplotlib.patches
import numpy as np
import polars as pl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from randopt.errors import UserError
from randopt.files import write_atomic
from randopt.metrics import chosen_k

# Okabe and Ito's palette: told apart by readers with any colour vision, and in grey by marker.
STYLES: dict[str, tuple[str, str, str]] = {
    "randopt": ("RandOpt, vote of the top K", "#0072B2", "o"),
    "self_consistency": ("self-consistency, vote of K base samples", "#D55E00", "s"),
    "random": ("vote of K unselected candidates", "#009E73", "^"),
    "member_mean": ("mean of the top K members", "#56B4E9", ""),
    "top1": ("top-1 candidate", "#CC79A7", ""),
    "base": ("base, greedy", "#000000", ""),
}
DASHES: dict[str, str | tuple] = {
    "member_mean": (0, (1, 1)),
    "top1": (0, (5, 1.5, 1, 1.5)),
    "base": (0, (5, 2)),
}
RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with Matplotlib, so the figure is the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "randopt",
}
WIDTH = 8.0  # inches: at 800 px a point is 1.4 px, so the smallest text is 11 px high
DPI = 200
BINS = 32
ABOVE, BELOW = "#0072B2", "#A6CEE3"  # candidates at or above the base, and below it


def score_histogram(candidates: pl.DataFrame, metrics: pl.DataFrame, metric: str = "lenient") -> Figure:
    """Accuracy of the candidates on the select items, one panel per σ, with the base and its interval.

    `metrics`: of the same run and N; `metric`: lenient or strict. Panels share both axes. A title
    gives the share of candidates at or above the base: the solution density δ(0), ties counted. Where a race
    pruned candidates it is a lower bound; they are in no bar, as their accuracy is over fewer items.
    """
    base = _one(metrics, "base", "select", metric)
    items = base["n"]
    counts = _counts(_complete(candidates)[metric].to_numpy(), items)
    own = round(base["value"] * items)
    low, high = min(counts.min(), own), max(counts.max(), own)
    step = -(-(high - low + 1) // BINS)  # items per bar, rounded up
    # one edge lies just below the base's count, so each bar is wholly below the base, or at or above it
    edges = np.arange(own - step * -(-(own - low) // step), high + step + 1, step) - 0.5
    sigmas = sorted(candidates["sigma"].unique())
    with mpl.rc_context(RC):
        figure = _figure(1.0 + 1.25 * len(sigmas))
        axes = figure.subplots(len(sigmas), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axis, sigma in zip(axes, sigmas, strict=True):
            here = candidates.filter(pl.col("sigma") == sigma)
            mine = _counts(_complete(here)[metric].to_numpy(), items)
            heights, _ = np.histogram(mine, edges)
            colours = [BELOW if edge < own - 1 else ABOVE for edge in edges[:-1]]
            left, width = edges[:-1] / items * 100, 100 * step / items
            axis.bar(left, heights, width, align="edge", color=colours, edgecolor="white", linewidth=0.4)
            axis.axvspan(100 * base["ci_low"], 100 * base["ci_high"], color="0.5", alpha=0.18, lw=0, zorder=0)
            axis.axvline(100 * base["value"], color="black", lw=1.3, ls=DASHES["base"])
            share, pruned = 100 * np.sum(mine >= own) / here.height, here.height - len(mine)
            title = f"{share:.0f} % of {here.height:,} candidates at or above the base"
            axis.set_title(f"σ = {sigma:g}: " + (f"at least {title} ({pruned:,} pruned)" if pruned else title))
            axis.set_ylabel("candidates")
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        left, right = min(edges[0] / items, base["ci_low"]), max(edges[-1] / items, base["ci_high"])
        axes[-1].set_xlim(100 * left - width, 100 * right + width)
        axes[-1].set_xlabel(f"{metric} accuracy on the {items:,} select items (%)")
        _title(figure, metrics)
        marks = [
            mpl.lines.Line2D([], [], color="black", lw=1.3, ls=DASHES["base"], label="base, greedy"),
            mpl.patches.Patch(color="0.5", alpha=0.18, lw=0, label="its confidence interval"),
            mpl.patches.Patch(color=ABOVE, lw=0, label="at or above the base"),
            mpl.patches.Patch(color=BELOW, lw=0, label="below"),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=4)
    return figure


def accuracy_against_k(metrics: pl.DataFrame) -> Figure:
    """Accuracy of every method against K on test, and beside it, lighter, on confirm.

    `metrics`: one run at one N. Bands are the metrics' confidence intervals. Lenient above, strict
    below; one row where the two never differ. The dotted line marks the K chosen on confirm.
    """
    splits = [split for split in ("test", "confirm") if split in metrics["split"]]
    if not splits:
        raise UserError("the metrics hold neither test nor confirm results; run the workflow again.")
    verdicts = ["lenient"] if _verdicts_agree(metrics, splits) else ["lenient", "strict"]
    sizes = sorted(metrics.filter(pl.col("method") == "randopt")["top_k"].unique())
    best = chosen_k(metrics) if "confirm" in splits else None
    with mpl.rc_context(RC):
        figure = _figure(4.1 if len(verdicts) == 1 else 5.9)
        axes = figure.subplots(
            len(verdicts), len(splits), sharex=True, sharey="row", squeeze=False,
            width_ratios=[1.45, 1][: len(splits)], height_ratios=[1.25, 1][: len(verdicts)],
        )  # fmt: skip
        for row, verdict in enumerate(verdicts):
            for column, split in enumerate(splits):
                axis = axes[row, column]
                strength = 1.0 if split == "test" else 0.55
                _draw(axis, metrics, split, verdict, sizes, strength)
                if best is not None:
                    axis.axvline(best, color="0.45", lw=1, ls=":", zorder=0)
                if row == 0:
                    n = metrics.filter(pl.col("split") == split)["n"][0]
                    axis.set_title(f"{split} ({n:,} items)")
                if row == len(verdicts) - 1:
                    axis.set_xlabel("ensemble size K")
            name = verdict if len(verdicts) == 2 else "strict = lenient"
            axes[row, 0].set_ylabel(f"{name} accuracy (%)")
        _title(figure, metrics)
        handles = {line.get_label(): line for line in axes[0, 0].get_lines()}
        shown: list[Artist] = [handles[label] for label, _, _ in STYLES.values() if label in handles]
        if best is not None:
            label = f"K = {best}, the best on confirm"
            shown.append(mpl.lines.Line2D([], [], color="0.45", lw=1, ls=":", label=label))
        shown.append(mpl.patches.Patch(color="0.5", alpha=0.25, lw=0, label="bands: confidence intervals"))
        figure.legend(handles=shown, loc="outside lower center", ncols=3, handlelength=2.6)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure to `path`, a .png (200 dpi) or .svg, whole or not at all, the same bytes each time."""
    kind = Path(path).suffix.lstrip(".")
    # Matplotlib writes its version into a PNG and the date into an SVG; neither is content.
    plain = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    if kind not in plain:
        raise UserError(f"{path}: a figure is written as .png or .svg.")
    with mpl.rc_context(RC):
        write_atomic(path, lambda out: figure.savefig(out, format=kind, dpi=DPI, metadata=plain[kind]))


def _draw(axis: Axes, metrics: pl.DataFrame, split: str, verdict: str, sizes: list[int], strength: float) -> None:
    """All methods on one split; single models, which have no K, as level lines."""
    for method, (label, colour, marker) in STYLES.items():
        rows = metrics.filter(
            (pl.col("method") == method) & (pl.col("split") == split) & (pl.col("metric") == verdict)
        ).sort("top_k")
        if rows.is_empty():
            continue
        value, low, high = (100 * rows[name].to_numpy() for name in ("value", "ci_low", "ci_high"))
        look: dict[str, Any] = {
            "color": colour,
            "alpha": strength,
            "label": label,
            "ls": DASHES.get(method, "-"),
        }
        if method in ("base", "top1"):
            axis.axhline(value[0], lw=1.3, **look)
            continue
        if marker:
            axis.fill_between(rows["top_k"], low, high, color=colour, alpha=0.16 * strength, lw=0)
        width = 2 if method == "randopt" else 1.4
        axis.plot(rows["top_k"], value, marker=marker or None, ms=4.5, lw=width, **look)
    axis.set_xscale("log")
    ticks = _apart(sizes)
    axis.set_xticks(ticks, [str(k) for k in ticks])
    axis.set_xticks([], minor=True)
    axis.grid(axis="y", color="0.92", lw=0.8)
    axis.set_axisbelow(True)


def _figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _apart(sizes: list[int], ratio: float = 1.12) -> list[int]:
    """The sizes, largest first, without those whose labels would touch on the logarithmic axis."""
    kept: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not kept or kept[-1] / size >= ratio:
            kept.append(size)
    return kept[::-1]


def _complete(candidates: pl.DataFrame) -> pl.DataFrame:
    return candidates.filter(pl.col("status") == "complete")


def _counts(shares: np.ndarray, items: int) -> np.ndarray:
    """Correct items from shares of them, without the division's rounding."""
    return np.rint(shares * items).astype(int)


def _title(figure: Figure, metrics: pl.DataFrame) -> None:
    model, task, n = metrics.select("model", "task", "candidates").row(0)
    figure.suptitle(f"{model} on {task}, N = {n:,} candidates", fontsize=10.5, x=0.01, ha="left")


def _verdicts_agree(metrics: pl.DataFrame, splits: list[str]) -> bool:
    key = ["method", "top_k", "split"]
    shown = metrics.filter(pl.col("split").is_in(splits))
    strict, lenient = (shown.filter(pl.col("metric") == name).sort(key)["value"] for name in ("strict", "lenient"))
    return strict.equals(lenient)


def _one(metrics: pl.DataFrame, method: str, split: str, metric: str) -> dict:
    rows = metrics.filter((pl.col("method") == method) & (pl.col("split") == split) & (pl.col("metric") == metric))
    if rows.height != 1:
        raise UserError(f"expected one {metric} result of {method} on {split}, found {rows.height}.")
    return rows.row(0, named=True)
