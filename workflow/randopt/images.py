"""Pictures of items: read from its source, and kept once each, under a name that is their content.

Imported whenever the Snakefile is parsed: nothing heavier than the standard library at module level.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from randopt.errors import UserError

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}
MAX_PIXELS = 64_000_000  # a larger picture is a mistake, or an attack on memory


@dataclass(frozen=True)
class Image:
    """An encoded picture; two with one name are the same."""

    name: str  # 32 hex digits of the SHA-256 of `data`, and the suffix of its format
    data: bytes = field(compare=False, repr=False)

    def decoded(self) -> Any:
        """The picture as a PIL image in RGB, upright as its camera says."""
        from PIL import Image as Pillow
        from PIL import ImageOps

        return ImageOps.exif_transpose(Pillow.open(io.BytesIO(self.data))).convert("RGB")


def read_cell(value: Any, folder: Path, where: str) -> Image:
    """The picture that a table's cell holds: {"bytes": ...}, or the path of a file, from the table's folder.

    Raises UserError that begins with `where` for anything else, and for a picture that cannot be decoded.
    """
    data = value.get("bytes") if isinstance(value, Mapping) else value if isinstance(value, bytes) else None
    if data is None:
        data = _file(value.get("path") if isinstance(value, Mapping) else value, folder, where).read_bytes()
    return Image(_name(data, where), data)


def write(images: Mapping[str, Image], folder: Path) -> None:
    """Keep the pictures in `folder`, each under its name; those that are there whole stay as they are."""
    from randopt.files import write_atomic

    for image in images.values():
        path = Path(folder) / image.name
        if not path.is_file() or _digest(path.read_bytes()) != path.stem:
            write_atomic(path, partial(_write, data=image.data))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def load(folder: Path, name: str) -> Image:
    """The picture `name` of a task's folder; UserError when it is missing or no longer what its name says."""
    path = Path(folder) / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _spoilt(path, f"cannot be read ({error.strerror})") from error
    if _digest(data) != path.stem:
        raise _spoilt(path, "is damaged: its content is not what its name says")
    return Image(name, data)


def files_digest(tables: Mapping[str, str], columns: Sequence[str], rows: Mapping[str, Sequence[range]]) -> str | None:
    """SHA-256 over the picture files that rows of local tables name, in order; None when they name none.

    tables: part -> path of its table; rows: part, or several joined by +, -> the rows in use. Pictures inside of a
    Parquet file are covered by the hash of that file; where one is joined, all rows of the other files count. What
    cannot be read here is left to `tabular`, which says what is wrong.
    """
    total, found = hashlib.sha256(), False
    for joined, ranges in rows.items():
        paths = [Path(tables.get(part, "")) for part in joined.split("+")]
        texts = [path for path in paths if path.suffix in (".jsonl", ".json", ".csv")]
        records = [(path, record) for path in texts for record in _records(path)]
        used = ranges if texts == paths else [range(len(records))]
        for index in (index for wanted in used for index in wanted if index < len(records)):
            path, record = records[index]
            for column in columns:
                name = record.get(column) if isinstance(record, Mapping) else None
                if isinstance(name, str) and name:
                    found = True
                    total.update(hashlib.sha256(_file(name, path.parent, f"{path}: row {index}").read_bytes()).digest())
    return total.hexdigest() if found else None


def _records(path: Path) -> list[Any]:
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            if path.suffix == ".csv":
                return list(csv.DictReader(stream))
            text = stream.read()
        if text.lstrip().startswith("["):  # a .json file may also hold lines, and the other way round
            return json.loads(text)
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); mend the file.") from error


def _file(name: Any, folder: Path, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise UserError(
            f"{where}: {str(name)[:100]!r} was given for a picture, expected the path of a file, or a column of "
            "pictures as the package datasets writes them."
        )
    path = folder / name
    if not path.is_file():
        raise UserError(f"{where}: the picture {path} does not exist; paths start at the table's folder.")
    return path


def _name(data: bytes, where: str) -> str:
    """What a picture is kept as, after it was decoded whole."""
    from PIL import Image as Pillow

    image = Image("", data)
    try:
        with Pillow.open(io.BytesIO(data)) as picture:
            kind, (width, height) = picture.format, picture.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{width} × {height} pixels, {MAX_PIXELS:,} at most are read")
        image.decoded()
    except Exception as error:  # Pillow raises whatever its decoders do
        raise UserError(f"{where}: the picture cannot be decoded ({error}); mend or leave out this row.") from error
    if kind not in SUFFIXES:
        raise UserError(f"{where}: the picture is {kind}, expected one of {', '.join(SUFFIXES)}; convert it.")
    return _digest(data) + SUFFIXES[kind]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _spoilt(path: Path, what: str) -> UserError:
    folder = path.parent.parent
    return UserError(
        f"{path} {what}. Remove the *.parquet files in {folder} and run again, which makes the items anew."
    )
