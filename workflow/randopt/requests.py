"""The unit of work: a perturbation of the base plus a decoding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from randopt.canonical import short_hash
from randopt.errors import UserError

Term = tuple[int, float]  # (seed, coefficient)
Perturbation = tuple[Term, ...]  # weights = base + Σ coefficient·ε(seed); () is the base


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen: greedy at temperature 0, else sampled from `sample_seed`."""

    temperature: float = 0.0
    sample_seed: int = 0


@dataclass(frozen=True)
class Request:
    """One row of the requests table. Its id is a hash of its content, the same in every run."""

    perturbation: Perturbation = ()
    decoding: Decoding = Decoding()
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        for seed, coefficient in self.perturbation:
            if not 0 <= seed < 2**64:
                raise UserError(f"seed {seed} is outside 0 .. 2**64 - 1")
            if not math.isfinite(coefficient):
                raise UserError(f"coefficient {coefficient} of seed {seed} is not finite")
        if not (math.isfinite(self.decoding.temperature) and self.decoding.temperature >= 0):
            raise UserError(f"temperature {self.decoding.temperature} must be finite and at least 0")
        content = {
            "perturbation": [[seed, float(coefficient)] for seed, coefficient in self.perturbation],
            "temperature": float(self.decoding.temperature),
            "sample_seed": self.decoding.sample_seed,
        }
        object.__setattr__(self, "request_id", short_hash(content, 16))


def candidate(seed: int, sigma: float) -> Request:
    """The greedy request of one candidate (seed, σ)."""
    return Request(((seed, sigma),))


def to_rows(requests: Sequence[Request]) -> list[dict]:
    """Rows of the requests table, in order."""
    return [
        {
            "request_id": request.request_id,
            "perturbation": [{"seed": s, "coefficient": c} for s, c in request.perturbation],
            "temperature": request.decoding.temperature,
            "sample_seed": request.decoding.sample_seed,
        }
        for request in requests
    ]


def from_rows(rows: Sequence[dict]) -> list[Request]:
    """The requests of the table's rows; refuses a row whose id is not the hash of its content."""
    requests = []
    for row in rows:
        request = Request(
            tuple((term["seed"], term["coefficient"]) for term in row["perturbation"]),
            Decoding(row["temperature"], row["sample_seed"]),
        )
        if request.request_id != row["request_id"]:
            raise UserError(
                f"request {row['request_id']} was altered: its content hashes to {request.request_id}. "
                "Remove the requests table and run again."
            )
        requests.append(request)
    return requests
