"""Experiments by name: what people type after `randopt status`, `show`, `cost`, `submit` and `cancel`."""

from pathlib import Path

import yaml

from randopt import layout
from randopt.config import load_file, resolve
from randopt.errors import UserError
from randopt.experiment import Experiment, build

CONFIG = Path("config")
TASKS = CONFIG / "tasks"


def started(name: str) -> Experiment:
    """The experiment as Snakemake was last started with it, or as its config says when it never was.

    Raises UserError for an unknown name, or a configuration that cannot be used.
    """
    resolved = _resolved(name)
    return planned(str(resolved) if resolved.is_file() else name)


def planned(name: str) -> Experiment:
    """The experiment with this name, or in this config file, as Snakemake would start it now. Raises UserError."""
    return build(resolve(load_file(find_config(name))), Path())


def find_config(name: str) -> Path:
    """The config of an experiment: a file, the one in config/ that says `experiment: NAME`, or what an earlier start
    wrote to results/experiments/NAME.

    A config in config/ comes before the resolved one, which may be older than what its owner has edited since.
    Raises UserError that lists the names there are.
    """
    if Path(name).suffix in (".yaml", ".yml", ".json"):
        if not Path(name).is_file():
            raise UserError(f"there is no config file {name} (looked from {Path.cwd()}).")
        return Path(name)
    named = _configs()
    found = [path for path, said in named.items() if said == name]
    if len(found) > 1:
        raise UserError(f"{' and '.join(map(str, found))} both say `experiment: {name}`; give the file instead.")
    resolved = _resolved(name)
    if not found and not resolved.is_file():
        known = {*named.values(), *(path.parent.name for path in resolved.parent.parent.glob("*/config.yaml"))}
        raise UserError(
            f"there is no experiment {name!r} here ({Path.cwd()}); known: {', '.join(sorted(known)) or 'none'}. "
            "Give one of these, or a config file, as in config/mine.yaml."
        )
    return found[0] if found else resolved


def _resolved(name: str) -> Path:
    """Where a start leaves the configuration it resolved."""
    return layout.RESULTS / "experiments" / name / "config.yaml"


def _configs() -> dict[Path, str]:
    """Every config file below config/ with the name of its experiment; files that are none are passed over."""
    named = {}
    for path in sorted(CONFIG.rglob("*.y*ml")):
        if path.is_relative_to(TASKS):
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(content, dict) and isinstance(content.get("experiment"), str):
            named[path] = content["experiment"]
    return named
