"""The shelf: the public files that a site was sent, public sets under their digests and the last student.

A file is there whole or not at all. One that was damaged since counts as missing and is sent again. A shelf
takes only so many public sets, so that nobody can fill the disk with them.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from client.policy import SitePolicy
from common.proxy import Proxy

MOST_PROXIES = 64
MOST_PROXY_BYTES = 1 << 30
STUDENT = "student.safetensors"

log = logging.getLogger("grandrounds.custodian")


class ShelfFull(Exception):
    """There are too many public sets; a person must remove some."""


@dataclass
class Shelf:
    """Where a site keeps what it was sent.

    Attributes:
        proxies: Folder of the public sets; the custodians of a simulation share one.
        students: Folder of the final student.
    """

    proxies: Path
    students: Path
    _at_hand: Proxy | None = None

    def proxy(self, digest: bytes) -> Proxy | None:
        """Return the public set of this digest, if it is here and whole."""
        if self._at_hand is None or self._at_hand.digest != digest:
            self._at_hand = self._load(self._place(digest)) or self._at_hand
        return self._at_hand if self._at_hand is not None and self._at_hand.digest == digest else None

    @property
    def latest(self) -> bytes:
        """Digest of the public set that was last used, or zeros."""
        return bytes(32) if self._at_hand is None else self._at_hand.digest

    def all_proxies(self) -> Iterator[Proxy]:
        """Read every public set that is whole."""
        for path in sorted(self.proxies.glob("*.safetensors")):
            if (proxy := self._load(path)) is not None:
                yield proxy

    def keep_proxy(self, proxy: Proxy, body: bytes) -> None:
        """Put a public set under its digest.

        Raises:
            ShelfFull: if there are too many.
        """
        if self.proxy(proxy.digest) is not None:
            return
        place = self._place(proxy.digest)
        if not place.exists() and len(list(self.proxies.glob("*.safetensors"))) >= MOST_PROXIES:
            raise ShelfFull(f"{self.proxies} holds {MOST_PROXIES} public sets: remove what no study uses")
        _write_whole(place, body)
        self._at_hand = proxy

    def keep_student(self, body: bytes) -> bytes:
        """Put the final student here in the last one's place and return its digest.

        Raises:
            ValueError: if it isn't a model file.
        """
        from common.models import ModelFileError, read_card

        received = self.students / f"received-{STUDENT}"
        _write_whole(received, body)
        try:
            read_card(received)
        except ModelFileError as error:
            received.unlink()
            raise ValueError(str(error)) from None
        received.replace(self.students / STUDENT)
        return hashlib.sha256(body).digest()

    def _place(self, digest: bytes) -> Path:
        return self.proxies / f"{digest.hex()}.safetensors"

    @staticmethod
    def _load(path: Path) -> Proxy | None:
        try:
            return Proxy.load(path, MOST_PROXY_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s: %s; it will be sent again", path, error)
            return None


def shelf_of(policy: SitePolicy) -> Shelf:
    """Where the site keeps the public files it was sent."""
    return Shelf(proxies=Path(policy.state) / "proxies", students=Path(policy.state))


def _write_whole(path: Path, body: bytes) -> None:
    """Write a file whole or not at all, also where several processes share the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise
