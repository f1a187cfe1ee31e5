"""What sets a vision-language model apart. Imported whenever the Snakefile is parsed: standard library alone."""

import json
from pathlib import Path

# Tensors before the language model, in the checkpoints of the usual families: the vision tower and the projector that
# hands its output on. Models that call theirs otherwise need a models.exclude of their own.
TOWER = ("*connector*", "*projector*", "*vision*", "*visual*")


def is_vision_language(folder: Path) -> bool:
    """Whether config.json of a checkpoint describes a vision tower."""
    return bool(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("vision_config"))
