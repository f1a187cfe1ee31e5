"""randopt verify: an expert is its (seed, σ) alone, and this shows that its weights come out of them again.

Weights are rebuilt from the manifest's checkpoint by randopt.noise on the CPU, tensor by tensor and without an engine,
and their digests compared with those that engines took, which the ledgers keep.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import polars as pl
import torch
from rich import box
from rich.table import Table
from tqdm import tqdm

from randopt import layout, noise, plan, tables
from randopt.engines.base_weights import base_tensors, perturbed_names
from randopt.errors import UserError
from randopt.experiment import Experiment, Run
from randopt.models import checkpoint
from randopt.models.prepare import Manifest, load_manifest
from randopt.requests import Perturbation, Request


@dataclass
class Check:
    """The weights of one perturbation; the empty one is the base, whose digest the manifest records."""

    run: Run
    perturbation: Perturbation
    recorded: dict[str, str] = field(default_factory=dict)  # where it was recorded -> digest
    rebuilt: str = ""

    @property
    def equal(self) -> bool | None:
        """Whether every record is what was rebuilt; None where nothing was recorded."""
        return all(digest == self.rebuilt for digest in self.recorded.values()) if self.recorded else None


def verify(experiment: Experiment, rank: int | None = None, seed: int | None = None) -> list[Check]:
    """Every recorded digest of an experiment and its bases, or those of one expert of each run, rebuilt.

    The expert is that of `rank` among all candidates of the run, or the one with `seed`. Raises UserError when there
    is no such expert, the model's files are not those of the manifest, or a ledger cannot be read.
    """
    found: list[Check] = []
    for run in experiment.runs:
        checks = recorded(run)
        if rank is not None or seed is not None:
            wanted = _of_rank(run, rank) if rank is not None else _of_seed(run, seed)
            checks = [check for check in checks if check.perturbation == wanted] or [Check(run, wanted)]
        manifest = load_manifest(layout.manifest_file(run.model_id))
        base = Check(run, (), {"manifest": manifest.content["weights_digest"]})
        found += _rebuilt(manifest, [base, *checks])
    return found


def recorded(run: Run) -> list[Check]:
    """What the ledgers of a run's finished shards hold, one check for each perturbation."""
    checks: dict[Perturbation, Check] = {}
    for stage in [*run.stages(), layout.PROBE]:
        ledgers = [(s, layout.shard_file(run.folder, stage, "ledger", s)) for s in run.shards(stage)]
        ledgers = [(shard, path) for shard, path in ledgers if path.exists()]
        requests = _requests(run, stage) if ledgers else {}
        for shard, path in ledgers:
            for entry in tables.read(path, tables.LEDGER, run_id=run.run_id)["digests"].item():
                request = requests.get(entry["request_id"])
                if request is None:
                    raise UserError(
                        f"{path} records request {entry['request_id']}, which {stage} does not have; was one of them "
                        "copied or changed by hand?"
                    )
                check = checks.setdefault(request.perturbation, Check(run, request.perturbation))
                check.recorded[f"{stage} {layout.shard_name(shard)}"] = entry["digest"]
    return list(checks.values())


def _rebuilt(manifest: Manifest, checks: Sequence[Check]) -> Sequence[Check]:
    """The checks of one run with their rebuilt digests; one perturbed tensor is in memory at a time."""
    run = checks[0].run.description
    base = base_tensors(manifest.folder, manifest.tensors, getattr(torch, run["model"]["dtype"]))
    perturbed = set(perturbed_names(manifest.tensors, run["model"]["exclude"]))

    def digests(perturbation: Perturbation, bar: tqdm) -> Iterator[tuple[str, bytes]]:
        for name in sorted(base):
            tensor = base[name]
            if name in perturbed:
                tensor = noise.perturb(tensor, name, perturbation, law=run["noise"]["law"])
            yield name, checkpoint.tensor_digest(tensor)
            bar.update(tensor.nbytes)

    size = sum(tensor.nbytes for tensor in base.values())
    with tqdm(total=size * len(checks), desc="rebuilding weights", unit="B", unit_scale=True) as bar:
        for check in checks:
            check.rebuilt = checkpoint.combined_digest(digests(check.perturbation, bar))
    return checks


def _requests(run: Run, stage: str) -> dict[str, Request]:
    requests = plan.read_requests(layout.requests_file(run.folder, stage), run.run_id)
    return {request.request_id: request for request in requests}


def _of_rank(run: Run, rank: int) -> Perturbation:
    path = run.folder / layout.prefix_name(run.candidates) / "selection.parquet"
    selection = tables.read(path, tables.SELECTION, run_id=run.run_id).filter(pl.col("rank") == rank)
    if selection.is_empty():
        raise UserError(f"{path} has no rank {rank}.")
    row = selection.row(0, named=True)
    return ((row["seed"], row["sigma"]),)


def _of_seed(run: Run, seed: int | None) -> Perturbation:
    for request in plan.search(run.description, run.candidates):
        if request.perturbation[0][0] == seed:
            return request.perturbation
    first = run.description["plan"]["first_seed"]
    raise UserError(f"run {run.name} has no seed {seed}; its seeds are {first} to {first + run.candidates - 1}.")


def render(checks: Sequence[Check]) -> Table:
    """A line for each perturbation."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("run", "seed", "σ", "recorded", "rebuilt", "", "recorded in"):
        table.add_column(column, overflow="fold")
    for check in checks:
        words = {True: "equal", False: "[bold red]DIFFERENT[/]", None: "nothing was recorded"}[check.equal]
        table.add_row(
            check.run.name,
            ", ".join(str(seed) for seed, _ in check.perturbation) or "base",
            ", ".join(f"{coefficient:g}" for _, coefficient in check.perturbation),
            "\n".join(dict.fromkeys(check.recorded.values())),
            check.rebuilt,
            words,
            ", ".join(check.recorded),
        )
    return table
