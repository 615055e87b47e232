"""The site's log names lines and counts, runs and rounds, and never a value of a patient's."""

import contextlib
import dataclasses
import io
import json
import logging
import re
import struct
import zipfile

import pytest

from common.logs import FIELDS, log_to_stderr
from common.messages import Offer, Release, Rule, decode_answer

HEADER = "patient,ill,age,pressure,sugar\n"
MARK = "PRI" + "VATE"  # no source line of this test has it, and tracebacks show source lines
AGE = 4711.08125
pytestmark = pytest.mark.usefixtures("loggers_as_before")


def csv(*more: str) -> bytes:
    rows = [f"{MARK}-{n},{'yes' if n % 3 else 'no'},{AGE + n},{n}.5,{n % 7}.25" for n in range(60)]
    return (HEADER + "\n".join([*rows, *more]) + "\n").encode()


def npz_with_a_broken_header() -> bytes:
    """An archive whose array says what it is in words that NumPy's complaint would quote."""
    words = f"{MARK}: a table of patients".encode().ljust(64)
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(words)) + words
    with contextlib.closing(io.BytesIO()) as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("age.npy", array)
        return file.getvalue()


FILES = {
    "sound": (".csv", csv()),
    "a label that is none, cells that can't be read": (".csv", csv(f"p,{MARK},1,2,3", f"p,yes,{MARK},2,3")),
    "lines that are no records": (".csv", csv(f"{MARK},yes,1", f'"{MARK},yes,1,2,3')),
    "not UTF-8": (".csv", csv() + MARK.encode("utf-16")),
    "another file than it says": (".parquet", csv()),
    "a header that is none": (".npz", npz_with_a_broken_header()),
    "nothing but text": (".npz", csv()),
}


def assert_no_private_value(shown: str) -> None:
    assert shown
    for line in shown.splitlines():
        assert MARK not in line and not re.search(r"47\d\d\.08", line), line


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("kind", FILES)
def test_no_line_of_the_log_holds_a_private_value(hospital, capsys, kind, form):
    ending, content = FILES[kind]
    (hospital.folder / f"patients{ending}").write_bytes(content)
    description = hospital.folder / "data.toml"
    description.write_text(description.read_text().replace("patients.csv", f"patients{ending}"))
    log_to_stderr(form, site="north", quote=False)
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert isinstance(decode_answer(site.custodian.learn(hospital.task().encode())), Release)
        logging.getLogger("grandrounds.custodian").info("the lesson is over")
    assert_no_private_value(capsys.readouterr().err)


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_in_a_lesson_is_told_without_its_text(hospital, capsys, form):
    def open_records():
        raise ValueError(f"could not convert {MARK} to float: {AGE}")

    log_to_stderr(form, site="north", quote=False)
    with hospital.open() as site:
        custodian = dataclasses.replace(site.custodian, open_records=open_records)
        custodian.accept_proxy(hospital.proxy.to_bytes())
        assert isinstance(decode_answer(custodian.learn(hospital.task().encode())), Release)
    shown = capsys.readouterr().err
    assert "the lesson failed" in shown and "ValueError" in shown and "test_site_log.py" in shown
    assert_no_private_value(shown)


@pytest.mark.slow
def test_a_served_site_logs_json_with_run_round_and_site(hospital):
    (hospital.folder / "patients.csv").write_bytes(csv(f"p,yes,{MARK},2,3", f"{MARK},yes,1"))
    hospital.amend({"rounds = 200": "rounds = 3"})
    with hospital.served("--log-format", "json") as served:
        connection = hospital.connect()
        connection.offer(Offer(hospital.proxy.digest).encode())
        connection.accept_proxy(hospital.proxy.to_bytes())
        assert isinstance(decode_answer(connection.learn(hospital.task(2).encode())), Release)
        refused = hospital.task(2, hospital.plan(rounds=50))
        assert decode_answer(connection.learn(refused.encode())).rule is Rule.NOT_ALLOWED
    lines = [json.loads(line) for line in served.log.splitlines()]
    assert all(tuple(line) == FIELDS and line["site"] == "north" for line in lines)
    subjects = {line["message"].split(":")[0]: (line["run"], line["round"]) for line in lines}
    assert subjects["a release leaves"] == ("study-1", 2)
    assert subjects["study study-1 round 2 refused"] == ("study-1", 2)
    assert any("line" in line["message"] and line["level"] == "WARNING" for line in lines)
    assert_no_private_value(served.log)


def test_a_form_that_there_is_none_of_is_refused_at_the_door(hospital):
    done = hospital.run("serve", "--log-format", "xml")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "grandrounds: command line: --log-format = 'xml' is refused: expected text or json"
    )
