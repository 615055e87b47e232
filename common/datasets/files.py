"""Reading a user's CSV, Parquet and NPZ files into `Records`.

Everything is read as its description says, never guessed: a column of numbers with a word in it is a fault
that names file, column and line, not silently a column of names. Messages never quote a record's value: they
may end up in a log.

A fault is of the *file* (it can't be opened, a column is absent), which always raises, or of *single
records*, which is the caller's to judge: public files raise at the first, private ones go on with the cell
missing or the record left out. Cell by cell and line by line, so that no record decides how another one is
read: a line of a CSV file is a record, whatever its quotes do, and no column changes its type because of one
cell.

pyarrow is imported here and only when a Parquet file is read.
"""

import csv
import math
import zipfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.datasets.description import Description
from common.errors import UserError
from common.preprocessing import CategoricalSpec, NumericSpec, PixelsSpec, Text
from common.records import AnyArray, Floats, Records, bands

if TYPE_CHECKING:
    import pyarrow

Complain = Callable[[str], None]
"""Takes one sentence about single records: it raises, or it returns and reading goes on without them."""
Column = AnyArray | list[object]
"""An array of numbers or images as NumPy has it, or cells of any type."""

LONGEST_NAME = 200
"""Characters of a name, as many as a category may have; one long cell would widen a whole column."""
UNREADABLE = object()
"""Stands for a cell that its own file format can't read."""


def refuse(complaint: str) -> None:
    """Take a fault of single records for one of the whole file.

    Raises:
        UserError: always.
    """
    raise UserError(complaint)


@dataclass(frozen=True)
class Table:
    """The records of one file, and what its site column says of each, if it has one."""

    records: Records
    site_labels: AnyArray | None


def read_table(
    path: Path,
    description: Description,
    *,
    site_column: str = "",
    optional_target: bool = False,
    complain: Complain = refuse,
) -> Table:
    """Read one file as its description says.

    Args:
        path: A .csv, .parquet or .npz file.
        description: Names columns and their kinds.
        site_column: Column that names each record's site, or "".
        optional_target: Whether a file without the target column is taken as unlabelled.
        complain: Is told of each column's faults of single records. If it returns, a line that isn't a
            record is left out, a cell that can't be read counts as missing, and an unknown label as none.

    Raises:
        UserError: naming file, column and line; it quotes no value of any record.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: only {', '.join(_READERS)} files are read")
    features = [feature.name for feature in description.features]
    others = [description.target, description.patient, site_column, *description.groups]
    wanted = list(dict.fromkeys(name for name in (*features, *others) if name))
    try:
        contents = reader(path, wanted)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} isn't UTF-8 text") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # its text may quote the file
        raise UserError(f"{path} isn't a readable {path.suffix} file ({type(error).__name__})") from None
    columns = contents.columns
    absent = [name for name in wanted if name not in columns]
    if optional_target and description.target in absent:
        absent.remove(description.target)
    if absent:
        raise UserError(f"{path}: there is no column {absent[0]!r}")
    if len({len(column) for column in columns.values()}) > 1:
        raise UserError(f"{path}: its arrays differ in length")
    if contents.broken:
        wrong = "not one field for each column, quotes that don't close, or no UTF-8 text"
        complain(f"{path}: {_places(contents.place, contents.broken)}: {wrong}")
    parse = _Parser(path, contents, description.missing, complain)
    kinds: dict[type, Callable[[str], AnyArray]] = {
        NumericSpec: parse.numbers,
        CategoricalSpec: parse.names,
        PixelsSpec: parse.pixels,
        Text: parse.texts,
    }
    num_records = len(next(iter(columns.values())))
    return Table(
        Records(
            columns={feature.name: kinds[type(feature)](feature.name) for feature in description.features},
            target=parse.labels(description.target, description.classes)
            if description.target in columns
            else np.full(num_records, ""),
            patients=parse.names(description.patient) if description.patient else None,
            groups={
                name: bands(parse.numbers(name), group.edges) if group.edges else parse.names(name)
                for name, group in description.groups.items()
            },
        ),
        site_labels=parse.names(site_column) if site_column else None,
    )


# ---- Cells -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Contents:
    """What a reader found: columns, where each record stands in the file, and what stands there broken."""

    columns: Mapping[str, Column]
    place: str
    at: Sequence[int]
    broken: Sequence[int] = ()


@dataclass(frozen=True)
class _Parser:
    path: Path
    contents: _Contents
    missing: Sequence[str]
    complain: Complain

    def numbers(self, name: str) -> Floats:
        """Return (N,) float64, NaN where missing."""
        column = self._table_column(name)
        if isinstance(column, np.ndarray):
            return column.astype(np.float64)
        numbers = [_number(cell, self.missing) for cell in column]
        expected = f"not a number; values that count as missing are {list(self.missing)} (key `missing`)"
        self._name_the_wrong(name, [number is None for number in numbers], expected)
        return np.array([math.nan if number is None else number for number in numbers], dtype=np.float64)

    def names(self, name: str) -> AnyArray:
        """Return (N,) str, "" where missing; whole numbers without a decimal point."""
        names = [
            None if text is None or len(text) > LONGEST_NAME else text for text in self._cells_as_text(name)
        ]
        expected = f"not readable as text of at most {LONGEST_NAME} characters"
        self._name_the_wrong(name, [text is None for text in names], expected)
        return np.array(["" if text is None or text in self.missing else text for text in names], dtype=str)

    def texts(self, name: str) -> AnyArray:
        """Return (N,) objects, each a str of any length, "" where missing."""
        texts = self._cells_as_text(name)
        self._name_the_wrong(name, [text is None for text in texts], "not readable as text")
        values = np.empty(len(texts), dtype=object)
        values[:] = ["" if text is None or text in self.missing else text for text in texts]
        return values

    def labels(self, name: str, classes: Sequence[str]) -> AnyArray:
        """Return (N,) str, "" where there is none of the classes."""
        labels = self.names(name)
        unknown = ~np.isin(labels, [*classes, ""])
        self._name_the_wrong(name, unknown.tolist(), f"none of the classes {', '.join(classes)}")
        return np.where(unknown, "", labels)

    def pixels(self, name: str) -> AnyArray:
        """Return (N, C, H, W) uint8 or float32; (N, H, W) gets one channel."""
        values = self.contents.columns[name]
        if not isinstance(values, np.ndarray) or values.ndim == 1:
            raise UserError(
                f"{self.path}: column {name!r} holds no images; they come as an array in an .npz file"
            )
        if values.dtype != np.uint8 and values.dtype.kind != "f":
            raise UserError(
                f"{self.path}: {name!r} has type {values.dtype}; images are uint8 or floating point"
            )
        if values.dtype != np.uint8:
            with np.errstate(over="ignore"):  # infinite here, and cut to the public range when it is encoded
                values = values.astype(np.float32)
        return values[:, None] if values.ndim == 3 else values

    def _cells_as_text(self, name: str) -> list[str | None]:
        column = self._table_column(name)
        return [_text(cell) for cell in (column.tolist() if isinstance(column, np.ndarray) else column)]

    def _table_column(self, name: str) -> Column:
        column = self.contents.columns[name]
        if isinstance(column, np.ndarray) and column.ndim > 1:
            raise UserError(f"{self.path}: {name!r} has {column.ndim} dimensions; a column has one")
        return column

    def _name_the_wrong(self, name: str, wrong: Iterable[bool], expected: str) -> None:
        places = [place for place, is_wrong in zip(self.contents.at, wrong, strict=True) if is_wrong]
        if places:
            where = _places(self.contents.place, places)
            self.complain(f"{self.path}: column {name!r}, {where}: {expected}")


def _places(place: str, numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
    return f"{place} {numbers[0]}{more}"


def _text(cell: object) -> str | None:
    """Return a cell as text, "" where it is empty, None where it can't be read."""
    if cell is None or cell != cell:
        return ""
    if cell is UNREADABLE:
        return None
    try:
        if isinstance(cell, float) and cell.is_integer():
            text = f"{cell:.0f}"
        else:
            text = (cell.decode() if isinstance(cell, bytes) else str(cell)).strip()
        text.encode()  # half of a surrogate pair is no text
    except ValueError:
        return None
    return text


def _number(cell: object, missing: Sequence[str]) -> float | None:
    """Return a cell as a number, NaN where it is missing, None where it is no number."""
    if isinstance(cell, bool | int | float):
        try:
            return float(cell)
        except OverflowError:
            return None
    text = _text(cell)
    if text is None or len(text) > LONGEST_NAME or "_" in text:  # Python would take 1_000
        return None
    if text == "" or text in missing:
        return math.nan
    try:
        number = float(text)
    except ValueError:
        return None
    return None if math.isnan(number) else number


# ---- Formats -----------------------------------------------------------------------------------------------


def _csv(path: Path, wanted: Sequence[str]) -> _Contents:
    content = path.read_bytes().removeprefix(BOM_UTF8)
    numbered = _lines(content)
    _, first = next(numbered, (0, b""))
    first.decode()  # or the file isn't UTF-8
    header = _fields(first)
    if not header:
        raise UserError(f"{path}: its first line names no columns")
    at = {name: header.index(name) for name in wanted if name in header}
    if len(header) == 1 and not at:
        raise UserError(
            f"{path}: its first line is a single field: commas part fields, not semicolons or tabs"
        )
    if twice := [name for name in at if header.count(name) > 1]:
        raise UserError(f"{path}: there are {header.count(twice[0])} columns {twice[0]!r}: one is right")
    columns: dict[str, list[object]] = {name: [] for name in at}
    good, broken = [], []
    for number, line in numbered:
        fields = _fields(line)
        if len(fields) != len(header):
            broken.append(number)
            continue
        good.append(number)
        for name, place in at.items():
            columns[name].append(fields[place])
    return _Contents(columns, "line", good, broken)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Part a text into lines that aren't empty, whatever ends them: no line decides how others are parted.

    They are numbered as editors and `sed` count them, which know one kind of end.
    """
    end, number = b"\n" if b"\n" in content else b"\r", 1
    for line in content.splitlines(keepends=True):
        if line.strip():
            yield number, line.rstrip(b"\r\n")
        number += line.endswith(end)


def _fields(line: bytes) -> list[str]:
    """Split one line; none are returned of a line that isn't a record by itself."""
    try:
        return next(csv.reader([line.decode()], strict=True))
    except (ValueError, csv.Error):
        return []


def _parquet(path: Path, wanted: Sequence[str]) -> _Contents:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read(columns=[name for name in wanted if name in file.schema_arrow.names])
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None
    # Cells but for floats, since NumPy would make floats of whole numbers among which one is missing.
    columns: dict[str, Column] = {
        name: column.to_numpy()
        if pyarrow.types.is_floating(column.type)
        else _cells(column.to_pylist, partial(_arrow_cell, column), len(column))
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return _Contents(columns, "record", range(1, table.num_rows + 1))


def _arrow_cell(column: "pyarrow.ChunkedArray", row: int) -> object:
    return column[row].as_py()


def _npz(path: Path, wanted: Sequence[str]) -> _Contents:
    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise UserError(f"{path}: it holds a single array without a name")
    with archive:
        arrays = {name: archive[name] for name in wanted if name in archive}
    columns: dict[str, Column] = {}
    for name, values in arrays.items():
        if values.ndim == 0 or values.dtype.kind not in "biufUSMm":
            raise UserError(f"{path}: {name!r} is no array of numbers or text")
        if values.ndim > 1 or values.dtype.kind in "biuf":
            columns[name] = values
        elif values.dtype.kind in "US":
            columns[name] = _cells(values.tolist, values.item, len(values))
        else:  # dates
            columns[name] = values.astype(str).tolist()
    return _Contents(columns, "record", range(1, 1 + len(next(iter(columns.values()), ()))))


def _cells(all_at_once: Callable[[], list[object]], one: Callable[[int], object], count: int) -> list[object]:
    """Read a column's cells; one that can't be read leaves the others as they are."""
    try:
        return all_at_once()
    except (ValueError, OverflowError):
        return [_cell(one, row) for row in range(count)]


def _cell(one: Callable[[int], object], row: int) -> object:
    try:
        return one(row)
    except (ValueError, OverflowError):
        return UNREADABLE


_READERS: Mapping[str, Callable[[Path, Sequence[str]], _Contents]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".npz": _npz,
}
