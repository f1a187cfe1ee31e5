"""How fast a run's jobs are, as far as it is known before they run: from a probe, else assumed.

Pure Python, since the Snakefile asks for it whenever it is parsed; randopt.cost knows more once shards have finished.
The assumptions are cautious guesses, not measurements: no GPU was at hand.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from randopt.errors import UserError
from randopt.files import write_text_atomic

UNKNOWN_BILLIONS = 8.0  # where nothing tells a model's size
TOKENS_PER_SECOND_AT_1B = 2000.0  # assumed decoding rate of a 1 B model, inversely proportional to size
SECONDS_LOADING = 60.0  # assumed time to load a model
SECONDS_STARTING = 20.0  # Snakemake and Python in each job before our own clock starts: 10 to 20 s on two busy cores


@dataclass(frozen=True)
class Speed:
    """What a generate job takes: `seconds_loading` once, `seconds_per_completion` for each request × item."""

    seconds_loading: float
    seconds_per_completion: float
    source: str  # where this comes from, in words
    measured: bool = True

    def seconds(self, completions: int) -> float:
        """Wall seconds of one job that makes so many completions."""
        return SECONDS_STARTING + self.seconds_loading + completions * self.seconds_per_completion


def expected(description: Mapping[str, Any], run_folder: Path) -> Speed:
    """The probe's speed if there is one, else the assumed one. `description` is the content of run.yaml."""
    return _read(probe_file(run_folder)) or assumed(description)


def assumed(description: Mapping[str, Any]) -> Speed:
    """Every completion at its token limit, at a guessed rate for the model's size."""
    size = billions(description)
    rate = TOKENS_PER_SECOND_AT_1B / max(size, 0.1)
    limit = description["decoding"]["max_tokens"]
    words = f"a guess for {size:.3g} billion parameters, {rate:,.0f} tokens/s and {limit} tokens each; probe it"
    return Speed(SECONDS_LOADING, limit / rate, words, measured=False)


def billions(description: Mapping[str, Any]) -> float:
    """Parameters in 10⁹: from the files of a local model, else from a size in its name, else a guess."""
    model = description["model"]
    kind, _, location = model["source"].partition(":")
    if kind == "path":
        size = sum(path.stat().st_size for path in Path(location).glob("*.safetensors"))
        if size:
            return size / 2 / 1e9
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([bm])(?![a-z])", f"{location} {model['name']}".lower())
    if found:
        number, unit = found[0]
        return float(number) / (1 if unit == "b" else 1000)
    return 0.2 if kind == "package" else UNKNOWN_BILLIONS


def shard_size(speed: Speed, minutes: float, items: int, candidates: int) -> int:
    """Candidates per shard so that a job takes about `minutes`; at least 1, at most all of them.

    `items`: completions of each candidate. Raises UserError when a job would be over before its first candidate.
    """
    left = minutes * 60 - speed.seconds(0)
    if left <= 0:
        raise UserError(
            f"search.shard_minutes: {minutes:g} was given, but a job needs {speed.seconds(0) / 60:.1f} minutes before "
            f"its first candidate ({speed.source}); give several times that, or search.shard_size."
        )
    return max(1, min(candidates, int(left / (items * speed.seconds_per_completion))))


def probe_file(run_folder: Path) -> Path:
    """What the probe of a run measured."""
    return Path(run_folder) / "probe.json"


def write_probe(run_folder: Path, speed: Speed) -> None:
    """Keep what a probe measured."""
    write_text_atomic(probe_file(run_folder), json.dumps(asdict(speed), indent=1) + "\n")


def _read(path: Path) -> Speed | None:
    try:
        found = Speed(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return found if found.seconds_per_completion > 0 else None
