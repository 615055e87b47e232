"""How long certificates are good: told in time, and never guessed."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding

from common.certificates import terms
from common.errors import UserError


def certificate(path: Path, lasts: timedelta) -> Path:
    key, now = ed25519.Ed25519PrivateKey.generate(), datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([]))
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - timedelta(days=900)).not_valid_after(now + lasts)
    path.write_bytes(builder.sign(key, None).public_bytes(Encoding.PEM))
    return path


@pytest.mark.parametrize(
    ("days", "soon", "says"),
    [(31.5, False, "31 days"), (29.5, True, "29 days"), (0.5, True, "0 days"), (-1.5, True, "ENDED on")],
)
def test_one_that_ends_within_thirty_days_is_warned_of(tmp_path, days, soon, says):
    (term,) = terms({"courier": certificate(tmp_path / "courier.crt", timedelta(days=days))})
    assert term.soon is soon and says in str(term) and str(term).startswith("courier: ")
    told = term.as_json()
    assert (told["of"], told["soon"]) == ("courier", soon)
    assert datetime.fromisoformat(told["ends"]) - datetime.now(UTC) < timedelta(days=days)


def test_one_that_is_not_there_is_left_out_and_one_that_is_none_is_named(tmp_path):
    (tmp_path / "broken.crt").write_text("nothing")
    assert terms({"courier": tmp_path / "no.crt"}) == ()
    with pytest.raises(UserError, match=r"broken\.crt: no certificate"):
        terms({"courier": tmp_path / "broken.crt"})
    with pytest.raises(UserError, match="can't be read"):
        terms({"courier": tmp_path})
