"""One patient's broken text changes nothing about the others' texts."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.private_data import described_records
from common.architectures import Architecture
from common.distillation import outline_learner
from common.preprocessing import Preprocessing, Text
from common.proxy import Proxy
from common.records import Records

DESCRIPTION = """
target = "ill"
classes = ["no", "yes"]

[[features]]
name = "note"
kind = "text"
length = 30
vocabulary = 256

[sites.north]
declared-size = 20
file = "notes{suffix}"
"""
GOOD = [("no", "No pain at rest."), ("yes", "Chest pain; dyspnoea on exertion, ST elevation"), ("no", "")]
NASTY = [
    "",
    "NA",
    "\0",
    "x" * 300_000,
    "pain " * 40_000,
    "﷽" * 1000,
    '"',
    "“",
    "\u202e\ufeff",
    "a\u0301" * 99,
    "👩‍⚕️",
]
MANY = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def proxy() -> Proxy:
    texts = np.array(["chest pain", "no pain", "no dyspnoea"], dtype=object)
    public = Records({"note": texts}, np.array(["yes", "no", "no"]), None, {})
    preprocessing = Preprocessing.fit(public, [Text(name="note", length=30, vocabulary=256)], ("no", "yes"))
    cases = preprocessing.encode(public)
    return Proxy(preprocessing, cases.x, cases.y)


PROXY = proxy()
LEARNER = outline_learner(Architecture("text", layers="all"), PROXY, ())


def contributed(folder: Path, suffix: str) -> Counter[bytes]:
    """What each record brings into a lesson, as the student sees it."""
    (folder / "data.toml").write_text(DESCRIPTION.replace("{suffix}", suffix))
    records = described_records(str(folder / "data.toml"), "north")
    units = records.for_private_step(PROXY, LEARNER, "record")
    return Counter(x.tobytes() + bytes([y]) for x, y in zip(units.phi_ND.numpy(), units.y_N, strict=True))


def assert_only_one_more(before: Counter[bytes], after: Counter[bytes]) -> None:
    assert before.total() == len(GOOD) and before <= after
    assert after.total() <= before.total() + 1


@MANY
@given(
    line=st.binary(max_size=60)
    | st.sampled_from([f"no,{note}".encode() for note in NASTY] + [b"no,\xff", b'no,"two', b"no", b"no,a,b"]),
    at=st.integers(0, len(GOOD)),
)
def test_any_line_added_to_a_csv_file_leaves_the_other_texts_as_they_are(tmp_path, line, at):
    def written(lines: list[bytes]) -> Counter[bytes]:
        (tmp_path / "notes.csv").write_bytes(b"\n".join([b"ill,note", *lines]) + b"\n")
        return contributed(tmp_path, ".csv")

    good = [f'{ill},"{note}"'.encode() for ill, note in GOOD]
    assert_only_one_more(written(good), written([*good[:at], line, *good[at:]]))


@MANY
@given(
    note=st.none() | st.text(max_size=60).map(str.encode) | st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80"]),
    nasty=st.none() | st.sampled_from(NASTY),
    at=st.integers(0, len(GOOD)),
)
def test_any_row_added_to_a_parquet_file_leaves_the_other_texts_as_they_are(tmp_path, note, nasty, at):
    def written(rows: list[tuple[str, bytes | None]]) -> Counter[bytes]:
        ill, notes = zip(*rows, strict=True)
        raw = pyarrow.array(notes, pyarrow.large_binary()).view(pyarrow.large_string())
        pyarrow.parquet.write_table(pyarrow.table({"ill": ill, "note": raw}), tmp_path / "notes.parquet")
        return contributed(tmp_path, ".parquet")

    good = [(ill, text.encode()) for ill, text in GOOD]
    added = note if nasty is None else nasty.encode()
    assert_only_one_more(written(good), written([*good[:at], ("no", added), *good[at:]]))


def test_a_text_of_any_length_is_read_by_itself(tmp_path):
    """In one array of NumPy's text, the longest cell would set the size of all."""
    lines = ["no,short"] * 2000 + ["no," + "word " * 20_000]
    (tmp_path / "notes.csv").write_text("\n".join(["ill,note", *lines]))
    assert sorted(contributed(tmp_path, ".csv").values()) == [1, 2000]


@pytest.mark.parametrize("broken", [np.float32(256), np.float32(-1), np.float32(1.5)])
def test_a_proxy_with_ids_that_are_none_is_refused(broken):
    x = PROXY.x.copy()
    x[0, 0, 0] = broken
    sent = Proxy(PROXY.preprocessing, PROXY.x, PROXY.y).to_bytes().replace(PROXY.x.tobytes(), x.tobytes())
    with pytest.raises(ValueError, match="texts of other ids than its vocabulary's"):
        Proxy.from_bytes(sent)
