"""The requests of each stage, as pure functions of the run: the same plan on every machine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from randopt import layout, tables
from randopt.requests import Decoding, Request, candidate, from_rows, to_rows


def search(run: Mapping[str, Any], total: int) -> list[Request]:
    """The first `total` candidates: seed first_seed + i, σ = sigmas[i mod M]."""
    first, sigmas = run["plan"]["first_seed"], run["plan"]["sigmas"]
    return [candidate(first + index, sigmas[index % len(sigmas)]) for index in range(total)]


def controls(run: Mapping[str, Any], members: int, temperature: float) -> list[Request]:
    """The base, the σ = 0 candidate that must equal it, and `members` samples of the base."""
    samples = [Request((), Decoding(temperature, seed)) for seed in range(members)]
    return [Request(), candidate(run["plan"]["first_seed"], 0.0), *samples]


def random(run: Mapping[str, Any], members: int) -> list[Request]:
    """A random draw of `members` candidates: the first of the plan.

    Seeds are exchangeable before they are scored, so any fixed choice is a random one, and this
    one stays the same however large N becomes.
    """
    return search(run, members)


def stage_requests(run: Mapping[str, Any], stage: str, rows: int) -> list[Request]:
    """The requests of search, random, or the controls stage, whose name carries the temperature."""
    kind = layout.stage_kind(stage)
    if kind == "controls":
        return controls(run, rows - 2, layout.controls_temperature(stage))
    return {"search": search, "random": random}[kind](run, rows)


def write_requests(requests: Sequence[Request], path: Path, run_id: str) -> None:
    """The requests table of a stage."""
    frame = pl.DataFrame(to_rows(requests), schema=tables.REQUESTS.schema)
    tables.write(frame, tables.REQUESTS, path, run_id=run_id)


def read_requests(path: Path, run_id: str) -> list[Request]:
    """The requests of a stage, each checked against its id."""
    return from_rows(tables.read(path, tables.REQUESTS, run_id=run_id).to_dicts())
