"""Reading a user's CSV, Parquet and NPZ files into `Records`.

Everything is read as its description says, never guessed: a column of numbers with a word in it is an error
that names file, column and line, not silently a column of names. Messages never quote a record's value: they
may end up in a log.

pandas is imported here and only when a file is read, so that a process without tables starts without it.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.datasets.description import Description
from common.errors import UserError
from common.preprocessing import CategoricalSpec, NumericSpec, PixelsSpec
from common.records import AnyArray, Floats, Records, bands

if TYPE_CHECKING:
    import pandas as pd

Columns = Mapping[str, "pd.Series[Any] | AnyArray"]
"""Name → a column of a table as pandas has it, or an array of images."""


@dataclass(frozen=True)
class Table:
    """The records of one file, and what its site column says of each, if it has one."""

    records: Records
    site_labels: AnyArray | None


def read_table(
    path: Path, description: Description, *, site_column: str = "", optional_target: bool = False
) -> Table:
    """Read one file as its description says.

    Args:
        path: A .csv, .parquet or .npz file.
        description: Names columns and their kinds.
        site_column: Column that names each record's site, or "".
        optional_target: Whether a file without the target column is taken as unlabelled.

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
        columns = reader(path, wanted)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except UnicodeDecodeError:  # its text quotes the file
        raise UserError(f"{path} isn't UTF-8 text") from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} isn't a readable {path.suffix} file: {error}") from None
    absent = [name for name in wanted if name not in columns]
    if optional_target and description.target in absent:
        absent.remove(description.target)
    if absent:
        raise UserError(f"{path}: there is no column {absent[0]!r}")
    if len({len(column) for column in columns.values()}) > 1:
        raise UserError(f"{path}: its arrays differ in length")
    parse = _Parser(path, columns, description.missing)
    kinds: dict[type, Callable[[str], AnyArray]] = {
        NumericSpec: parse.numbers,
        CategoricalSpec: parse.names,
        PixelsSpec: parse.pixels,
    }
    num_records = len(next(iter(columns.values())))
    return Table(
        Records(
            columns={feature.name: kinds[type(feature)](feature.name) for feature in description.features},
            target=parse.names(description.target)
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


@dataclass(frozen=True)
class _Parser:
    path: Path
    columns: Columns
    missing: Sequence[str]

    def numbers(self, name: str) -> Floats:
        """Return (N,) float64, NaN where missing."""
        import pandas as pd

        column = self._table_column(name)
        if pd.api.types.is_numeric_dtype(column.dtype):
            return column.to_numpy(dtype=np.float64, na_value=np.nan)
        text = self.names(name)
        values = pd.to_numeric(pd.Series(text), errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
        wrong = np.flatnonzero(np.isnan(values) & (text != ""))
        if len(wrong):
            raise UserError(
                f"{self.path}: column {name!r}, record {wrong[0] + 1}: not a number; "
                f"values that count as missing are {list(self.missing)} (key `missing`)"
            )
        return values

    def names(self, name: str) -> AnyArray:
        """Return (N,) str, "" where missing; whole numbers without a decimal point."""
        import pandas as pd

        column = self._table_column(name)
        known = column.notna().to_numpy(dtype=bool)
        if pd.api.types.is_float_dtype(column.dtype):
            text = [
                f"{value:.0f}" if value.is_integer() else str(value) for value in column[known].astype(float)
            ]
        else:
            text = [str(value).strip() for value in column[known]]
        out = np.full(len(column), "", dtype=object)
        out[known] = text
        strings = out.astype(str)
        return np.where(np.isin(strings, list(self.missing)), "", strings)

    def pixels(self, name: str) -> AnyArray:
        """Return (N, C, H, W) uint8 or float32; (N, H, W) gets one channel."""
        values = self.columns[name]
        if not isinstance(values, np.ndarray):
            raise UserError(
                f"{self.path}: column {name!r} holds no images; they come as an array in an .npz file"
            )
        if values.dtype != np.uint8 and values.dtype.kind != "f":
            raise UserError(
                f"{self.path}: {name!r} has type {values.dtype}; images are uint8 or floating point"
            )
        values = values if values.dtype == np.uint8 else values.astype(np.float32)
        return values[:, None] if values.ndim == 3 else values

    def _table_column(self, name: str) -> "pd.Series[Any]":
        column = self.columns[name]
        if isinstance(column, np.ndarray):
            raise UserError(f"{self.path}: {name!r} has {column.ndim} dimensions; a column has one")
        return column


def _csv(path: Path, wanted: Sequence[str]) -> Columns:
    import pandas as pd

    frame = pd.read_csv(path, dtype=str, keep_default_na=False, usecols=lambda name: name in wanted)
    return {str(name): frame[name] for name in frame.columns}


def _parquet(path: Path, wanted: Sequence[str]) -> Columns:
    import pandas as pd
    import pyarrow.parquet

    present = [name for name in wanted if name in pyarrow.parquet.read_schema(path).names]
    frame = pd.read_parquet(path, columns=present)
    return {name: frame[name] for name in present}


def _npz(path: Path, wanted: Sequence[str]) -> Columns:
    import pandas as pd

    archive = np.load(path, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it holds a single array without a name")
    with archive:
        arrays = {name: archive[name] for name in wanted if name in archive}
    return {name: pd.Series(values) if values.ndim == 1 else values for name, values in arrays.items()}


_READERS: Mapping[str, Callable[[Path, Sequence[str]], Columns]] = {
    ".csv": _csv,
    ".parquet": _parquet,
    ".npz": _npz,
}
