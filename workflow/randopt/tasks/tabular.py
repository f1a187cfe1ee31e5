"""Rows of a table: a data set on the Hugging Face Hub, or local JSON, CSV or Parquet files."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from randopt.errors import UserError
from randopt.images import Image, read_cell
from randopt.tasks.row import Row, normalised
from randopt.tasks.spec import TaskSpec, image_columns, text_columns

_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def rows(spec: TaskSpec, root: Path) -> dict[str, list[Row]]:
    """Split -> rows start to start + size of its part.

    Raises UserError for a missing column or part, too few rows, a file or picture that cannot be read, or no network.
    """
    parts = list(dict.fromkeys(split["part"] for split in spec.splits.values()))
    with tempfile.TemporaryDirectory() as scratch:
        tables = {part: _parts(spec, part, root, scratch) for part in parts}
        return {name: _slice(spec, name, tables[split["part"]], root) for name, split in spec.splits.items()}


def _parts(spec: TaskSpec, parts: str, root: Path, scratch: str) -> Any:
    """One part, or several joined by +."""
    import datasets  # 1 s: not for the Snakefile

    loaded = [_load(spec, part, root, scratch) for part in parts.split("+")]
    return loaded[0] if len(loaded) == 1 else datasets.concatenate_datasets(loaded)


def _load(spec: TaskSpec, part: str, root: Path, scratch: str) -> Any:
    """One part as a datasets.Dataset."""
    import datasets  # 1 s: not for the Snakefile

    datasets.disable_progress_bars()
    source = spec.source
    if "path" in source:
        return _encoded(_local(spec, part, root, scratch))
    table = _hub(spec, part, source["config"])
    if "join" not in source:
        return table
    ((left, right),) = source["join"]["keys"].items()
    return _Joined(spec, part, table, _hub(spec, part, source["join"]["config"]), left, right)


class _Joined:
    """A part whose rows have the columns of another table too: of its row where `right` equals their `left`."""

    def __init__(self, spec: TaskSpec, part: str, table: Any, other: Any, left: str, right: str) -> None:
        for found, column in ((table, left), (other, right)):
            if column not in found.column_names:
                raise UserError(
                    f"task {spec.name}: source.join: the column {column!r} is missing from part {part!r}, which has "
                    f"{', '.join(found.column_names)}."
                )
        self.column_names = list(dict.fromkeys([*table.column_names, *other.column_names]))
        self._where = f"task {spec.name}: part {part!r}"
        self._table, self._other, self._left = table, other, left
        self._place = {key: index for index, key in enumerate(other[right])}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        place = self._place.get(row[self._left])
        if place is None:
            raise UserError(f"{self._where}: row {index}: {row[self._left]!r} is not in the joined table.")
        return {**self._other[place], **row}


def _encoded(table: Any) -> Any:
    """The table with its pictures as they are stored instead of decoded."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _local(spec: TaskSpec, part: str, root: Path, scratch: str) -> Any:
    import datasets

    source = spec.source
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
        raise UserError(f"task {spec.name}: {path} cannot be read ({_first_line(error)}); mend the file.") from error


def _hub(spec: TaskSpec, part: str, configs: str | Mapping[str, str] | None) -> Any:
    import datasets

    source = spec.source
    if isinstance(configs, Mapping) and part not in configs:
        raise UserError(
            f"task {spec.name}: splits name the part {part!r}, but the configs of the source are for "
            f"{', '.join(configs)}; add it there."
        )
    config = configs[part] if isinstance(configs, Mapping) else configs
    named = dict.fromkeys(part for split in spec.splits.values() for part in split["part"].split("+"))
    parts = ", ".join(f"{part}: {part}.jsonl" for part in named)
    call = f"datasets.load_dataset('{source['hub']}', {config!r}, revision='{source['revision']}')"
    where = f"{source['hub']} ({config}, part {part}, revision {source['revision'][:12]})"
    try:
        return _encoded(datasets.load_dataset(source["hub"], config, split=part, revision=source["revision"]))
    except Exception as error:  # the Hub's client has no common base class for its errors
        raise UserError(
            f"task {spec.name}: {where} cannot be loaded from the Hugging Face Hub ({_first_line(error)}). "
            "Without network, either fetch it once on a machine that has it, with the same HF_HOME: "
            f'python -c "import datasets; {call}", or give local files with the same columns: '
            f"tasks: [{{name: {spec.name}, source: {{file: {{{parts}}}}}}}]."
        ) from error


def _slice(spec: TaskSpec, name: str, table: Any, root: Path) -> list[Row]:
    split = spec.splits[name]
    named, shown = sorted(text_columns(spec.prompt)), image_columns(spec.prompt)
    columns = spec.reference if isinstance(spec.reference, list) else [spec.reference]
    for column in [*named, *shown, *columns]:
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
    folder = (root / spec.source["path"][split["part"].split("+")[0]]).parent if "path" in spec.source else Path()
    images: dict[Image, Image] = {}  # each once in memory, however many questions are about it
    made = []
    for index in range(start, stop):
        record = table[index]
        where = f"task {spec.name}: row {index} of part {split['part']!r}"
        reference = _reference(record, spec.reference, transform, where)
        fields = {column: record[column] for column in [*named, *shown]}
        for column, value in fields.items():
            if value is None:
                raise UserError(f"{where}: the column {column!r} is empty; fill it or choose other rows.")
        for column in shown:
            image = read_cell(fields[column], folder, f"{where}, column {column!r}")
            fields[column] = images.setdefault(image, image)
        problem = {
            column: value.name if isinstance(value, Image) else normalised(str(value))
            for column, value in fields.items()
        }
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
    return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
