"""A file of entries that can only grow, each sealed to the one before it: what the ledger is written in.

An entry is a small JSON object, numbered from 1, with attachments (bytes) if it has any. Its *head* is an
HMAC-SHA256, under a key derived from the site's, over the previous head, its number and its bytes. So one
head vouches for the whole history up to it, nobody without the key can write an entry or confirm a guess
about one, and an edit anywhere shows on opening. What a chain can't show by itself is that its newest entries
are gone: an older copy is as sound as it ever was. Hence the *anchor*, a small sealed file elsewhere that
holds length and head as they last were. Whoever restores ledger and anchor together to an older state is not
noticed here; a coordinator that brings back a head it was given notices.

SQLite keeps the file whole: write-ahead log, synchronous=FULL, one immediate transaction for each change, so
any number of threads and processes may share it, and a change is there after a crash or it never was.
Whatever goes wrong is raised as a `LedgerError` that names it; nothing is repaired in silence.
"""

import errno
import fcntl
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Final, Literal, get_args
from urllib.parse import quote

from common.errors import UserError
from common.runs import make_durable

Untrusted = Literal["missing", "wrong-key", "edited", "truncated", "older-copy", "anchor-missing", "damaged"]
"""Faults of what is there; the others are of the moment."""
Fault = Untrusted | Literal["exists", "locked", "disk-full", "unwritable"]
PATIENCE: Final = 30.0
"""Seconds to wait for another process that is writing."""

_APPLICATION: Final = 0x47524C31  # "GRL1"

_SCHEMA: Final = (
    "CREATE TABLE entries (number INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, "
    "head BLOB NOT NULL UNIQUE)",
    "CREATE TABLE attachments (entry INTEGER NOT NULL REFERENCES entries (number), name TEXT NOT NULL, "
    "content BLOB NOT NULL, PRIMARY KEY (entry, name)) WITHOUT ROWID",
    "CREATE TRIGGER entries_stay BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'an entry stays'); END",
    "CREATE TRIGGER entries_keep BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'an entry stays'); END",
    "CREATE TRIGGER attachments_keep BEFORE UPDATE ON attachments "
    "BEGIN SELECT RAISE(ABORT, 'an attachment stays as it is'); END",
)
_SHAPE: Final = "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name"

_NO_HEAD: Final = bytes(32)


class LedgerError(UserError):
    """The ledger can't be trusted or can't be written; the message names what is wrong.

    Attributes:
        fault: The same in one word, for programs.
    """

    def __init__(self, path: Path, fault: Fault, what: str) -> None:
        """Compose the one-line message."""
        self.path, self.fault = path, fault
        self.exit_code = 1 if fault in get_args(Untrusted) else 2
        super().__init__(f"ledger {path}: {fault}: {what}")


@dataclass(frozen=True)
class Entry:
    """One sealed entry.

    Attributes:
        number: Its place, from 1.
        when: UTC, ISO 8601, by this machine's clock; the chain's order, not the clock, says what came first.
        kind: What it records.
        body: The rest of it; attachments appear as lengths and seals.
        head: Its seal, 32 bytes.
    """

    number: int
    when: str
    kind: str
    body: Mapping[str, Any]
    head: bytes


class Pen:
    """Writes to the chain within one transaction."""

    def __init__(self, chain: "Chain") -> None:
        """Start after the chain's last entry."""
        self._chain = chain
        self.written: list[Entry] = []

    def append(
        self, kind: str, body: Mapping[str, Any], attachments: Mapping[str, bytes] | None = None
    ) -> Entry:
        """Add an entry and return it; it is there for others once the transaction ends."""
        chain, content = self._chain, attachments or {}
        number, head = self.written[-1].number if self.written else chain.length, self.head
        sealed = {name: [len(data), chain.seal_of(number + 1, name, data)] for name, data in content.items()}
        # The nonce keeps two histories apart that a restored copy would make alike to the second.
        fields = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "nonce": secrets.token_hex(8)}
        text = _canonical(fields | {"kind": kind, **body} | ({"attachments": sealed} if sealed else {}))
        entry = chain.read_entry(number + 1, text, chain.head_of(head, number + 1, text))
        chain.database.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.number, text, entry.head))
        for name, data in content.items():
            chain.database.execute("INSERT INTO attachments VALUES (?, ?, ?)", (entry.number, name, data))
        self.written.append(entry)
        return entry

    def discard(self, entry: Entry, name: str) -> None:
        """Drop an attachment that nobody will ask for again; its seal stays in the entry."""
        self._chain.database.execute(
            "DELETE FROM attachments WHERE entry = ? AND name = ?", (entry.number, name)
        )

    @property
    def head(self) -> bytes:
        """The head, with what was written in this transaction."""
        return self.written[-1].head if self.written else self._chain.head


class Chain:
    """An open chain; safe to share between threads, and between processes that open it each for itself.

    Attributes:
        length, head: Number and head of the last entry that was read and found sound.
    """

    def __init__(
        self,
        path: Path,
        key: bytes,
        anchor: Path | None,
        database: sqlite3.Connection,
        absorb: Callable[[Entry], None],
    ) -> None:
        """Use `create` or `open`."""
        self.path, self.database = path, database
        self.length, self.head = 0, _NO_HEAD
        self._entry_key, self._attachment_key = _derived(key, "entries"), _derived(key, "attachments")
        self._anchor = None if anchor is None else _Anchor(path, anchor, _derived(key, "anchor"))
        self._absorb = absorb
        self._lock = threading.RLock()
        self._inode = _inode(path)

    @classmethod
    def create(
        cls,
        path: Path,
        key: bytes,
        first: tuple[str, Mapping[str, Any]],
        absorb: Callable[[Entry], None],
        anchor: Path | None = None,
    ) -> "Chain":
        """Begin a chain with its first entry (kind and body).

        Raises:
            LedgerError: if there is a file already, or none can be made.
        """
        _require_key(key)
        for there in (path, *([anchor] if anchor else [])):
            if there.exists():
                raise LedgerError(path, "exists", f"{there} is there already; a ledger is begun once")
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise LedgerError(path, "unwritable", f"it can't be created: {error.strerror}") from None
        with _named(path):
            chain = cls(path, key, anchor, _connect(path, PATIENCE), absorb)
            try:
                chain._begin(*first)
            except BaseException:
                chain.close()
                path.unlink()
                raise
        make_durable(path.parent)
        return chain

    @classmethod
    def open(
        cls,
        path: Path,
        key: bytes,
        absorb: Callable[[Entry], None],
        anchor: Path | None = None,
        patience: float = PATIENCE,
    ) -> "Chain":
        """Open a chain and check every entry of it.

        Args:
            path: The SQLite file.
            key: The site's secret.
            absorb: Called with every entry, in order, once it is found sound and durable; also with later
                ones.
            anchor: The file that remembers the last head, if the chain was begun with one.
            patience: Seconds to wait for another process that is writing.

        Raises:
            LedgerError: naming what is wrong with it.
        """
        _require_key(key)
        if not path.is_file():
            raise LedgerError(path, "missing", "there is no such file")
        with _named(path):
            chain = cls(path, key, anchor, _connect(path, patience), absorb)
            try:
                chain._check()
            except BaseException:
                chain.close()
                raise
        return chain

    def close(self) -> None:
        """Close the file; nothing waits to be written."""
        with self._lock:
            self.database.close()

    @contextmanager
    def writing(self) -> Iterator[Pen]:
        """One transaction that may append: durable at its end, or undone if an exception leaves it.

        Entries of other processes are absorbed first, and nobody else writes meanwhile.
        """
        with self._lock, _named(self.path):
            with self._transaction("BEGIN IMMEDIATE"):
                self._catch_up()
                pen = Pen(self)
                yield pen
            self._settle(pen)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """One consistent view, entries of other processes included."""
        with self._lock, _named(self.path):
            with self._transaction("BEGIN"):
                self._catch_up()
                yield
            self._advance_anchor()

    def entries(self) -> Iterator[Entry]:
        """Read and check all entries from the file, from the first on; use inside `reading`."""
        return self._sound_entries(0, _NO_HEAD)

    def attachment(self, entry: Entry, name: str) -> bytes:
        """Return an attachment, checked against its entry; use inside `reading` or `writing`."""
        row = self.database.execute(
            "SELECT content FROM attachments WHERE entry = ? AND name = ?", (entry.number, name)
        ).fetchone()
        if row is None:
            raise LedgerError(self.path, "truncated", f"the {name} of entry {entry.number} is missing")
        content = bytes(row[0])
        if [len(content), self.seal_of(entry.number, name, content)] != entry.body["attachments"][name]:
            raise LedgerError(self.path, "edited", f"the {name} of entry {entry.number} was changed")
        return content

    def knows(self, head: bytes) -> bool:
        """Whether some entry has this head; use inside `reading`."""
        return self.database.execute("SELECT 1 FROM entries WHERE head = ?", (head,)).fetchone() is not None

    def damage(self) -> str | None:
        """Have SQLite check the file's structure; use inside `reading`."""
        report = str(self.database.execute("PRAGMA integrity_check(1)").fetchone()[0])
        return None if report == "ok" else report

    # ---- Seals ----

    @property
    def key_name(self) -> str:
        """Tells this key from others without telling anything about it."""
        return _seal(self._entry_key, b"name").hex()[:16]

    def head_of(self, previous: bytes, number: int, text: bytes) -> bytes:
        """Seal an entry's bytes to the entry before it."""
        return _seal(self._entry_key, previous + number.to_bytes(8, "big") + text)

    def seal_of(self, number: int, name: str, content: bytes) -> str:
        """Seal an attachment to its place."""
        return _seal(self._attachment_key, number.to_bytes(8, "big") + name.encode() + b"\0" + content).hex()

    def read_entry(self, number: int, text: bytes, head: bytes) -> Entry:
        """Unfold an entry's bytes, which are known to be ours."""
        body = json.loads(text)
        del body["nonce"]
        return Entry(number, body.pop("when"), body.pop("kind"), body, head)

    # ---- Soundness ----

    def _begin(self, kind: str, body: Mapping[str, Any]) -> None:
        with self._transaction("BEGIN IMMEDIATE"):
            for statement in _SCHEMA:
                self.database.execute(statement)
            self.database.execute(f"PRAGMA application_id = {_APPLICATION}")
            pen = Pen(self)
            pen.append(kind, {"key": self.key_name, **body})
        self._settle(pen)

    @contextmanager
    def _transaction(self, begin: str) -> Iterator[None]:
        self.database.execute(begin)
        try:
            yield
            self.database.execute("COMMIT")
        except BaseException:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise

    def _sound_entries(self, after: int, head: bytes) -> Iterator[Entry]:
        """Read the entries after one whose number and head are known, checking each."""
        rows = self.database.execute(
            "SELECT number, body, head FROM entries WHERE number > ? ORDER BY number",
            (after or -(2**63),),  # the first reading also meets what was smuggled in before the first entry
        )
        for expected, (number, text, seal) in enumerate(rows, start=after + 1):
            if number != expected:
                raise LedgerError(
                    self.path, "truncated", f"entry {expected} is missing, {number} stands there"
                )
            if not isinstance(text, bytes) or seal != self.head_of(head, number, text):
                raise self._broken(number, text)
            head = seal
            yield self.read_entry(number, text, seal)

    def _catch_up(self) -> None:
        """Check and absorb what other processes have added, to the same file, after the same entries."""
        if _inode(self.path) != self._inode:
            raise LedgerError(self.path, "older-copy", "it was removed or replaced while it was open")
        if self.length and self._head_at(self.length) != self.head:
            what = f"entry {self.length} was changed or removed while it was open"
            raise LedgerError(self.path, "edited", what)
        for entry in self._sound_entries(self.length, self.head):
            self._take(entry)

    def _settle(self, pen: Pen) -> None:
        for entry in pen.written:
            self._take(entry)
        self._advance_anchor()

    def _take(self, entry: Entry) -> None:
        self.length, self.head = entry.number, entry.head
        self._absorb(entry)

    def _broken(self, number: int, text: bytes) -> LedgerError:
        if number == 1:
            try:
                stranger = json.loads(text)["key"] != self.key_name
            except (ValueError, KeyError, TypeError):
                stranger = False
            if stranger:
                return LedgerError(self.path, "wrong-key", "it was begun under another key than this one")
        return LedgerError(self.path, "edited", f"entry {number} does not match its seal")

    def _check(self) -> None:
        """Check everything that opening can show."""
        # The anchor follows the chain: a chain that is read after it has come at least as far.
        anchored = None if self._anchor is None else self._anchor.read()
        with self._transaction("BEGIN"):
            self._check_shape()
            self._catch_up()
            # SQLite remembers the largest number that was ever given.
            last = self.database.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
            if self.length == 0 or last is None or last[0] != self.length:
                raise LedgerError(self.path, "truncated", f"entries after number {self.length} were removed")
            if anchored is not None:
                self._check_against_anchor(*anchored)
        self._advance_anchor()

    def _check_shape(self) -> None:
        identity = self.database.execute("PRAGMA application_id").fetchone()[0]
        model = sqlite3.connect(":memory:")
        for statement in _SCHEMA:
            model.execute(statement)
        expected = model.execute(_SHAPE).fetchall()
        model.close()
        if identity != _APPLICATION or self.database.execute(_SHAPE).fetchall() != expected:
            raise LedgerError(self.path, "edited", "its tables are not a ledger's, or not any more")

    def _check_against_anchor(self, length: int, head: bytes) -> None:
        if length > self.length:
            what = f"its anchor knows {length} entries and it has {self.length}: cut off, or an older copy"
            raise LedgerError(self.path, "older-copy", what)
        if self._head_at(length) != head:
            what = (
                f"entry {length} is not the one that its anchor knows: an older copy that went on by itself"
            )
            raise LedgerError(self.path, "older-copy", what)

    def _head_at(self, number: int) -> bytes | None:
        row = self.database.execute("SELECT head FROM entries WHERE number = ?", (number,)).fetchone()
        return None if row is None else row[0]

    def _advance_anchor(self) -> None:
        if self._anchor is not None:
            self._anchor.advance(self.length, self.head)


class _Anchor:
    """The chain's length and head in a sealed file of its own, which only moves forward."""

    def __init__(self, ledger: Path, path: Path, key: bytes) -> None:
        self._ledger, self._path, self._key = ledger, path, key
        self._length = 0

    def advance(self, length: int, head: bytes) -> None:
        """Move the anchor forward to this end of the chain, unless another process has moved it further."""
        if length <= self._length:
            return
        try:
            with self._path.with_name(self._path.name + ".lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not self._path.exists() or length > self.read()[0]:
                    self._write(length, head)
        except OSError as error:
            what = f"its anchor {self._path} can't be written: {error.strerror}"
            raise LedgerError(
                self._ledger, "disk-full" if error.errno in _FULL else "unwritable", what
            ) from None
        self._length = length

    def read(self) -> tuple[int, bytes]:
        """Return the length and head that it holds."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            what = f"its anchor {self._path} is gone; without it an older copy of the ledger can't be told"
            raise LedgerError(self._ledger, "anchor-missing", what) from None
        except OSError as error:
            raise LedgerError(
                self._ledger, "unwritable", f"its anchor {self._path}: {error.strerror}"
            ) from None
        try:
            fields = json.loads(text)
            length, head, seal = fields["length"], bytes.fromhex(fields["head"]), fields["seal"]
            sound = seal == self._seal(length, head)
        except (ValueError, TypeError, KeyError, AttributeError):
            sound = False
        if not sound:
            raise LedgerError(self._ledger, "edited", f"its anchor {self._path} does not match its seal")
        return length, head

    def _write(self, length: int, head: bytes) -> None:
        fields = {"length": length, "head": head.hex(), "seal": self._seal(length, head)}
        with NamedTemporaryFile(dir=self._path.parent, prefix=f".{self._path.name}.", delete=False) as file:
            try:
                file.write(_canonical(fields) + b"\n")
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, self._path)
            except BaseException:
                os.unlink(file.name)
                raise
        make_durable(self._path.parent)

    def _seal(self, length: int, head: bytes) -> str:
        return _seal(self._key, length.to_bytes(8, "big") + head).hex()


# ---- SQLite and the disk -----------------------------------------------------------------------------------

_FULL: Final = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}

_FAULTS: Final[Mapping[int, tuple[Fault, str]]] = {
    sqlite3.SQLITE_BUSY: ("locked", "another program holds it and won't let go"),
    sqlite3.SQLITE_FULL: ("disk-full", "the disk is full"),
    sqlite3.SQLITE_IOERR: ("disk-full", "it can't be written: the disk is full, over quota, or failing"),
    sqlite3.SQLITE_CORRUPT: ("damaged", "the file's structure is broken"),
    sqlite3.SQLITE_NOTADB: ("damaged", "the file is not an SQLite database"),
    sqlite3.SQLITE_READONLY: ("unwritable", "this account may not write it"),
    sqlite3.SQLITE_CANTOPEN: ("unwritable", "this account can't open it"),
    sqlite3.SQLITE_PERM: ("unwritable", "this account may not open it"),
}


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", None)
        if code is None:
            raise  # not SQLite's, but a mistake in using it
        fault, what = _FAULTS.get(code & 0xFF, ("damaged", "SQLite can't use it"))
        raise LedgerError(path, fault, f"{what} ({error})") from error


def _connect(path: Path, patience: float) -> sqlite3.Connection:
    database = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=rw",
        uri=True,
        timeout=patience,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        for setting in ("journal_mode = WAL", "synchronous = FULL", "fullfsync = ON", "trusted_schema = OFF"):
            database.execute(f"PRAGMA {setting}")
    except BaseException:
        database.close()
        raise
    return database


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


# ---- Keys --------------------------------------------------------------------------------------------------


def _require_key(key: bytes) -> None:
    if len(key) < 16:
        raise UserError(f"the site's key has {len(key)} bytes; it must have 16 or more, from a random source")


def _derived(key: bytes, purpose: str) -> bytes:
    return _seal(key, b"grandrounds ledger: " + purpose.encode())


def _seal(key: bytes, content: bytes) -> bytes:
    return hmac.digest(key, content, hashlib.sha256)


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
