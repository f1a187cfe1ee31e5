"""What a task is: read from config/tasks/*.yaml, checked, and reduced to its identity.

Imported whenever the Snakefile is parsed: nothing heavier than YAML may be imported here.
"""

import difflib
import hashlib
import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from randopt import images, schema
from randopt.canonical import canonical_json
from randopt.errors import Mistake, Mistakes, UserError
from randopt.tasks import scorers, times_table

SPLITS = ("select", "confirm", "test")
FILE_TYPES = (".jsonl", ".json", ".csv", ".parquet")
REFERENCE_TRANSFORMS = ("after_hashes", "first_without_dollars")
FORMATS = ("lines", "letters", "numbers")  # how a prompt may show a column that holds a list: {column:lines}

_KINDS = ("generator", "reasoning_gym", "hub", "file")
_GENERATORS = {"times_table": {"a", "b"}, "countdown": {"numbers", "target"}}  # and what their prompts may name
_FIELDS = {**_GENERATORS, "reasoning_gym": {"question"}}

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
    prompt: list[dict[str, Any]]  # role and content, a text or a list of texts and images; {column}: of the source
    reference: str | list[str] | None  # column(s) the answer is in; None where the source makes it
    splits: dict[str, dict[str, Any]]  # select, confirm, test: size, and part and start for tables
    max_tokens: int  # new tokens per completion
    scorer: str  # what scorers.get understands: a name, JSON with options, or PATH.py:function


@dataclass(frozen=True)
class Draft:
    """A task as it was found, before it is checked."""

    name: str
    where: str  # the file, or what stands for it in messages
    folders: tuple[Path, ...]  # where relative paths start
    keys: dict[str, Any]  # with the entry's overrides on top
    overrides: Mapping[str, Any]
    text: str  # of the file


def load_task(entry: str | Mapping[str, Any], folder: Path) -> TaskSpec:
    """The task that an entry of `tasks:` in the configuration means.

    entry: the name of a YAML file in `folder` (config/tasks), the path of one, "reasoning_gym:DATASET",
    or a mapping with `name` and overrides of label, source parameters, split sizes, max_tokens, scorer.
    Raises UserError naming the file, and every wrong key with its line, its value and the remedy.
    """
    return check(read(entry, folder))


def read(entry: str | Mapping[str, Any], folder: Path) -> Draft:
    """Find and read the task, and put the entry's overrides on top; UserError when there is no such mapping."""
    folder = Path(folder)
    overrides = {"name": entry} if isinstance(entry, str) else entry
    if not isinstance(overrides, Mapping) or not isinstance(overrides.get("name"), str):
        raise UserError(f"tasks: {entry!r} was given, expected a task's name or a mapping with the key `name`.")
    name = overrides["name"]
    if found := schema.mistakes(dict(overrides), schema.load("task")["$defs"]["entry"], "the entry"):
        raise Mistakes(f"tasks: {name}", found)
    if name.startswith("reasoning_gym:"):
        where, base, text = f"task {name}", folder, ""
        keys = {**_REASONING_GYM, "source": {"reasoning_gym": name.partition(":")[2], "seed": 1, "params": {}}}
        label = name.replace(":", "-")
    else:
        path = _find(name, folder)
        where, base, label = str(path), path.parent, path.stem
        keys, text = _read(path)
    keys = _overridden({"label": label, **keys}, overrides)
    return Draft(name, where, (base, folder.parent.parent), keys, overrides, text)


def check(draft: Draft) -> TaskSpec:
    """The task, every default filled in; Mistakes lists all that is wrong, with lines of the file."""
    keys = {**draft.keys}
    if isinstance(keys.get("splits"), Mapping):
        keys["splits"] = {
            split: dict(given) if isinstance(given, Mapping) else {"size": given}
            for split, given in keys["splits"].items()
        }
    if isinstance(keys.get("source"), Mapping):
        keys["source"] = dict(keys["source"])
    rules = schema.load("task")
    found = list(_put_kind(rules, keys))
    schema.fill_defaults(keys, rules)
    found += schema.mistakes(keys, rules, draft.where)
    wrong = {mistake.path[0] for mistake in found if mistake.path}
    sound = {key: value for key, value in keys.items() if key not in wrong}
    scorer = ""
    if "source" in sound:
        found += _source_mistakes(sound["source"], draft.folders)
        found += _spanning_mistakes(sound)
    if "scorer" in sound:
        try:
            scorer = scorer_text(sound["scorer"], draft.folders)
            scorers.get(scorer)
        except UserError as error:
            found.append(Mistake(str(error), ("scorer",)))
    if found:
        raise Mistakes(draft.where, with_lines(found, draft))
    source = keys["source"]
    if "file" in source:
        source["path"] = {part: str(path) for part, path in _paths(source["file"], draft.folders)}
    return TaskSpec(
        name=draft.name,
        label=keys["label"],
        version=keys["version"],
        source=source,
        prompt=[dict(message) for message in keys["prompt"]],
        reference=keys["reference"],
        splits={split: keys["splits"][split] for split in SPLITS},
        max_tokens=keys["max_tokens"],
        scorer=scorer,
    )


def with_lines(mistakes: list[Mistake], draft: Draft) -> list[Mistake]:
    """The mistakes with the lines of the task's file; what the configuration overrides has none there."""

    def line(path: tuple[str | int, ...]) -> int | None:
        given: Any = draft.overrides
        for key in path:
            given = given.get(key) if isinstance(given, Mapping) else None
        return schema.line_of(draft.text, path) if given is None else None

    return [Mistake(mistake.text, mistake.path, line(mistake.path)) for mistake in mistakes]


def scorer_text(given: str | Mapping[str, Any], folders: tuple[Path, ...]) -> str:
    """A task's `scorer` as `scorers.get` takes it; the path of file.py:function starts at one of `folders`."""
    if not isinstance(given, str):
        try:
            return canonical_json(given)
        except (TypeError, ValueError) as error:
            raise UserError(f"scorer: {given!r} was given, expected text, numbers and lists ({error}).") from error
    if not scorers.own.is_own(given):
        return given
    name, _, function = given.rpartition(":")
    tried = [(folder / name).resolve() for folder in folders]
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise UserError(f"scorer: the file of {given} does not exist (looked for {_listing(tried)}); mend the path.")
    return f"{path}:{function}"


def identity(spec: TaskSpec) -> dict[str, Any]:
    """Everything that changes the items or their prompts, as JSON: what a run is named after.

    A local file counts by its SHA-256, wherever it lies; reasoning-gym by its version. Label, scorer
    and max_tokens are not in it: the first two change no completion, the last belongs to the decoding.
    """
    source = {key: value for key, value in spec.source.items() if key not in ("file", "path")}
    if "path" in spec.source:
        source["sha256"] = {part: _sha256(Path(path)) for part, path in spec.source["path"].items()}
        if columns := image_columns(spec.prompt):
            rows: dict[str, list[range]] = {}
            for split in spec.splits.values():
                rows.setdefault(split["part"], []).append(range(split["start"], split["start"] + split["size"]))
            source["images_sha256"] = images.files_digest(spec.source["path"], columns, rows)
    if "reasoning_gym" in source:
        source["package_version"] = _reasoning_gym_version()
    return {
        "version": spec.version,
        "source": source,
        "prompt": spec.prompt,
        "splits": spec.splits,
        "reference": spec.reference,
    }


def part_names(part: str) -> list[str]:
    """The tables that a split's `part` means: one, or several joined by +."""
    return part.split("+")


def parts(message: Mapping[str, Any]) -> list[dict[str, str]]:
    """The content of a prompt's message as a list of {type: text, text} and {type: image, column}."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def image_columns(prompt: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that a prompt's images come from, in order."""
    return [part["column"] for message in prompt for part in parts(message) if part["type"] == "image"]


def text_columns(prompt: Sequence[Mapping[str, Any]]) -> set[str]:
    """The columns that a prompt's texts name, as {column} or {column:lines}."""
    texts = [part["text"] for message in prompt for part in parts(message) if part["type"] == "text"]
    return {name for text in texts for name, _ in _named(text)}


def _named(template: str) -> list[tuple[str, str]]:
    """(column, format) of each placeholder; no format is ""."""
    return re.findall(r"\{([A-Za-z_]\w*)(?::(\w+))?\}", template.replace("{{", "").replace("}}", ""))


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


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The keys of a task file, and its text."""
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"cannot read the task {path}: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected a mapping of a task's keys.")
    return found, text


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
        if not isinstance(over, Mapping) or not isinstance(found.get(key), Mapping):
            raise UserError(f"tasks: {overrides['name']}: {key}: {over!r} was given, expected a mapping.")
        merged[key] = {**found[key], **over}
    if "source" in overrides and "file" in overrides["source"]:  # a local copy in place of the Hub's
        merged["source"] = {k: v for k, v in merged["source"].items() if k not in ("hub", "config", "revision", "join")}
    if "splits" in overrides:
        for split, given in overrides["splits"].items():
            before = found["splits"].get(split)
            if isinstance(before, Mapping):
                merged["splits"][split] = {
                    **before,
                    **(given if isinstance(given, Mapping) else {"size": given}),
                }
    return merged


def _put_kind(rules: dict[str, Any], keys: Mapping[str, Any]) -> Iterator[Mistake]:
    """Put the rules of the source's kind in their places; a source of no kind is a mistake and has no rules."""
    source: Any = keys.get("source")
    definitions = rules.pop("$defs")
    kinds = [kind for kind in _KINDS if kind in source] if isinstance(source, Mapping) else []
    name = _definition(source) if len(kinds) == 1 else None
    if kinds == ["generator"] and name not in _GENERATORS:
        text = f"source.generator: {name!r} is unknown; choose one of {', '.join(_GENERATORS)}."
        yield Mistake(text, ("source", "generator"))
        name = None
    elif source is not None and name is None:
        yield Mistake(f"source: {source!r} was given, expected a mapping with one of {', '.join(_KINDS)}.", ("source",))
    if name is None:
        rules["properties"]["source"], split = {}, definitions["rows"]
    else:
        rules["properties"]["source"] = definitions[name]
        split = definitions["rows" if is_tabular(source) else "split"]
        if "reference_transform" in definitions[name]["properties"]:
            definitions[name]["properties"]["reference_transform"] = {"enum": [*REFERENCE_TRANSFORMS, None]}
    rules["properties"]["splits"]["properties"] = dict.fromkeys(SPLITS, split)


def _definition(source: Mapping[str, Any]) -> Any:
    """What the source's rules and fields are named after: its generator, else its kind."""
    return source["generator"] if "generator" in source else next(kind for kind in _KINDS if kind in source)


def is_tabular(source: Mapping[str, Any]) -> bool:
    """Whether the source is a table, with columns and rows."""
    return "hub" in source or "file" in source


def _source_mistakes(source: Mapping[str, Any], folders: tuple[Path, ...]) -> Iterator[Mistake]:
    """Ranges that are empty, and files that are not there."""
    for low, high in (("low", "high"), ("low", "smaller_high"), ("target_low", "target_high")):
        if low in source and high in source and source[high] < source[low]:
            expected = f"a whole number, {source[low]} or more (source.{low})"
            yield Mistake(f"source.{high}: {source[high]} was given, expected {expected}.", ("source", high))
    if "file" in source:
        for _, path in _paths(source["file"], folders):
            if isinstance(path, Mistake):
                yield path


def _paths(given: Any, folders: tuple[Path, ...]) -> Iterator[tuple[str, Path | Mistake]]:
    """Part -> absolute path of its file, or what is wrong with it. One file alone is the part "train"."""
    for part, name in (given if isinstance(given, Mapping) else {"train": given}).items():
        tried = [(folder / name).resolve() for folder in folders]
        path = next((path for path in tried if path.is_file()), None)
        where = ("source", "file", part) if isinstance(given, Mapping) else ("source", "file")
        if path is None:
            text = f"source.file: {name} does not exist (looked for {_listing(tried)}); mend the path."
            yield str(part), Mistake(text, where)
        elif path.suffix not in FILE_TYPES:
            yield str(part), Mistake(f"source.file: {name} was given, expected one of {', '.join(FILE_TYPES)}.", where)
        else:
            yield str(part), path


def _listing(paths: list[Path]) -> str:
    return " and ".join(dict.fromkeys(map(str, paths)))


def _spanning_mistakes(keys: Mapping[str, Any]) -> Iterator[Mistake]:
    """Rules that no schema can say, about those keys that are sound in themselves."""
    source = keys["source"]
    if "prompt" in keys:
        yield from _prompt_mistakes(keys["prompt"], _FIELDS.get(_definition(source)))
    if "reference" in keys:
        given = keys["reference"]
        if is_tabular(source) and given is None:
            yield Mistake(
                f"reference: {given!r} was given, expected the name of the column with the right answer "
                "(or a list of names); add `reference: answer`, say.",
                ("reference",),
            )
        elif not is_tabular(source) and given is not None:
            yield Mistake(f"reference: {given!r} was given, but this source makes it; leave it out.", ("reference",))
    if "splits" in keys and source.get("generator") == "times_table":
        try:
            times_table.problems(source, {split: part["size"] for split, part in keys["splits"].items()})
        except UserError as error:
            yield Mistake(str(error), ("splits",))


def _prompt_mistakes(prompt: list[dict[str, Any]], fields: set[str] | None) -> Iterator[Mistake]:
    """`fields`: what may be named; None when only the table itself knows."""
    named, shown = text_columns(prompt), image_columns(prompt)
    if not named and not shown:
        yield Mistake("prompt: no {column} is named, so every item would ask the same.", ("prompt",))
    for index, message in enumerate(prompt):
        for place, part in enumerate(parts(message)):
            for name, form in _named(part.get("text", "")):
                if form and form not in FORMATS:
                    known = ", ".join(f"{{{name}:{known}}}" for known in FORMATS)
                    yield Mistake(
                        f"prompt: {{{name}:{form}}} was given, expected {{{name}}} or one of {known}; "
                        "plain braces are written {{ and }}.",
                        ("prompt", index, "content", place),
                    )
    if both := sorted(named.intersection(shown)):
        yield Mistake(f"prompt: {both} are named in braces and as images; a picture is no text.", ("prompt",))
    if shown and fields:
        text = f"prompt: the image {shown[0]!r} was given, but this source has none; use hub or file."
        yield Mistake(text, ("prompt",))
    foreign = sorted(named - fields) if fields else []
    if foreign:
        yield Mistake(
            f"prompt: {foreign} are named in braces, expected {sorted(fields or ())}; "
            "plain braces are written {{ and }}.",
            ("prompt",),
        )


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
