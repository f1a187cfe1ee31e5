"""Rows of a table: a data set on the Hugging Face Hub, or local JSON, CSV or Parquet files."""

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from randopt.errors import Mistake, Mistakes, UserError
from randopt.images import Image, read_cell
from randopt.tasks import hub
from randopt.tasks.row import Row, normalised
from randopt.tasks.spec import TaskSpec, image_columns, part_names, text_columns

_SHOWN = 3  # of the bad rows of a split
_BUILDERS = {"jsonl": "json", "json": "json", "csv": "csv", "parquet": "parquet"}


def rows(spec: TaskSpec, root: Path) -> dict[str, list[Row]]:
    """Split -> rows start to start + size of its part.

    Raises Mistakes for all missing columns, parts and rows, empty cells, files and pictures that cannot be
    read, or no network.
    """
    made, mistakes = collect(spec, root)
    if mistakes:
        raise Mistakes(f"task {spec.name}", mistakes)
    return made


def collect(spec: TaskSpec, root: Path) -> tuple[dict[str, list[Row]], list[Mistake]]:
    """The rows as far as they can be made, and what is wrong; a row that is wrong has no fields."""
    tables, made = {}, {}
    mistakes: list[Mistake] = []
    with tempfile.TemporaryDirectory() as scratch:
        for part in _named_parts(spec):
            try:
                tables[part] = _load(spec, part, root, scratch)
            except Mistakes as error:
                mistakes += error.mistakes
                if "hub" in spec.source:
                    break  # the other parts would fail for the same reason, after a minute each
        for name, split in spec.splits.items():
            names = part_names(split["part"])
            if tables.keys() >= set(names):
                made[name], found = _slice(spec, name, _Chain([tables[part] for part in names]))
                mistakes += found
    return made, list(dict.fromkeys(mistakes))


class _Table(NamedTuple):
    """One part: rows by number, and the folder that the paths of its pictures start at."""

    rows: Any  # datasets.Dataset or _Joined
    folder: Path


class _Chain:
    """Parts one after the other; the columns are those that all of them have."""

    def __init__(self, tables: list[_Table]) -> None:
        first, *others = (table.rows.column_names for table in tables)
        self.column_names = [name for name in first if all(name in names for names in others)]
        self._tables = tables

    def __len__(self) -> int:
        return sum(len(table.rows) for table in self._tables)

    def row(self, index: int) -> tuple[dict[str, Any], Path]:
        """A row, and the folder of its table."""
        for table in self._tables:
            if index < len(table.rows):
                return table.rows[index], table.folder
            index -= len(table.rows)
        raise IndexError(index)


class _Joined:
    """A part whose rows have the columns of another table too: of its row where `right` equals their `left`."""

    def __init__(self, where: str, part: str, table: Any, other: Any, keys: Mapping[str, str]) -> None:
        ((left, right),) = keys.items()
        missing = [
            f"source.join: the column {column!r} is missing from part {part!r}, which has "
            f"{', '.join(found.column_names)}."
            for found, column in ((table, left), (other, right))
            if column not in found.column_names
        ]
        if missing:
            raise Mistakes(where, [Mistake(text, ("source", "join", "keys")) for text in missing])
        self.column_names = list(dict.fromkeys([*table.column_names, *other.column_names]))
        self._part, self._table, self._other, self._left = part, table, other, left
        self._place = {key: index for index, key in enumerate(other[right])}

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._table[index]
        place = self._place.get(row[self._left])
        if place is None:
            raise UserError(f"row {index} of part {self._part!r}: {row[self._left]!r} is not in the joined table.")
        return {**self._other[place], **row}


def _named_parts(spec: TaskSpec) -> list[str]:
    """Every part that a split takes rows of."""
    return list(dict.fromkeys(part for split in spec.splits.values() for part in part_names(split["part"])))


def _load(spec: TaskSpec, part: str, root: Path, scratch: str) -> _Table:
    """One part; Mistakes when it cannot be read."""
    import datasets  # 1 s: not for the Snakefile

    datasets.disable_progress_bars()
    source = spec.source
    if "path" in source:
        return _local(spec, part, root, scratch)
    table = _hub(spec, part, source["config"])
    if "join" in source:
        join = source["join"]
        table = _Joined(f"task {spec.name}", part, table, _hub(spec, part, join["config"]), join["keys"])
    return _Table(table, Path())


def _local(spec: TaskSpec, part: str, root: Path, scratch: str) -> _Table:
    import datasets

    source = spec.source
    if part not in source["path"]:
        text = (
            f"splits name the part {part!r}, but source.file has "
            f"{', '.join(source['path'])}; write `file: {{{part}: path}}`, or another part in splits."
        )
        raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "file"))])
    path = root / source["path"][part]
    try:
        # The scratch cache: the shared one would outlive the file and needs room in the home folder.
        table = datasets.load_dataset(
            _BUILDERS[path.suffix[1:]],
            data_files={part: str(path)},
            split=part,
            cache_dir=scratch,
            keep_in_memory=True,
        )
    except Exception as error:
        text = f"{path} cannot be read ({_first_line(error)}); mend the file."
        raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "file"))]) from error
    return _Table(_encoded(table), path.parent)


def _hub(spec: TaskSpec, part: str, configs: str | Mapping[str, str | None] | None) -> Any:
    source = spec.source
    if isinstance(configs, Mapping) and part not in configs:
        text = (
            f"splits name the part {part!r}, but the configs of the source are for {', '.join(configs)}; add it there."
        )
        raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "config"))])
    config = configs[part] if isinstance(configs, Mapping) else configs
    parts = ", ".join(f"{part}: {part}.jsonl" for part in _named_parts(spec))
    where = f"{source['hub']} ({config}, part {part}, revision {source['revision'][:12]})"
    try:
        return _encoded(hub.load(source["hub"], config, source["revision"], part))
    except Exception as error:  # the Hub's client has no common base class for its errors
        text = (
            f"{where} cannot be loaded from the Hugging Face Hub ({_first_line(error)}). Without network, either fetch "
            "it on a machine that has it, with the same HF_HOME: `randopt fetch` and the experiment's name, or give "
            f"local files with the same columns: tasks: [{{name: {spec.name}, source: {{file: {{{parts}}}}}}}]."
        )
        raise Mistakes(f"task {spec.name}", [Mistake(text, ("source", "hub"))]) from error


def _encoded(table: Any) -> Any:
    """The table with its pictures as they are stored instead of decoded."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    return table


def _slice(spec: TaskSpec, name: str, table: _Chain) -> tuple[list[Row], list[Mistake]]:
    """The rows of a split, and what is wrong with it; of bad rows the first few."""
    split = spec.splits[name]
    columns = spec.reference if isinstance(spec.reference, list) else [spec.reference]
    mistakes = []
    for column in [*sorted(text_columns(spec.prompt)), *image_columns(spec.prompt), *columns]:
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
    images: dict[Image, Image] = {}  # each once in memory, however many questions are about it
    for index in range(start, stop):
        try:
            made.append(_row(spec, split["part"], index, *table.row(index), images))
        except UserError as error:
            mistakes.append(Mistake(str(error), ("splits", name)))
            made.append(Row([split["part"], index], {}, None))
    return made, [*mistakes[:_SHOWN], *_rest(mistakes, name)]


def _rest(mistakes: list[Mistake], name: str) -> list[Mistake]:
    more = len(mistakes) - _SHOWN
    return [Mistake(f"and {more} more such rows in {name}.", ("splits", name))] if more > 0 else []


def _row(
    spec: TaskSpec, part: str, index: int, record: Mapping[str, Any], folder: Path, images: dict[Image, Image]
) -> Row:
    where = f"row {index} of part {part!r}"
    reference = _reference(record, spec.reference, spec.source.get("reference_transform"), where)
    shown = image_columns(spec.prompt)
    fields = {column: record[column] for column in [*sorted(text_columns(spec.prompt)), *shown]}
    for column, value in fields.items():
        if value is None or (isinstance(value, str) and not value.strip()):
            raise UserError(f"{where}: the column {column!r} is empty; fill it or choose other rows.")
    for column in shown:
        image = read_cell(fields[column], folder, f"{where}, column {column!r}")
        fields[column] = images.setdefault(image, image)
    problem = {
        column: value.name if isinstance(value, Image) else normalised(str(value)) for column, value in fields.items()
    }
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
