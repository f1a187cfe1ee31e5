"""Rows of a table: a data set on the Hugging Face Hub, or local JSON, CSV or Parquet files."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randopt.errors import Mistake, Mistakes, UserError
from randopt.tasks import hub
from randopt.tasks.row import Row, normalised
from randopt.tasks.spec import TaskSpec, placeholders

_SHOWN = 3  # of the bad rows of a split
_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def rows(spec: TaskSpec, root: Path) -> dict[str, list[Row]]:
    """Split -> rows start to start + size of its part.

    Raises Mistakes for all missing columns, parts and rows, empty cells, files that cannot be read, or no network.
    """
    made, mistakes = collect(spec, root)
    if mistakes:
        raise Mistakes(f"task {spec.name}", mistakes)
    return made


def collect(spec: TaskSpec, root: Path) -> tuple[dict[str, list[Row]], list[Mistake]]:
    """The rows as far as they can be made, and what is wrong; a row that is wrong has no fields."""
    named = sorted(set().union(*(placeholders(message["content"]) for message in spec.prompt)))
    parts = list(dict.fromkeys(split["part"] for split in spec.splits.values()))
    tables, made = {}, {}
    mistakes: list[Mistake] = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in parts:
            try:
                tables[part] = _load(spec, part, root, scratch)
            except Mistakes as error:
                mistakes += error.mistakes
                if "hub" in spec.source:
                    break  # the other parts would fail for the same reason, after a minute each
        for name, split in spec.splits.items():
            if split["part"] in tables:
                made[name], found = _slice(spec, name, tables[split["part"]], named)
                mistakes += found
    return made, list(dict.fromkeys(mistakes))


def _load(spec: TaskSpec, part: str, root: Path, scratch: str) -> Any:
    """One part as a datasets.Dataset."""
    import datasets  # 1 s: not for the Snakefile

    datasets.disable_progress_bars()
    source = spec.source
    if "path" in source:
        if part not in source["path"]:
            text = (
                f"splits name the part {part!r}, but source.file has "
                f"{', '.join(source['path'])}; write `file: {{{part}: path}}`, or another part in splits."
            )
            raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "file"))])
        path = str(root / source["path"][part])
        try:
            # The scratch cache: the shared one would outlive the file and needs room in the home folder.
            return datasets.load_dataset(
                _BUILDERS[path.rpartition(".")[2]],
                data_files={part: path},
                split=part,
                cache_dir=scratch,
                keep_in_memory=True,
            )
        except Exception as error:
            text = f"{path} cannot be read ({_first_line(error)}); mend the file."
            raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "file"))]) from error
    parts = ", ".join(dict.fromkeys(f"{split['part']}: {split['part']}.jsonl" for split in spec.splits.values()))
    where = f"{source['hub']} ({source['config']}, part {part}, revision {source['revision'][:12]})"
    try:
        return hub.load(source["hub"], source["config"], source["revision"], part)
    except Exception as error:  # the Hub's client has no common base class for its errors
        text = (
            f"{where} cannot be loaded from the Hugging Face Hub ({_first_line(error)}). Without network, either fetch "
            "it on a machine that has it, with the same HF_HOME: `randopt fetch` and the experiment's name, or give "
            f"local files with the same columns: tasks: [{{name: {spec.name}, source: {{file: {{{parts}}}}}}}]."
        )
        raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "hub"))]) from error


def _slice(spec: TaskSpec, name: str, table: Any, named: list[str]) -> tuple[list[Row], list[Mistake]]:
    """The rows of a split, and what is wrong with it; of bad rows the first few."""
    split = spec.splits[name]
    columns = spec.reference if isinstance(spec.reference, list) else [spec.reference]
    mistakes = []
    for column in [*named, *columns]:
        if column not in table.column_names:
            text = (
                f"the column {column!r} is missing from part {split['part']!r}, which has "
                f"{', '.join(table.column_names)}; mend `reference` or the braces in `prompt`."
            )
            mistakes.append(Mistake(text, ("reference",) if column in columns else ("prompt",)))
    start, stop = split["start"], split["start"] + split["size"]
    if stop > len(table):
        text = (
            f"splits.{name} needs rows {start} to {stop - 1} of part {split['part']!r}, "
            f"which has {len(table)} rows; lower the size or the start."
        )
        mistakes.append(Mistake(text, ("splits", name)))
    if mistakes:
        return [], mistakes
    made = []
    for index in range(start, stop):
        try:
            made.append(_row(spec, split["part"], index, table[index], named))
        except UserError as error:
            mistakes.append(Mistake(str(error), ("splits", name)))
            made.append(Row([split["part"], index], {}, None))
    return made, [*mistakes[:_SHOWN], *_rest(mistakes, name)]


def _rest(mistakes: list[Mistake], name: str) -> list[Mistake]:
    more = len(mistakes) - _SHOWN
    return [Mistake(f"and {more} more such rows in {name}.", ("splits", name))] if more > 0 else []


def _row(spec: TaskSpec, part: str, index: int, record: Mapping[str, Any], named: list[str]) -> Row:
    where = f"row {index} of part {part!r}"
    reference = _reference(record, spec.reference, spec.source.get("reference_transform"), where)
    fields = {column: record[column] for column in named}
    for column, value in fields.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{where}: the column {column!r} is empty; fill it or choose other rows.")
    problem = {column: normalised(str(value)) for column, value in fields.items()}
    return Row(problem, fields, reference, meta={"part": part, "row": index})


def _reference(record: Mapping[str, Any], columns: str | list[str] | None, transform: str | None, where: str) -> Any:
    if isinstance(columns, list):
        return {column: record[column] for column in columns}
    value = record[str(columns)]
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"{where}: the reference column {columns!r} is empty; fill it or choose other rows.")
    if transform == "after_hashes":
        _, hashes, answer = str(value).rpartition("####")
        if not hashes:
            raise UserError(
                f"{where}: {str(value)[-80:]!r} has no '####' before its answer; "
                "mend the row or leave source.reference_transform out."
            )
        return answer.strip().replace(",", "")
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
