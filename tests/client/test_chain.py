"""The chain under hands that edit, older copies and disks that fill; seen through the ledger."""

import contextlib
import hashlib
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from client.ledger import Budget, Ledger, LedgerError
from common.accounting import GaussianSteps
from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(32))
STEP = GaussianSteps(20.0, 1.0, 1)
PLAN = (GaussianSteps(20.0, 1.0, 20),)
BUDGET = Budget(delta=1e-5, lifetime_epsilon=3.0, study_epsilon=2.0, run_epsilon=1.0, attempts=3)


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def reserve(ledger: Ledger) -> None:
    ledger.reserve("study-1", digest("study-1"), b"{}", PLAN, BUDGET)


def charge(ledger: Ledger, round_number: int) -> None:
    ledger.charge("study-1", round_number, digest("study-1", round_number), (STEP,), BUDGET)


def commit(ledger: Ledger, round_number: int) -> None:
    release, state = b"release %d" % round_number, b"state %d" % round_number
    task = digest("study-1", round_number)
    ledger.commit("study-1", round_number, task, release=release, student_state=state)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


# ---- Hands that edit ----


@pytest.fixture
def used(path: Path, tmp_path: Path) -> Path:
    """A closed ledger with some history and an anchor."""
    with Ledger.create(path, KEY, "source-1", anchor=tmp_path / "anchor") as ledger:
        reserve(ledger)
        for round_number in (1, 2):
            charge(ledger, round_number)
            commit(ledger, round_number)
    return path


def tamper(path: Path, *statements: str) -> None:
    """Edit as one who owns the file would: triggers off, statements, the same triggers on again."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        triggers = database.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            database.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert database.execute(statement).rowcount
        for _, sql in triggers:
            database.execute(sql)
        database.commit()


def fault(path: Path, key: bytes = KEY, anchor: Path | None = None) -> str:
    with pytest.raises(LedgerError) as raised, Ledger.open(path, key, anchor):
        pass
    assert str(path) in str(raised.value)
    assert raised.value.fault in str(raised.value)
    return raised.value.fault


@pytest.mark.parametrize(
    "edit",
    [
        "SET body = CAST(replace(CAST(body AS TEXT), '20.0', '99.0') AS BLOB) WHERE number = 2",
        "SET body = CAST(replace(CAST(body AS TEXT), 'source-1', 'source-2') AS BLOB) WHERE number = 1",
        "SET body = CAST(body AS TEXT) WHERE number = 3",
        "SET body = zeroblob(0) WHERE number = 6",
        "SET body = (SELECT body FROM entries WHERE number = 3) WHERE number = 5",
        "SET head = zeroblob(32) WHERE number = 3",
        "SET head = 'text' WHERE number = 6",
    ],
)
def test_an_edit_is_noticed(used: Path, edit: str) -> None:
    tamper(used, f"UPDATE entries {edit}")
    assert fault(used) == "edited"


def test_a_renumbered_an_invented_and_a_doubled_entry_are_noticed(used: Path) -> None:
    whole = used.read_bytes()
    for edit in (
        "UPDATE entries SET number = 9 WHERE number = 6",
        "INSERT INTO entries SELECT 7, body, zeroblob(32) FROM entries WHERE number = 3",
        "INSERT INTO entries SELECT -1, body, zeroblob(32) FROM entries WHERE number = 1",
        "UPDATE sqlite_sequence SET seq = 9",
    ):
        used.write_bytes(whole)
        tamper(used, edit)
        assert fault(used) in ("edited", "truncated")


def test_an_entry_of_one_ledger_is_none_of_anothers(used: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with Ledger.create(other, KEY, "source-1") as ledger:
        reserve(ledger)
        ledger.charge("study-1", 1, digest("study-1", 1), (), BUDGET)  # nothing charged, same place
        commit(ledger, 1)
    with contextlib.closing(sqlite3.connect(other)) as database:
        body, head = database.execute("SELECT body, head FROM entries WHERE number = 3").fetchone()
    tamper(used, f"UPDATE entries SET body = x'{body.hex()}', head = x'{head.hex()}' WHERE number = 3")
    assert fault(used) == "edited"


@pytest.mark.parametrize("where", ["number = 3", "number >= 5", "number = 6", "number > 1", "number >= 1"])
def test_missing_entries_are_noticed_without_an_anchor(used: Path, where: str) -> None:
    tamper(used, f"DELETE FROM entries WHERE {where}")
    assert fault(used) == "truncated"


def test_a_changed_release_or_state_never_leaves(used: Path) -> None:
    tamper(used, "UPDATE attachments SET content = x'00' WHERE name = 'release' AND entry = 4")
    tamper(used, "DELETE FROM attachments WHERE name = 'state'")
    with Ledger.open(used, KEY) as ledger:
        with pytest.raises(LedgerError, match="the release of entry 4 was changed"):
            ledger.committed("study-1", 1, digest("study-1", 1))
        with pytest.raises(LedgerError, match="state of entry 6 is missing"):
            ledger.student_state("study-1")
        assert ledger.committed("study-1", 2, digest("study-1", 2)) == b"release 2"
        verdict = ledger.verify()
    assert "release of entry 4 was changed" in verdict.findings[0]
    assert verdict.guarantee == "No guarantee can be given before this is explained."


def test_the_file_itself_resists_absent_minded_edits(used: Path) -> None:
    with contextlib.closing(sqlite3.connect(used)) as database:
        for statement in (
            "DELETE FROM entries",
            "UPDATE entries SET head = 1",
            "UPDATE attachments SET content = 1",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="stays"):
                database.execute(statement)


def test_other_tables_are_noticed(used: Path) -> None:
    with contextlib.closing(sqlite3.connect(used)) as database:
        database.execute("CREATE TRIGGER sly AFTER INSERT ON entries BEGIN DELETE FROM attachments; END")
        database.commit()
    assert fault(used) == "edited"


@pytest.mark.parametrize("keep", [0, 50, 4096, 6000])
def test_a_cut_off_file_is_noticed(used: Path, keep: int) -> None:
    used.write_bytes(used.read_bytes()[:keep])
    assert fault(used) in ("damaged", "edited", "truncated")


def test_scribbles_are_noticed(used: Path) -> None:
    whole = used.read_bytes()
    rng = random.Random(1)
    for _ in range(40):
        spoiled = bytearray(whole)
        for _ in range(8):
            spoiled[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        used.write_bytes(spoiled)
        try:
            with Ledger.open(used, KEY) as ledger:
                findings = ledger.verify().findings
                # What went unnoticed hit free space, or an attachment, which shows when it is read.
                assert ledger.events() == PLAN or findings
        except LedgerError as error:
            assert error.fault in ("damaged", "edited", "truncated", "wrong-key")


def test_an_older_copy_is_noticed_by_the_anchor(used: Path, tmp_path: Path) -> None:
    shutil.copy(used, tmp_path / "backup")
    with Ledger.open(used, KEY, tmp_path / "anchor") as ledger:
        charge(ledger, 3)
        head = ledger.head
    shutil.copy(tmp_path / "backup", used)
    assert fault(used, anchor=tmp_path / "anchor") == "older-copy"
    # Without the anchor only a head that someone else kept shows it.
    with Ledger.open(used, KEY) as ledger:
        assert not ledger.knows_head(head)
        charge(ledger, 3)
        charge(ledger, 4)
    # Nor does it help to go on until it is longer.
    assert fault(used, anchor=tmp_path / "anchor") == "older-copy"


def test_an_anchor_must_be_there_and_whole(used: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    fields = json.loads(anchor.read_bytes())
    for spoiled in (b"", b"{}", b"null", json.dumps(fields | {"length": 1}).encode()):
        anchor.write_bytes(spoiled)
        assert fault(used, anchor=anchor) == "edited"
    anchor.unlink()
    assert fault(used, anchor=anchor) == "anchor-missing"
    with pytest.raises(LedgerError, match="begun once"):
        Ledger.create(used, KEY, "source-1")


def test_a_ledger_that_could_not_be_begun_can_be_begun_again(path: Path, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"anchor .* can't be written"):
        Ledger.create(path, KEY, "source-1", anchor=tmp_path / "not yet" / "anchor")
    assert list(tmp_path.iterdir()) == []
    Ledger.create(path, KEY, "source-1").close()


def test_an_anchor_that_a_crash_left_behind_catches_up(used: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    before = anchor.read_bytes()
    with Ledger.open(used, KEY, anchor) as ledger:
        charge(ledger, 3)
    after = anchor.read_bytes()
    anchor.write_bytes(before)
    with Ledger.open(used, KEY, anchor):
        assert anchor.read_bytes() == after


def test_what_another_process_wrote_is_anchored_before_it_is_told(used: Path, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    with Ledger.open(used, KEY, anchor) as ledger, Ledger.open(used, KEY) as other:
        before = anchor.read_bytes()
        charge(other, 3)
        commit(other, 3)
        assert anchor.read_bytes() == before  # the other one died before it could write it
        assert ledger.committed("study-1", 3, digest("study-1", 3)) == b"release 3"
        assert json.loads(anchor.read_bytes())["length"] == 8


@pytest.mark.parametrize("how", ["replace", "overwrite", "remove"])
def test_a_swap_under_an_open_ledger_is_noticed(used: Path, tmp_path: Path, how: str) -> None:
    shutil.copy(used, tmp_path / "backup")
    with Ledger.open(used, KEY) as ledger:
        charge(ledger, 3)
        if how == "replace":
            os.replace(tmp_path / "backup", used)
        elif how == "overwrite":
            tamper(used, "DELETE FROM entries WHERE number = 7")
        else:
            used.unlink()
        with pytest.raises(LedgerError, match="while it was open"):
            charge(ledger, 4)
        with pytest.raises(LedgerError, match="while it was open"):
            ledger.committed("study-1", 1, digest("study-1", 1))


def test_a_wrong_key_is_named(used: Path) -> None:
    assert fault(used, key=bytes(32)) == "wrong-key"
    with pytest.raises(UserError, match="16 or more"):
        Ledger.open(used, b"short")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert fault(tmp_path / "none.db") == "missing"
    with pytest.raises(LedgerError, match="can't be created"):
        Ledger.create(tmp_path / "no" / "such" / "folder.db", KEY, "s")


def test_another_kind_of_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database " * 100)
    assert fault(tmp_path / "text") == "damaged"
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as database:
        database.execute("CREATE TABLE entries (number INTEGER)")
    assert fault(tmp_path / "other.db") == "edited"


def test_a_lock_that_is_never_let_go_is_named(used: Path) -> None:
    with Ledger.open(used, KEY, patience=0.1) as ledger, contextlib.closing(sqlite3.connect(used)) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            charge(ledger, 3)
        other.execute("ROLLBACK")
        charge(ledger, 3)


def test_heads_tell_nothing_without_the_key(tmp_path: Path) -> None:
    heads = set()
    for number, key in enumerate((KEY, KEY, bytes(32))):
        with Ledger.create(tmp_path / f"{number}.db", key, "source-1") as ledger:
            heads.add(ledger.head)
            assert ledger.knows_head(ledger.head)
            assert not ledger.knows_head(bytes(32))
    assert len(heads) == 3


def test_the_file_is_its_owners_alone(used: Path) -> None:
    assert used.stat().st_mode & 0o077 == 0


# ---- Disks that fill ----

FILLER = """
import sys
from pathlib import Path
from client.ledger import *
from common.accounting import GaussianSteps
import hashlib, os, resource
path = Path(sys.argv[1])
limit = int(sys.argv[2])
budget = Budget(1e-5, 3.0, 3.0, 3.0, attempts=10**6)
step = GaussianSteps(20.0, 1.0, 1)
ledger = Ledger.create(path, bytes(range(32)), "source")
ledger.reserve("s", bytes(32), b"{}", [step], budget)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
done = 0
try:
    for number in range(1, 200):
        task = hashlib.sha256(str(number).encode()).digest()
        ledger.charge("s", number, task, [], budget)
        ledger.commit("s", number, task, release=os.urandom(20_000), student_state=b"s" * number)
        done = number
    print("never full")
except LedgerError as error:
    print(error.fault, done, len(ledger.student_state("s")))
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        task = hashlib.sha256(str(done + 1).encode()).digest()
        ledger.charge("s", done + 1, task, [], budget)
        ledger.commit("s", done + 1, task, release=b"at last", student_state=b"s" * (done + 1))
ledger.close()
with Ledger.open(path, bytes(range(32))) as ledger:
    print(len(ledger.student_state("s")), len(ledger.verify().findings))
"""


def test_a_disk_that_takes_no_more_is_named_and_nothing_half_done_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FILLER, str(tmp_path / "ledger.db"), str(1 << 19)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert shown[0] == "disk-full"
    assert int(shown[2]) == int(shown[1]) > 0
    assert int(shown[3]) == int(shown[1]) + 1
    assert shown[4] == "0"


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    mount = 'mount -t tmpfs -o size=600k tmpfs "$0" || exit 77; exec "$1" -c "$2" "$0/ledger.db" 0'
    command = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path), sys.executable, FILLER]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    shown = done.stdout.split()
    assert shown[0] == "disk-full", done.stderr
    assert int(shown[3]) == int(shown[2]) == int(shown[1]) > 0
    assert shown[4] == "0"
