"""One patient's broken record changes nothing about the others: who is learned from, with which values."""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.noise import PrivateRandomness
from client.private_data import described_records
from common.architectures import Architecture
from common.distillation import build_learner
from common.errors import UserError
from common.preprocessing import CategoricalSpec, NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records

DESCRIPTION = """
target = "ill"
classes = ["no", "yes"]
patient = "patient"

[[features]]
name = "age"
kind = "numeric"
missing-flag = true

[[features]]
name = "count"
kind = "numeric"
transform = "log"

[[features]]
name = "ward"
kind = "categorical"
categories = ["medical", "surgical"]
other-column = true

[groups.age]
edges = [50]

[sites.north]
declared-size = 20
file = "patients{suffix}"
"""
HEADER = ("patient", "ill", "age", "count", "ward")
GOOD = [
    ("p1", "no", "61.25", "9007199254740993", "medical"),
    ("p2", "yes", "40", "2", "surgical"),
    ("p2", "yes", "41", "", "surgical"),
    ("p4", "no", "", "7", "other"),
    ("p5", "yes", "1e3", "-3", "medical"),
]
NASTY = [
    "",
    "seventy",
    "nan",
    "inf",
    "-Infinity",
    "1e999",
    "1" * 500,
    "18446744073709551616",
    "-9223372036854775809",
    "1_000",
    "x" * 200_000,
    '"',
    'a"b',
    '"a,b"',
    '"two\nlines"',
    "2026-11-24",
    "٣",
    "\0",
    "True",
    "one,two",
    "\x1c",
    "=1+1",
]
LINES = st.one_of(
    st.lists(st.sampled_from(NASTY), min_size=5, max_size=5).map(",".join).map(str.encode),
    st.tuples(st.just("p9"), *[st.sampled_from(["no", "1", *NASTY])] * 4).map(",".join).map(str.encode),
    st.binary(max_size=80),
    st.sampled_from(
        [b"", b" ", b"p9", b"," * 4, b"," * 40, b"\xff\xfe,no,1,2,medical", b'p9,no,1,2,"medical']
    ),
)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def proxy() -> Proxy:
    rng = np.random.default_rng(0)
    public = Records(
        {
            "age": rng.normal(50, 20, 30),
            "count": rng.uniform(1, 9, 30),
            "ward": rng.choice(["medical", "surgical"], 30),
        },
        rng.choice(["no", "yes"], 30),
        None,
        {},
    )
    specs = [
        NumericSpec(name="age", missing_flag=True),
        NumericSpec(name="count", transform="log"),
        CategoricalSpec(name="ward", categories=("medical", "surgical"), other_column=True),
    ]
    preprocessing = Preprocessing.fit(public, specs, ("no", "yes"))
    cases = preprocessing.encode(public)
    return Proxy(preprocessing, cases.x, cases.y)


PROXY = proxy()
LEARNER = build_learner(Architecture("linear", "none", 0), PROXY, 0, ())


def describe(folder: Path, suffix: str) -> str:
    (folder / "data.toml").write_text(DESCRIPTION.replace("{suffix}", suffix))
    return str(folder / "data.toml")


def contributed(description: str, unit: str) -> Counter[bytes]:
    """What each unit brings into a lesson: all its records, as the student sees them."""
    units = described_records(description, "north").for_private_step(PROXY, LEARNER, unit)
    seen_ND = torch.cat([units.phi_ND, units.y_N[:, None]], dim=1).numpy()
    return Counter(
        seen_ND[units.order_N[start : start + count]].tobytes()
        for start, count in zip(units.start_U, units.count_U, strict=True)
    )


def assert_only_one_more(before: Counter[bytes], after: Counter[bytes]) -> None:
    assert before <= after
    assert after.total() <= before.total() + 1


def csv_file(folder: Path, lines: list[bytes]) -> str:
    text = [",".join(HEADER).encode(), *lines]
    (folder / "patients.csv").write_bytes(b"\n".join(text) + b"\n")
    return describe(folder, ".csv")


@MANY
@given(line=LINES, at=st.integers(0, len(GOOD)), unit=st.sampled_from(["patient", "record"]))
def test_any_line_added_to_a_csv_file_leaves_the_other_records_as_they_are(tmp_path, line, at, unit):
    good = [",".join(row).encode() for row in GOOD]
    before = contributed(csv_file(tmp_path, good), unit)
    after = contributed(csv_file(tmp_path, [*good[:at], line.replace(b"p2", b"p9"), *good[at:]]), unit)
    assert before.total() == (len({row[0] for row in GOOD}) if unit == "patient" else len(GOOD))
    # A cell or line that breaks into several lines is as many records of nobody else.
    assert before <= after and after.total() <= before.total() + 1 + line.count(b"\n") + line.count(b"\r")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize(
    "stray", [b"\n", b"\r", b"\r\n", b'p9,no,50,1,"a\nb"', b"\np9,no,50,1,a", b"p9,no\r,50,1,a"]
)
@pytest.mark.parametrize("at", [0, 2, len(GOOD)])
def test_no_records_end_of_line_decides_how_others_are_parted(tmp_path, end, stray, at):
    description = csv_file(tmp_path, good := [",".join(row).encode() for row in GOOD])
    header = ",".join(HEADER).encode()
    (tmp_path / "patients.csv").write_bytes(end.join([header, *good, b""]))
    before = contributed(description, "record")
    assert before.total() == len(GOOD)
    (tmp_path / "patients.csv").write_bytes(end.join([header, *good[:at], stray, *good[at:], b""]))
    assert_only_one_more(before, contributed(description, "record"))


CELLS = {
    "patient": st.sampled_from([None, "", "p9", "x" * 100_000, "\ud800"]),
    "ill": st.sampled_from([None, "no", "perhaps"]),
    "age": st.floats(allow_nan=True, allow_infinity=True) | st.none(),
    "count": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "ward": st.text(max_size=5) | st.sampled_from([None, "x" * 1000, "\ud800"]),
}
TYPES = {
    "patient": pyarrow.large_binary(),
    "ill": pyarrow.string(),
    "age": pyarrow.float64(),
    "count": pyarrow.int64(),
    "ward": pyarrow.large_binary(),
}


def typed(row: tuple[str, ...]) -> dict[str, object]:
    cells: dict[str, object] = dict(zip(HEADER, row, strict=True))
    cells["age"] = float(row[2]) if row[2] else None
    cells["count"] = int(row[3]) if row[3] else None
    return cells


def parquet_file(folder: Path, rows: list[dict[str, object]]) -> str:
    columns = {}
    for name, kind in TYPES.items():
        values = [row[name] for row in rows]
        if kind == pyarrow.large_binary():  # text as it comes, well-formed or not
            raw = [
                value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
                for value in values
            ]
            columns[name] = pyarrow.array(raw, kind).view(pyarrow.large_string())
        else:
            columns[name] = pyarrow.array(values, kind)
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "patients.parquet")
    return describe(folder, ".parquet")


@MANY
@given(
    row=st.fixed_dictionaries(CELLS),
    at=st.integers(0, len(GOOD)),
    unit=st.sampled_from(["patient", "record"]),
)
def test_any_row_added_to_a_parquet_file_leaves_the_other_records_as_they_are(tmp_path, row, at, unit):
    good = [typed(one) for one in GOOD]
    before = contributed(parquet_file(tmp_path, good), unit)
    after = contributed(parquet_file(tmp_path, [*good[:at], row, *good[at:]]), unit)
    assert_only_one_more(before, after)


def npz_file(folder: Path, rows: list[tuple[object, ...]]) -> str:
    # NumPy gives a whole array the type of its widest cell: a word makes text of all numbers.
    columns = {
        name: np.array(list(values)) for name, values in zip(HEADER, zip(*rows, strict=True), strict=True)
    }
    np.savez(folder / "patients.npz", **columns)
    return describe(folder, ".npz")


@MANY
@given(
    row=st.tuples(
        st.sampled_from(["", "p9", "\ud800", "x" * 1000]),
        st.sampled_from(["", "no", "perhaps"]),
        st.floats() | st.sampled_from(["seventy", ""]),
        st.floats() | st.sampled_from(["seven", ""]),
        st.text(max_size=5),
    ),
    unit=st.sampled_from(["patient", "record"]),
)
def test_any_row_added_to_an_npz_file_leaves_the_other_records_as_they_are(tmp_path, row, unit):
    good = [
        (patient, ill, float(age or "nan"), float(count or "nan"), ward)
        for patient, ill, age, count, ward in GOOD
    ]
    before = contributed(npz_file(tmp_path, good), unit)
    assert_only_one_more(before, contributed(npz_file(tmp_path, [*good, row]), unit))


def test_broken_records_are_named_by_line_and_count_and_never_quoted(tmp_path, caplog):
    lines = [
        b"p1,no,61,1,medical",
        b"p2,SECRET,62,2,medical",
        b"p3,no,SECRET,3,medical",
        b"p4,no,64,SECRET",
        b'p5,no,65,5,"SECRET',
        b"p6,yes,SECRET,6,medical",
    ]
    description = csv_file(tmp_path, lines)
    records = described_records(description, "north")
    complaints = records.for_schema_check([])
    assert [one.partition("patients.csv: ")[2].partition(":")[0] for one in complaints] == [
        "line 5 and 1 more",
        "column 'age', line 4 and 1 more",
        "column 'ill', line 3",
        "column 'age', line 4 and 1 more",  # as a group
    ]
    with caplog.at_level(logging.WARNING, "grandrounds.custodian"):
        counts = records.for_label_histogram(PROXY, "record", 50.0, PrivateRandomness())
    assert counts == (2, 1)
    assert all(one in caplog.text for one in complaints)
    assert "SECRET" not in caplog.text + " ".join(complaints)


def test_a_file_with_nothing_but_broken_records_has_no_records(tmp_path):
    assert contributed(csv_file(tmp_path, [b"p1", b"\xff"]), "patient") == Counter()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"patient,ill,age,count\n", "no column 'ward'"), (b"", "names no columns"), (b"\xff\xfe\n", "UTF-8")],
)
def test_faults_of_the_whole_file_are_still_errors(tmp_path, content, expected):
    description = describe(tmp_path, ".csv")
    (tmp_path / "patients.csv").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        contributed(description, "patient")
