"""The site's own log of what it sent: one line for every release, on disk before a byte of it leaves.

The ledger holds each release's bytes; this log holds when they left, which the ledger, written before,
can't know. With both a hospital can show exactly what it sent: `grandrounds site verify` holds them against
each other.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from common.errors import UserError


@dataclass(frozen=True)
class Sent:
    """One release that left.

    Attributes:
        when: UTC, ISO 8601.
        study, round: What it answered.
        bytes: Its length.
        sha256: Of its bytes, in hexadecimal.
    """

    when: str
    study: str
    round: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ReleaseLog:
    """A file of JSON lines that only grows.

    Attributes:
        path: The file; it need not be there yet.
    """

    path: Path

    def note(self, study: str, round_number: int, body: bytes) -> None:
        """Write down that a release is about to leave.

        Raises:
            OSError: if the disk doesn't take it; then the release must not leave.
        """
        when = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps(asdict(Sent(when, study, round_number, len(body), sha256(body).hexdigest())))
        with self.path.open("ab") as file:
            # A line that a crash cut short is closed first: it stays visible and spoils no other.
            torn = file.tell() > 0 and not self._ends_well()
            file.write(b"\n" * torn + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Iterator[Sent]:
        """Read the log; lines that a crash cut short are left out, since what they announced never left.

        Raises:
            UserError: if a whole line isn't one of ours.
        """
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_bytes().split(b"\n"), start=1):
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            try:
                yield Sent(**fields)
            except TypeError:
                raise UserError(f"{self.path}: line {number} is not a line of this log") from None

    def _ends_well(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
