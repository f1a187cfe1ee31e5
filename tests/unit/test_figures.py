"""Figures: every method is there, the same bytes come out, and odd inputs do not break them."""

from pathlib import Path

import polars as pl
import pytest
from matplotlib.figure import Figure

from randopt.errors import UserError
from randopt.report.figures import STYLES, accuracy_against_k, save, score_histogram
from tests.unit.test_metrics import Population, populate


@pytest.fixture(scope="module")
def population() -> Population:
    return populate()


@pytest.fixture(scope="module")
def metrics(population: Population) -> pl.DataFrame:
    return population.metrics()


def both(population: Population, metrics: pl.DataFrame) -> list[Figure]:
    return [score_histogram(population.candidates, metrics), accuracy_against_k(metrics)]


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_bytes(population: Population, metrics: pl.DataFrame, tmp_path: Path, kind: str) -> None:
    for number in range(2):
        for name, figure in zip("ab", both(population, metrics), strict=True):
            save(figure, tmp_path / f"{name}{number}.{kind}")
    for name in "ab":
        first, second = ((tmp_path / f"{name}{number}.{kind}").read_bytes() for number in range(2))
        assert first == second
        assert len(first) < 400_000
    if kind == "png":
        assert first[:8] == b"\x89PNG\r\n\x1a\n" and b"Software" not in first
        assert int.from_bytes(first[16:20]) == 1600  # 8 inches at 200 dpi
    else:
        assert b"<dc:date>" not in first


def test_only_png_and_svg(metrics: pl.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"written as \.png or \.svg"):
        save(accuracy_against_k(metrics), tmp_path / "a.jpg")
    assert not list(tmp_path.iterdir())


def test_every_method_is_drawn_and_explained(metrics: pl.DataFrame) -> None:
    figure = accuracy_against_k(metrics)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:6] == [label for label, _, _ in STYLES.values()]
    assert len(figure.axes) == 4
    assert {axis.get_title(loc="left") for axis in figure.axes[:2]} == {
        "test (60 items)",
        "confirm (30 items)",
    }
    randopt = next(line for line in figure.axes[0].get_lines() if line.get_label() == labels[0])
    expected = metrics.filter(method="randopt", split="test", metric="lenient").sort("top_k")
    assert randopt.get_xdata().tolist() == expected["top_k"].to_list()
    assert randopt.get_ydata().tolist() == (100 * expected["value"]).to_list()


def test_one_row_where_strict_is_lenient(metrics: pl.DataFrame) -> None:
    same = pl.concat(
        [
            metrics.filter(metric="lenient"),
            metrics.filter(metric="lenient").with_columns(metric=pl.lit("strict")),
        ]
    )
    figure = accuracy_against_k(same)
    assert len(figure.axes) == 2 and "strict = lenient" in figure.axes[0].get_ylabel()


def test_without_confirm_no_k_is_marked(metrics: pl.DataFrame) -> None:
    figure = accuracy_against_k(metrics.filter(pl.col("split") != "confirm"))
    assert len(figure.axes) == 2 and len(figure.legends[0].get_texts()) == 7
    with pytest.raises(UserError, match="neither test nor confirm"):
        accuracy_against_k(metrics.filter(pl.col("split") == "select"))


def test_histogram_counts_every_candidate(population: Population, metrics: pl.DataFrame) -> None:
    figure = score_histogram(population.candidates, metrics)
    sigmas = sorted(population.candidates["sigma"].unique())
    assert len(figure.axes) == len(sigmas)
    base = metrics.filter(method="base", split="select", metric="lenient")["value"][0]
    for axis, sigma in zip(figure.axes, sigmas, strict=True):
        mine = population.candidates.filter(pl.col("sigma") == sigma)
        assert sum(bar.get_height() for bar in axis.containers[0]) == mine.height
        share = (mine["lenient"] >= base - 1e-9).mean()
        assert f"{100 * share:.0f} % of 16 candidates" in axis.get_title(loc="left")
    score_histogram(population.candidates, metrics, "strict")


@pytest.mark.parametrize("top_k", [(1,), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 45, 48)])
def test_few_and_many_sizes(tmp_path: Path, top_k: tuple[int, ...]) -> None:
    odd = populate(n=48, top_k=top_k, sigmas=(0.001,), sizes={"select": 3, "confirm": 2, "test": 1})
    for figure in both(odd, odd.metrics()):
        save(figure, tmp_path / "odd.png")
