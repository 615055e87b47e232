"""When certificates end, as either side tells it, and from when on that is worth a warning."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from common.errors import UserError

SOON = timedelta(days=30)
"""How long before its end a certificate is warned of."""


@dataclass(frozen=True)
class Term:
    """How long a certificate is good.

    Attributes:
        of: Whose it is.
        ends: When it ends.
        left: How long that was off when it was looked at; negative once it has ended.
    """

    of: str
    ends: datetime
    left: timedelta

    @property
    def soon(self) -> bool:
        """Whether to warn."""
        return self.left < SOON

    def as_json(self) -> dict[str, Any]:
        """The same for programs."""
        return {
            "of": self.of,
            "ends": self.ends.isoformat(),
            "days_left": self.left.days,
            "soon": self.soon,
        }

    def __str__(self) -> str:
        """In a few words."""
        if self.left < timedelta(0):
            return f"{self.of}: ENDED on {self.ends:%Y-%m-%d}"
        return f"{self.of}: until {self.ends:%Y-%m-%d}, {self.left.days} days"


def expiry(certificate: bytes) -> datetime:
    """When a certificate ends.

    Raises:
        ValueError: if it is none, in PEM.
    """
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def terms(files: dict[str, Path]) -> tuple[Term, ...]:
    """How long certificates are good; one that isn't there is left out.

    Args:
        files: Each certificate's file, by whose it is.

    Raises:
        UserError: if a file is there and can't be read, or is no certificate.
    """
    now = datetime.now(UTC)
    found = []
    for of, path in files.items():
        try:
            ends = expiry(path.read_bytes())
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path}: can't be read: {error.strerror}") from None
        except ValueError:
            raise UserError(f"{path}: no certificate in PEM form") from None
        found.append(Term(of, ends, ends - now))
    return tuple(found)
