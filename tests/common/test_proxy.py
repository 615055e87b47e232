"""The proxy's digest sees every difference, and its file is read as hostile input."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from common.preprocessing import CategoricalSpec, FeatureSpec, NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records

AGE = NumericSpec(name="age")
WARD = CategoricalSpec(name="ward", categories=("medical", "surgical"))
RECORDS = Records(
    columns={"age": np.asarray([30.0, 50.0, 70.0]), "ward": np.asarray(["medical", "surgical", "medical"])},
    target=np.asarray(["no", "yes", ""]),
    patients=None,
    groups={},
)


def proxy_of(
    records: Records = RECORDS,
    specs: tuple[FeatureSpec, ...] = (AGE, WARD),
    classes: tuple[str, ...] = ("no", "yes"),
) -> Proxy:
    preprocessing = Preprocessing.fit(records, specs, classes)
    cases = preprocessing.encode(records)
    return Proxy(preprocessing, cases.x, cases.y)


PROXY = proxy_of()


def with_columns(**columns: list[object]) -> Records:
    arrays = {name: np.asarray(values) for name, values in columns.items()}
    return Records({**RECORDS.columns, **arrays}, RECORDS.target, None, {})


OTHERS = {
    "a value": proxy_of(with_columns(age=[30.0, 50.0, 71.0])),
    "the order of cases": Proxy(PROXY.preprocessing, PROXY.x[::-1], PROXY.y[::-1]),
    "one case fewer": Proxy(PROXY.preprocessing, PROXY.x[:2], PROXY.y[:2]),
    "the feature order": proxy_of(specs=(WARD, AGE)),
    "a feature's name": proxy_of(with_columns(years=[30.0, 50.0, 70.0]), (NumericSpec(name="years"), WARD)),
    "the order of categories": proxy_of(
        specs=(AGE, CategoricalSpec(name="ward", categories=("surgical", "medical")))
    ),
    "a category's name": proxy_of(
        with_columns(ward=["inner", "surgical", "inner"]),
        (AGE, CategoricalSpec(name="ward", categories=("inner", "surgical"))),
    ),
    "the class order": Proxy(
        Preprocessing.model_validate({**PROXY.preprocessing.model_dump(), "classes": ("yes", "no")}),
        PROXY.x,
        PROXY.y,
    ),
    "the scaling": Proxy(proxy_of(with_columns(age=[300.0, 500.0, 700.0])).preprocessing, PROXY.x, PROXY.y),
    "the limit": Proxy(
        Preprocessing.model_validate({**PROXY.preprocessing.model_dump(), "limit": 6.0}), PROXY.x, PROXY.y
    ),
    "a label": Proxy(PROXY.preprocessing, PROXY.x, np.asarray([0, 1, 1])),
}


@pytest.mark.parametrize("change", OTHERS)
def test_the_digest_changes_with(change: str) -> None:
    assert OTHERS[change].digest != PROXY.digest
    assert len({proxy.digest for proxy in OTHERS.values()}) == len(OTHERS)


def test_the_digest_is_that_of_equal_content_in_any_process() -> None:
    assert proxy_of().digest == PROXY.digest and len(PROXY.digest) == 32
    assert Proxy.from_bytes(PROXY.to_bytes()).digest == PROXY.digest
    script = (
        "import sys; from common.proxy import Proxy; "
        "print(Proxy.from_bytes(sys.stdin.buffer.read()).digest.hex())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script], input=PROXY.to_bytes(), capture_output=True, check=True
    )
    assert other.stdout.decode().strip() == PROXY.digest.hex()


def test_reading_a_proxy_needs_no_torch() -> None:
    script = "import sys; import common.proxy; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_arrays_are_frozen() -> None:
    with pytest.raises(ValueError, match="read-only"):
        PROXY.x[0] = 1


def test_file_round_trip(tmp_path: Path) -> None:
    PROXY.save(tmp_path / "proxy.safetensors")
    again = Proxy.load(tmp_path / "proxy.safetensors")
    np.testing.assert_array_equal(again.x, PROXY.x)
    np.testing.assert_array_equal(again.y, PROXY.y)
    assert again.preprocessing == PROXY.preprocessing and again.to_bytes() == PROXY.to_bytes()
    with pytest.raises(ValueError, match="at most 100"):
        Proxy.load(tmp_path / "proxy.safetensors", max_bytes=100)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        (PROXY.x.astype(np.float64), PROXY.y),
        (PROXY.x, PROXY.y.astype(np.int32)),
        (PROXY.x[:, :2], PROXY.y),
        (PROXY.x[:2], PROXY.y),
        (PROXY.x[:0], PROXY.y[:0]),
        (np.where(PROXY.x == 0, np.float32("nan"), PROXY.x), PROXY.y),
        (PROXY.x, PROXY.y + 1),
        (PROXY.x, PROXY.y - 1),
    ],
)
def test_arrays_that_fit_nothing_are_refused(x: np.ndarray, y: np.ndarray) -> None:
    with pytest.raises(ValueError, match="proxy"):
        Proxy(PROXY.preprocessing, x, y)


def hostile(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


GOOD_METADATA = {"preprocessing": PROXY.preprocessing.to_json()}
X = {"dtype": "F32", "shape": [3, 3], "data_offsets": [0, 36]}
Y = {"dtype": "I64", "shape": [3], "data_offsets": [36, 60]}

HOSTILE = {
    "nothing": b"",
    "a stub": b"\x00\x00",
    "a huge header": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": hostile(b"\xff\xfe"),
    "deep JSON": hostile(b"[" * 200_000),
    "a list": hostile([]),
    "no metadata": hostile({"x": X, "y": Y}, bytes(60)),
    "one tensor too many": hostile({"__metadata__": GOOD_METADATA, "x": X, "y": Y, "z": Y}, bytes(60)),
    "other types": save({"x": np.zeros((3, 3)), "y": np.zeros(3, np.int64)}, metadata=GOOD_METADATA),
    "a shape beyond the data": hostile(
        {"__metadata__": GOOD_METADATA, "x": {**X, "shape": [2**40, 3]}, "y": Y}, bytes(60)
    ),
    "offsets beyond the data": hostile(
        {"__metadata__": GOOD_METADATA, "x": {**X, "data_offsets": [0, 2**60]}, "y": Y}, bytes(60)
    ),
    "negative offsets": hostile(
        {"__metadata__": GOOD_METADATA, "x": {**X, "data_offsets": [-36, 0]}, "y": Y}, bytes(60)
    ),
    "a string for a tensor": hostile({"__metadata__": GOOD_METADATA, "x": "x", "y": Y}, bytes(60)),
    "preprocessing that isn't": save({"x": PROXY.x, "y": PROXY.y}, metadata={"preprocessing": "{}"}),
    "deep preprocessing": save({"x": PROXY.x, "y": PROXY.y}, metadata={"preprocessing": "[" * 100_000}),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_bytes_are_a_value_error(case: str) -> None:
    with pytest.raises(ValueError):
        Proxy.from_bytes(HOSTILE[case])


@given(st.binary(max_size=300))
def test_random_bytes_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Proxy.from_bytes(data)


@given(st.data())
def test_a_damaged_file_is_refused_or_is_another_proxy(data: st.DataObject) -> None:
    whole = bytearray(PROXY.to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        proxy = Proxy.from_bytes(cut)
    except ValueError:
        return
    assert proxy.digest == PROXY.digest or proxy.to_bytes() != PROXY.to_bytes()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {
            "__metadata__": json_values | st.just(GOOD_METADATA),
            "x": json_values | st.just(X),
            "y": json_values | st.just(Y),
        }
    ),
    st.binary(max_size=80),
)
def test_a_header_of_any_json_is_a_value_error_or_a_proxy(header: dict[str, object], body: bytes) -> None:
    try:
        Proxy.from_bytes(hostile(header, body))
    except ValueError:
        return
