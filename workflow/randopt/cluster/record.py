"""What is remembered of an experiment's last driver job."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from randopt.files import write_text_atomic

NAME = "driver.json"  # in the experiment's folder


@dataclass(frozen=True)
class Record:
    """A driver job: its SLURM id, its log, the command it runs, Unix time of the submission."""

    job: str
    log: str
    command: list[str]
    submitted: float


def write(folder: Path, record: Record) -> None:
    """Remember a driver job."""
    write_text_atomic(folder / NAME, json.dumps(asdict(record), indent=1) + "\n")


def read(folder: Path) -> Record | None:
    """The last driver job, or None."""
    try:
        return Record(**json.loads((folder / NAME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
