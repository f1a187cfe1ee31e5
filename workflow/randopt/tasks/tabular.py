"""Rows of a table: a data set on the Hugging Face Hub, or local JSON, CSV or Parquet files."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randopt.errors import UserError
from randopt.tasks.row import Row, normalised
from randopt.tasks.spec import TaskSpec, placeholders

_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def rows(spec: TaskSpec, root: Path) -> dict[str, list[Row]]:
    """Split -> rows start to start + size of its part.

    Raises UserError for a missing column or part, too few rows, a file that cannot be read, or no network.
    """
    named = sorted(set().union(*(placeholders(message["content"]) for message in spec.prompt)))
    parts = list(dict.fromkeys(split["part"] for split in spec.splits.values()))
    with tempfile.TemporaryDirectory() as scratch:
        tables = {part: _load(spec, part, root, scratch) for part in parts}
        return {name: _slice(spec, name, tables[split["part"]], named) for name, split in spec.splits.items()}


def _load(spec: TaskSpec, part: str, root: Path, scratch: str) -> Any:
    """One part as a datasets.Dataset."""
    import datasets  # 1 s: not for the Snakefile

    datasets.disable_progress_bars()
    source = spec.source
    if "path" in source:
        if part not in source["path"]:
            raise UserError(
                f"task {spec.name}: splits name the part {part!r}, but source.file has "
                f"{', '.join(source['path'])}; write `file: {{{part}: path}}`, or another part in splits."
            )
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
            raise UserError(
                f"task {spec.name}: {path} cannot be read ({_first_line(error)}); mend the file."
            ) from error
    parts = ", ".join(dict.fromkeys(f"{split['part']}: {split['part']}.jsonl" for split in spec.splits.values()))
    call = f"datasets.load_dataset('{source['hub']}', {source['config']!r}, revision='{source['revision']}')"
    where = f"{source['hub']} ({source['config']}, part {part}, revision {source['revision'][:12]})"
    try:
        return datasets.load_dataset(source["hub"], source["config"], split=part, revision=source["revision"])
    except Exception as error:  # the Hub's client has no common base class for its errors
        raise UserError(
            f"task {spec.name}: {where} cannot be loaded from the Hugging Face Hub ({_first_line(error)}). "
            "Without network, either fetch it once on a machine that has it, with the same HF_HOME: "
            f'python -c "import datasets; {call}", or give local files with the same columns: '
            f"tasks: [{{name: {spec.name}, source: {{file: {{{parts}}}}}}}]."
        ) from error


def _slice(spec: TaskSpec, name: str, table: Any, named: list[str]) -> list[Row]:
    split = spec.splits[name]
    columns = spec.reference if isinstance(spec.reference, list) else [spec.reference]
    for column in [*named, *columns]:
        if column not in table.column_names:
            raise UserError(
                f"task {spec.name}: the column {column!r} is missing from part {split['part']!r}, which has "
                f"{', '.join(table.column_names)}; mend `reference` or the braces in `prompt`."
            )
    start, stop = split["start"], split["start"] + split["size"]
    if stop > len(table):
        raise UserError(
            f"task {spec.name}: splits.{name} needs rows {start} to {stop - 1} of part {split['part']!r}, "
            f"which has {len(table)} rows; lower the size or the start."
        )
    transform = spec.source.get("reference_transform")
    made = []
    for index in range(start, stop):
        record = table[index]
        where = f"task {spec.name}: row {index} of part {split['part']!r}"
        reference = _reference(record, spec.reference, transform, where)
        fields = {column: record[column] for column in named}
        for column, value in fields.items():
            if value is None:
                raise UserError(f"{where}: the column {column!r} is empty; fill it or choose other rows.")
        problem = {column: normalised(str(value)) for column, value in fields.items()}
        made.append(Row(problem, fields, reference, meta={"part": split["part"], "row": index}))
    return made


def _reference(record: Mapping[str, Any], columns: str | list[str] | None, transform: str | None, where: str) -> Any:
    if isinstance(columns, list):
        return {column: record[column] for column in columns}
    value = record[str(columns)]
    if value is None:
        raise UserError(f"{where}: the reference column {columns!r} is empty; fill it or choose other rows.")
    if transform == "after_hashes":
        _, hashes, answer = str(value).rpartition("####")
        if not hashes:
            raise UserError(
                f"{where}: {str(value)[-80:]!r} has no '####' before its answer; "
                "mend the row or leave source.reference_transform out."
            )
        return answer.strip().replace(",", "")
    if transform == "first_without_dollars":
        answers = value if isinstance(value, list) else [value]
        answer = re.sub(r"(?<!\\)\$", "", str(answers[0])).strip() if answers and isinstance(answers[0], str) else ""
        if not answer:
            raise UserError(
                f"{where}: {str(value)[:80]!r} was given, expected an answer or a list of answers as text; "
                "mend the row or leave source.reference_transform out."
            )
        return answer
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
