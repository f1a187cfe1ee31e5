"""From a resolved configuration to runs: their identity, folders and shards.

Imported whenever the Snakefile is parsed: pure Python, no table and no weight is touched.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from randopt import layout, speed
from randopt.canonical import short_hash
from randopt.errors import UserError
from randopt.files import write_text_atomic
from randopt.models import source as model_source
from randopt.models.vision import TOWER
from randopt.noise import NOISE_VERSION
from randopt.tasks import scorers
from randopt.tasks import spec as task_spec

RACE_RULE = 1  # raise it when randopt.race stops other candidates than before


@dataclass(frozen=True)
class Run:
    """One model × one task × everything that changes completions, and what is asked of it here."""

    description: Mapping[str, Any]  # content of run.yaml
    task: task_spec.TaskSpec
    model_id: str
    task_id: str
    candidates: int
    prefixes: tuple[int, ...]  # every N that is reported, ascending, `candidates` last
    members: int
    controls: str  # stage of the controls
    speed: speed.Speed  # as far as it is known before anything runs

    @property
    def run_id(self) -> str:
        """Ten hex digits of the identity."""
        return self.description["run_id"]

    @property
    def name(self) -> str:
        """MODEL/TASK/RUN_ID, the run's folder below results/; with a race RUN_ID-lossless-1a2b3c."""
        return f"{self.description['model']['name']}/{self.task.label}/{layout.run_folder_name(self.description)}"

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return layout.RESULTS / self.name

    @cached_property
    def scorer(self) -> scorers.Scorer:
        """The task's scorer."""
        return scorers.get(self.task.scorer)

    @property
    def scores(self) -> str:
        """Folder of the task's scorer, name and version, in each stage."""
        return layout.scores(self.scorer.name, self.scorer.version)

    @property
    def verdicts(self) -> list[str]:
        """Folders of all scores that each stage has: the task's scorer's, and those of its twin if there is one."""
        return [layout.scores(scorer.name, scorer.version) for scorer in scorers.judges(self.task.scorer)]

    def rows(self, stage: str) -> int:
        """Requests of a stage. Controls: the base, its σ = 0 double, and K max samples."""
        if stage == layout.PROBE:
            return min(layout.PROBE_CANDIDATES, self.candidates)
        return {
            "search": self.candidates,
            "controls": 2 + self.members,
            "random": self.members,
            "members": self.members,
        }[layout.stage_kind(stage)]

    def shards(self, stage: str, rows: int | None = None) -> list[layout.Shard]:
        """The shards of a stage, or those that hold its first `rows` requests."""
        found = layout.stage_shards(self.description, stage, self.rows(stage))
        return [shard for shard in found if rows is None or shard[0] < rows]

    def stages(self) -> list[str]:
        """Every stage that needs the accelerator, in the order data flows."""
        members = [f"{layout.prefix_name(n)}/members" for n in self.prefixes]
        return [self.controls, "search", "random", *members]

    def stages_before(self, stage: str) -> list[str]:
        """Stages whose completions a members stage may take over, done before it starts."""
        if layout.stage_kind(stage) != "members":
            return []
        smaller = [f"{layout.prefix_name(n)}/members" for n in self.prefixes]
        return ["random", *smaller[: smaller.index(stage)]]


@dataclass(frozen=True)
class Experiment:
    """A resolved configuration and its runs."""

    config: Mapping[str, Any]
    runs: tuple[Run, ...]
    models: Mapping[str, Mapping[str, Any]]  # model_id -> {source, dtype}
    tasks: Mapping[str, task_spec.TaskSpec]  # task_id -> task

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return layout.RESULTS / "experiments" / self.config["experiment"]

    @property
    def stop_file(self) -> Path:
        """What `randopt cancel` leaves for a driver on another host."""
        return self.folder / ".stop"


def build(config: Mapping[str, Any], root: Path) -> Experiment:
    """The experiment of a resolved configuration; paths in it are taken from `root`.

    Raises UserError for an unknown task, scorer or model, or a shard size that contradicts an
    existing run's.
    """
    runs, models, tasks = [], {}, {}
    for model in config["models"]:
        source = model_source.parse(model["source"], root)
        model_identity = {**source.identity(), "dtype": model["dtype"]}
        model_id = f"{model['name']}-{short_hash(model_identity)}"
        models[model_id] = {"source": model["source"], "dtype": model["dtype"]}
        for entry in config["tasks"]:
            task = task_spec.load_task(entry, root / "config" / "tasks")
            task_identity = task_spec.identity(task)
            task_id = f"{task.label}-{short_hash(task_identity)}"
            tasks[task_id] = task
            runs.append(_run(config, model, model_identity, model_id, task, task_identity, task_id))
    return Experiment(config, tuple(runs), models, tasks)


def describe(experiment: Experiment) -> None:
    """Write the resolved config and each run's run.yaml, where they differ from what is there."""
    _write_yaml(experiment.folder / "config.yaml", dict(experiment.config))
    for task_id, task in experiment.tasks.items():
        _write_yaml(layout.RESULTS / "tasks" / task_id / "task.yaml", asdict(task))
    for run in experiment.runs:
        _write_yaml(run.folder / "run.yaml", dict(run.description))


def load_run(folder: Path) -> dict[str, Any]:
    """The run.yaml of a run's folder."""
    path = Path(folder) / "run.yaml"
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Remove it and start snakemake again, which writes it."
        ) from error


def _run(
    config: Mapping[str, Any],
    model: Mapping[str, Any],
    model_identity: Mapping[str, Any],
    model_id: str,
    task: task_spec.TaskSpec,
    task_identity: Mapping[str, Any],
    task_id: str,
) -> Run:
    search = config["search"]
    identity = {
        "model": {
            **model_identity,
            "chat_template": model["chat_template"],
            "exclude": _exclude(model["exclude"], task),
        },
        "task": task_identity,
        "decoding": {"max_tokens": task.max_tokens},
        "engine": config["engine"]["name"],
        "noise": {"law": search["law"], "version": NOISE_VERSION},
        # the plan's seeds give a row number its meaning, and files are named by row numbers
        "plan": {"first_seed": search["first_seed"], "sigmas": [float(sigma) for sigma in search["sigmas"]]},
    }
    description = {
        **identity,
        "model": {"name": model["name"], **identity["model"]},
        "task": {"label": task.label, **identity["task"]},
        "run_id": short_hash(identity),
        "model_id": model_id,
        "task_id": task_id,
    }
    if race := _race(config, task):
        description["race"] = race
    folder = layout.RESULTS / model["name"] / task.label / layout.run_folder_name(description)
    expected = speed.expected(description, folder)
    description["shard_size"] = _shard_size(search, expected, task.splits["select"]["size"], folder)
    prefixes = sorted({*search["prefixes"], search["candidates"]})
    return Run(
        description=description,
        task=task,
        model_id=model_id,
        task_id=task_id,
        candidates=search["candidates"],
        prefixes=tuple(prefixes),
        members=config["ensemble"]["members"],
        controls=layout.controls_stage(config["controls"]["self_consistency_temperature"]),
        speed=expected,
    )


def _exclude(given: list[str] | None, task: task_spec.TaskSpec) -> list[str]:
    """Patterns of what is not perturbed: as given, else the vision tower where the task shows pictures.

    It follows from the task, since nothing of a model on the Hub is here yet; without pictures a tower has no effect.
    """
    if given is None:
        return sorted(TOWER) if task_spec.image_columns(task.prompt) else []
    return sorted(given)


def _race(config: Mapping[str, Any], task: task_spec.TaskSpec) -> dict[str, Any] | None:
    """All that decides which completions a race leaves out; None when it is off.

    Raises UserError for a scorer that cannot judge as fast as completions arrive.
    """
    race = config["search"]["race"]
    if race["mode"] == "off":
        return None
    scorer = scorers.get(task.scorer)
    if scorer.sandboxed:
        raise UserError(
            f"search.race.mode: {race['mode']} was given, but the scorer {scorer.name} of {task.label} judges in "
            "processes of its own, too slow to follow a race. Set it to off, or choose another scorer."
        )
    found = {name: race[name] for name in ("mode", "pilot", "keep")}
    if race["mode"] == "confident":
        found["delta"] = race["delta"]
    return {**found, "rule": RACE_RULE, "scorer": task.scorer, "scorer_version": scorer.version}


def _shard_size(search: Mapping[str, Any], expected: speed.Speed, items: int, folder: Path) -> int:
    """As given, or so that a shard takes `shard_minutes`; fixed once the search is planned, as it names the files."""
    path = folder / "run.yaml"
    planned = (folder / "search").exists() and path.is_file()
    fixed = load_run(folder)["shard_size"] if planned else None
    if "shard_minutes" in search:
        return fixed or speed.shard_size(expected, search["shard_minutes"], items, search["candidates"])
    wanted = search["shard_size"]
    if fixed not in (None, wanted):
        raise UserError(
            f"search.shard_size: {wanted} was given, but {path} fixed it at {fixed} when the run's first shard "
            f"was planned, since files are named by their rows. Set it back to {fixed}, or remove "
            f"{folder} to begin again."
        )
    return wanted


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    text = yaml.safe_dump(content, sort_keys=True, allow_unicode=True, width=110)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text_atomic(path, text)
