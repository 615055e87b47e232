"""The form in which tables ship with the project: column-wise JSON, since Flower's app bundle carries no CSV.

`{"title", "source", "licence", "columns": {name: [1, null, 2.5, …]}}` for numbers; `{"names": [...], "codes":
"01.2…"}` for names: one base-36 digit a row that points into `names`, with `.` for missing; `{"lines": "…"}`
for texts: one a line, compressed by LZMA and in base 85, since the bundle goes to every site.
"""

import json
import lzma
from base64 import b85decode
from pathlib import Path
from typing import Any

import numpy as np

from common.records import AnyArray


def read_table(path: Path) -> dict[str, AnyArray]:
    """Return the columns: (N,) float64 with NaN for missing, (N,) str with "" for missing, or texts."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {name: _decoded(column) for name, column in tree["columns"].items()}


def _decoded(column: Any) -> AnyArray:
    if isinstance(column, list):
        return np.asarray(column, dtype=np.float64)  # null becomes NaN
    if "lines" in column:
        return np.array(lzma.decompress(b85decode(column["lines"])).decode().split("\n"), dtype=object)
    names = np.asarray([*column["names"], ""])
    return names[[-1 if code == "." else int(code, 36) for code in column["codes"]]]
