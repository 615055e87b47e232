"""The proxy: public cases that everyone may see, and the digest by which both sides know they see the same.

A logit is an opinion about one row of `x`, so a site that holds other rows, another feature order or another
order of classes would answer another question without noticing. The digest covers all of it: values, labels,
and the preprocessing, which fixes feature order, categories, scaling and class order.

On disk and on the wire a proxy is a safetensors file (two arrays) with the preprocessing as JSON in its
header: no pickle, and `Proxy.from_bytes` treats it as hostile.

Shape legend: N cases.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from common.preprocessing import Preprocessing
from common.records import Float32s, Ints

MAX_BYTES = 256 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
_DTYPES = {"x": "F32", "y": "I64"}


@dataclass(frozen=True, eq=False)
class Proxy:
    """Public cases with whatever labels are public.

    Attributes:
        preprocessing: How records become cases.
        x: (N, *case_shape) float32, finite; read-only.
        y: (N,) int64 class numbers; -1 is unlabelled; read-only.
    """

    preprocessing: Preprocessing
    x: Float32s
    y: Ints

    def __post_init__(self) -> None:
        """Refuse arrays that don't fit one another (ValueError), and freeze them: no digest may go stale."""
        case_shape = self.preprocessing.case_shape
        if self.x.dtype != np.float32 or self.y.dtype != np.int64:
            raise ValueError(f"a proxy has float32 x and int64 y, not {self.x.dtype} and {self.y.dtype}")
        if self.y.ndim != 1 or len(self.y) == 0 or self.x.shape != (len(self.y), *case_shape):
            raise ValueError(
                f"the proxy's cases have shape {self.x.shape}, its labels {self.y.shape}; "
                f"its preprocessing makes cases of shape {case_shape}"
            )
        if not np.isfinite(self.x).all():
            raise ValueError("the proxy has a value that isn't finite")
        if not self.preprocessing.fits(self.x):
            raise ValueError("the proxy has texts of other ids than its vocabulary's")
        if self.y.min() < -1 or self.y.max() >= len(self.preprocessing.classes):
            raise ValueError("the proxy has a label that is no class")
        for name in ("x", "y"):
            frozen = np.ascontiguousarray(getattr(self, name)).view()
            frozen.flags.writeable = False
            object.__setattr__(self, name, frozen)

    def __len__(self) -> int:
        """Return the number of cases."""
        return len(self.y)

    @cached_property
    def digest(self) -> bytes:
        """sha256 over values, labels, feature order, categories, scaling and class order (32 bytes)."""
        preprocessing = self.preprocessing.to_json().encode()
        shape = json.dumps(self.x.shape).encode()
        hashed = hashlib.sha256(b"grandrounds proxy 1")
        for part in (preprocessing, shape, self.x.astype("<f4").tobytes(), self.y.astype("<i8").tobytes()):
            hashed.update(len(part).to_bytes(8, "little"))  # so that no two lists of parts read the same
            hashed.update(part)
        return hashed.digest()

    def to_bytes(self) -> bytes:
        """Return the proxy as a safetensors file; the same proxy gives the same bytes."""
        return save({"x": self.x, "y": self.y}, metadata={"preprocessing": self.preprocessing.to_json()})

    @classmethod
    def from_bytes(cls, data: bytes, max_bytes: int = MAX_BYTES) -> "Proxy":
        """Read what `to_bytes` wrote, trusting nothing.

        Args:
            data: The file's bytes.
            max_bytes: Longest file that is looked at.

        Raises:
            ValueError: for anything but a whole, consistent proxy.
        """
        if len(data) > max_bytes:
            raise ValueError(f"the proxy file has {len(data)} bytes; at most {max_bytes} are read")
        preprocessing = _preprocessing_in_header(data)
        try:
            arrays = load(data)
        except SafetensorError as error:
            raise ValueError(f"the proxy file is damaged: {error}") from None
        return cls(preprocessing, x=arrays["x"], y=arrays["y"])

    def save(self, path: Path) -> None:
        """Write the proxy file."""
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path, max_bytes: int = MAX_BYTES) -> "Proxy":
        """Read a proxy file.

        Raises:
            ValueError: as `from_bytes`; OSError if the file can't be read.
        """
        with path.open("rb") as file:
            return cls.from_bytes(file.read(max_bytes + 1), max_bytes)


def _preprocessing_in_header(data: bytes) -> Preprocessing:
    """Check the safetensors header (8 bytes of length, then JSON) before its arrays are touched."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(len(data) - 8, MAX_HEADER_BYTES):
        raise ValueError("the proxy file is damaged: its header is cut short or too long")
    try:
        header = json.loads(data[8 : 8 + length])
    except RecursionError:
        raise ValueError("the proxy file's header is nested too deeply") from None
    if not isinstance(header, dict) or header.keys() != {"__metadata__", *_DTYPES}:
        raise ValueError("the proxy file doesn't hold exactly x, y and the preprocessing")
    for name, dtype in _DTYPES.items():
        if not isinstance(header[name], dict) or header[name].get("dtype") != dtype:
            raise ValueError(f"the proxy file's {name} isn't {dtype}")
    metadata = header["__metadata__"]
    if not isinstance(metadata, dict) or not isinstance(metadata.get("preprocessing"), str):
        raise ValueError("the proxy file has no preprocessing")
    return Preprocessing.from_json(metadata["preprocessing"])
