"""What a task is: read from config/tasks/*.yaml, checked, and reduced to its identity.

Imported whenever the Snakefile is parsed: nothing heavier than YAML may be imported here.
"""

import difflib
import hashlib
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from randopt.errors import UserError
from randopt.tasks import scorers, times_table

SPLITS = ("select", "confirm", "test")
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
REFERENCE_TRANSFORMS = ("after_hashes", "first_without_dollars")

# Generators: what their prompts may name, and their parameters with defaults.
GENERATORS: dict[str, tuple[frozenset[str], dict[str, Any]]] = {
    "times_table": (frozenset({"a", "b"}), {"seed": 1, "low": 2, "high": 12, "smaller_high": 10**6}),
    "countdown": (
        frozenset({"numbers", "target"}),
        {"seed": 1, "counts": [3, 4], "low": 1, "high": 99, "target_low": 10, "target_high": 100},
    ),
}
_KIND_KEYS = {  # keys of a source beside the one that names its kind
    "reasoning_gym": {"seed", "params"},
    "hub": {"config", "revision", "reference_transform"},
    "file": {"reference_transform"},
}
_KINDS = ("generator", *_KIND_KEYS)
_TASK_KEYS = {"label", "version", "source", "prompt", "reference", "splits", "max_tokens", "scorer"}
_OVERRIDES = {"name", "label", "source", "splits", "max_tokens", "scorer"}

_REASONING_GYM = {
    "version": 1,
    "prompt": [
        {
            "role": "system",
            "content": "You are a careful problem solver. Think step by step, then give the final answer, "
            "and nothing else, inside <answer></answer> tags.",
        },
        {"role": "user", "content": "{question}\n\nGive the final answer inside <answer></answer> tags."},
    ],
    "splits": {"select": 200, "confirm": 200, "test": 500},
    "max_tokens": 512,
    "scorer": "reasoning_gym",
}


@dataclass(frozen=True)
class TaskSpec:
    """A task, checked and with every default filled in."""

    name: str  # as the configuration names it
    label: str  # safe as a file name
    version: int  # raised by hand when the items change for a reason the other fields do not show
    source: dict[str, Any]  # one of generator, reasoning_gym, hub, file, with its parameters
    prompt: list[dict[str, str]]  # role and content; {column} stands for a column of the source
    reference: str | list[str] | None  # column(s) the answer is in; None where the source makes it
    splits: dict[str, dict[str, Any]]  # select, confirm, test: size, and part and start for tables
    max_tokens: int  # new tokens per completion
    scorer: str  # a name in scorers.SCORERS


def load_task(entry: str | Mapping[str, Any], folder: Path) -> TaskSpec:
    """The task that an entry of `tasks:` in the configuration means.

    entry: the name of a YAML file in `folder` (config/tasks), the path of one, "reasoning_gym:DATASET",
    or a mapping with `name` and overrides of label, source parameters, split sizes, max_tokens, scorer.
    Raises UserError naming the file or key, the value and the remedy.
    """
    folder = Path(folder)
    overrides = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(overrides, Mapping) or not isinstance(overrides.get("name"), str):
        raise UserError(f"tasks: {entry!r} was given, expected a task's name or a mapping with the key `name`.")
    name = overrides["name"]
    _refuse_unknown(overrides, _OVERRIDES, f"tasks: {name}")
    if name.startswith("reasoning_gym:"):
        where, base = f"task {name}", folder
        found = {
            **_REASONING_GYM,
            "source": {"reasoning_gym": name.partition(":")[2], "seed": 1, "params": {}},
        }
        label = name.replace(":", "-")
    else:
        path = _find(name, folder)
        where, base, label = str(path), path.parent, path.stem
        found = _read(path)
    _refuse_unknown(found, _TASK_KEYS, where)
    found = {"label": label, "reference": None, **found}
    for key in sorted(_TASK_KEYS - found.keys()):
        raise UserError(f"{where}: the key {key!r} is missing; add it (config/tasks/times_table.yaml explains it).")
    found = _overridden(found, overrides)
    source = _source(found["source"], where, (base, folder.parent.parent))
    tabular = "hub" in source or "file" in source
    spec = TaskSpec(
        name=name,
        label=_text(found["label"], f"{where}: label"),
        version=_integer(found["version"], f"{where}: version"),
        source=source,
        prompt=_prompt(found["prompt"], where, _fields(source)),
        reference=_reference(found["reference"], where, tabular),
        splits=_splits(found["splits"], where, tabular),
        max_tokens=_integer(found["max_tokens"], f"{where}: max_tokens"),
        scorer=_text(found["scorer"], f"{where}: scorer"),
    )
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", spec.label):
        raise UserError(f"{where}: label {spec.label!r} was given, expected letters, digits, _ . -: it names a folder.")
    if source.get("generator") == "times_table":
        times_table.problems(source, {split: part["size"] for split, part in spec.splits.items()})
    if spec.scorer not in scorers.SCORERS:
        raise UserError(f"{where}: scorer {spec.scorer!r} is unknown; choose one of {', '.join(scorers.SCORERS)}.")
    return spec


def identity(spec: TaskSpec) -> dict[str, Any]:
    """Everything that changes the items or their prompts, as JSON: what a run is named after.

    A local file counts by its SHA-256, wherever it lies; reasoning-gym by its version. Label, scorer
    and max_tokens are not in it: the first two change no completion, the last belongs to the decoding.
    """
    source = {key: value for key, value in spec.source.items() if key not in ("file", "path")}
    if "path" in spec.source:
        source["sha256"] = {part: _sha256(Path(path)) for part, path in spec.source["path"].items()}
    if "reasoning_gym" in source:
        source["package_version"] = _reasoning_gym_version()
    return {
        "version": spec.version,
        "source": source,
        "prompt": spec.prompt,
        "splits": spec.splits,
        "reference": spec.reference,
    }


def placeholders(template: str) -> set[str]:
    """The columns that a prompt template names: {column}, where {{ and }} are plain braces."""
    return set(re.findall(r"\{([A-Za-z_]\w*)\}", template.replace("{{", "").replace("}}", "")))


def _find(name: str, folder: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        for path in (Path(name), folder.parent.parent / name, folder / name):
            if path.is_file():
                return path
        raise UserError(f"tasks: the file {name} does not exist; give its path from the project's root.")
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name in known:
        return folder / f"{name}.yaml"
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise UserError(
        f"tasks: {name!r} is unknown; {hint}known names: {', '.join(known) or 'none'}, "
        f"reasoning_gym:DATASET, or the path of a .yaml file like those in {folder}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the task {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected a mapping of a task's keys.")
    return found


def _refuse_unknown(found: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known))}."
            raise UserError(f"{where}: unknown key {key!r} (value {found[key]!r}); {hint}")


def _overridden(found: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The YAML's values with the entry's on top: sources and splits key by key, the rest as a whole."""
    merged = {
        **found,
        **{key: overrides[key] for key in overrides if key not in ("name", "source", "splits")},
    }
    for key in ("source", "splits"):
        if key not in overrides:
            continue
        over = overrides[key]
        if not isinstance(over, Mapping) or not isinstance(found[key], Mapping):
            raise UserError(f"tasks: {overrides['name']}: {key}: {over!r} was given, expected a mapping.")
        merged[key] = {**found[key], **over}
    if "source" in overrides and "file" in overrides["source"]:  # a local copy in place of the Hub's
        merged["source"] = {k: v for k, v in merged["source"].items() if k not in ("hub", "config", "revision")}
    if "splits" in overrides:
        for split, given in overrides["splits"].items():
            before = found["splits"].get(split)
            if isinstance(before, Mapping):
                merged["splits"][split] = {
                    **before,
                    **(given if isinstance(given, Mapping) else {"size": given}),
                }
    return merged


def _source(given: Any, where: str, folders: tuple[Path, ...]) -> dict[str, Any]:
    kinds = [kind for kind in _KINDS if kind in given] if isinstance(given, Mapping) else []
    if len(kinds) != 1:
        raise UserError(f"{where}: source: {given!r} was given, expected a mapping with one of {', '.join(_KINDS)}.")
    kind = kinds[0]
    if kind == "file":
        _refuse_unknown(given, {kind} | _KIND_KEYS[kind], f"{where}: source")
        source = {**given, "path": _paths(given["file"], where, folders)}
    else:
        _text(given[kind], f"{where}: source.{kind}")
        source = _generator(given, where) if kind == "generator" else dict(given)
        known = GENERATORS[given[kind]][1].keys() if kind == "generator" else _KIND_KEYS[kind]
        _refuse_unknown(source, {kind, *known}, f"{where}: source")
    if kind == "hub":
        source = {"config": None, "revision": None, **source}
        if not isinstance(source["revision"], str):
            raise UserError(
                f"{where}: source.revision: {source['revision']!r} was given, expected the commit of "
                f"{source['hub']} to use: without it the items change when the data set does."
            )
        if source["config"] is not None:
            _text(source["config"], f"{where}: source.config")
    if kind == "reasoning_gym":
        source = {"seed": 1, "params": {}, **source}
        params = source["params"]
        if not isinstance(params, Mapping) or {"seed", "size"} & params.keys():
            raise UserError(
                f"{where}: source.params: {params!r} was given, expected a mapping of the data set's "
                "parameters; seed is source.seed, the sizes are in splits."
            )
    if "seed" in source:
        _integer(source["seed"], f"{where}: source.seed", at_least=0)
    transform = source.get("reference_transform")
    if transform is not None and transform not in REFERENCE_TRANSFORMS:
        raise UserError(
            f"{where}: source.reference_transform: {transform!r} was given, "
            f"expected one of {', '.join(REFERENCE_TRANSFORMS)}, or leave it out."
        )
    return source


def _generator(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    if given["generator"] not in GENERATORS:
        raise UserError(
            f"{where}: source.generator: {given['generator']!r} is unknown; choose one of {', '.join(GENERATORS)}."
        )
    source = {**GENERATORS[given["generator"]][1], **given}
    for low, high in (("low", "high"), ("low", "smaller_high"), ("target_low", "target_high")):
        if low in source and high in source:
            _integer(source[low], f"{where}: source.{low}", at_least=0)
            _integer(source[high], f"{where}: source.{high}", at_least=source[low])
    if "counts" in source:
        counts = source["counts"]
        if not isinstance(counts, list) or not counts:
            raise UserError(f"{where}: source.counts: {counts!r} was given, expected a list such as [3, 4].")
        for count in counts:
            _integer(count, f"{where}: source.counts", at_least=2, at_most=6)
    return source


def _paths(given: Any, where: str, folders: tuple[Path, ...]) -> dict[str, str]:
    """Part -> absolute path of its file. One file alone is the part "train"."""
    files = given if isinstance(given, Mapping) else {"train": given}
    paths = {}
    for part, name in files.items():
        _text(name, f"{where}: source.file")
        tried = [(folder / name).resolve() for folder in folders]
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            listing = " and ".join(dict.fromkeys(map(str, tried)))
            raise UserError(f"{where}: source.file: {name} does not exist (looked for {listing}); mend the path.")
        if path.suffix not in FILE_TYPES:
            raise UserError(f"{where}: source.file: {name} was given, expected one of {', '.join(FILE_TYPES)}.")
        paths[str(part)] = str(path)
    return paths


def _fields(source: Mapping[str, Any]) -> frozenset[str] | None:
    """What a prompt may name; None when only the table itself knows."""
    if "generator" in source:
        return GENERATORS[source["generator"]][0]
    return frozenset({"question"}) if "reasoning_gym" in source else None


def _prompt(given: Any, where: str, fields: frozenset[str] | None) -> list[dict[str, str]]:
    roles = ("system", "user", "assistant")
    if not isinstance(given, list) or not given:
        raise UserError(f"{where}: prompt: {given!r} was given, expected a list of messages (role, content).")
    for message in given:
        if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
            raise UserError(f"{where}: prompt: {message!r} was given, expected the keys role and content.")
        if message["role"] not in roles:
            raise UserError(f"{where}: prompt: role {message['role']!r} was given, expected {', '.join(roles)}.")
        _text(message["content"], f"{where}: prompt content")
    named = set().union(*(placeholders(message["content"]) for message in given))
    if not named:
        raise UserError(f"{where}: prompt: no {{column}} is named, so every item would ask the same.")
    if fields is not None and named - fields:
        raise UserError(
            f"{where}: prompt: {sorted(named - fields)} are named in braces, expected {sorted(fields)}; "
            "plain braces are written {{ and }}."
        )
    return [dict(message) for message in given]


def _reference(given: Any, where: str, tabular: bool) -> str | list[str] | None:
    if not tabular:
        if given is not None:
            raise UserError(f"{where}: reference: {given!r} was given, but this source makes it; leave it out.")
        return None
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            f"{where}: reference: {given!r} was given, expected the name of the column with the right answer "
            "(or a list of names); add `reference: answer`, say."
        )
    return given


def _splits(given: Any, where: str, tabular: bool) -> dict[str, dict[str, Any]]:
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: splits: {given!r} was given, expected a mapping of {', '.join(SPLITS)}.")
    _refuse_unknown(given, set(SPLITS), f"{where}: splits")
    splits = {}
    for split in SPLITS:
        here = f"{where}: splits.{split}"
        if split not in given:
            raise UserError(f"{here} is missing; add `{split}: {{size: 200}}`, say.")
        value = given[split] if isinstance(given[split], Mapping) else {"size": given[split]}
        _refuse_unknown(value, {"size", "part", "start"} if tabular else {"size"}, here)
        value = {"part": "train", "start": 0, **value} if tabular else dict(value)
        _integer(value.get("size"), f"{here}.size")
        if tabular:
            _integer(value["start"], f"{here}.start", at_least=0)
            _text(value["part"], f"{here}.part")
        splits[split] = value
    return splits


def _integer(value: Any, where: str, at_least: int = 1, at_most: int | None = None) -> int:
    if type(value) is not int or value < at_least or (at_most is not None and value > at_most):
        bound = f"{at_least} or more" if at_most is None else f"from {at_least} to {at_most}"
        raise UserError(f"{where}: {value!r} was given, expected a whole number, {bound}.")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: {value!r} was given, expected text.")
    return value


def _reasoning_gym_version() -> str:
    try:
        return importlib.metadata.version("reasoning-gym")
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError("reasoning-gym is not installed; pip install reasoning-gym.") from error


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; mend source.file.") from error
