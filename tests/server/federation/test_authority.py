"""Certificates that do what they are for and nothing else, and keys in the form that Flower takes."""

from datetime import UTC, datetime
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from common.certificates import expiry
from server.federation.authority import (
    certify_courier,
    certify_server,
    found_authority,
    make_node_key,
)

AUTHORITY = found_authority("trial")
STORE = Store([x509.load_pem_x509_certificate(AUTHORITY.certificate)])


def certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


@pytest.mark.parametrize("host", ["fed.example.org", "10.0.0.7", "2001:db8::1"])
def test_the_servers_certificate_is_good_for_its_hosts_alone(host):
    server = certificate(certify_server(AUTHORITY, [host, "localhost", host]).certificate)

    def verify(name: x509.GeneralName) -> None:
        PolicyBuilder().store(STORE).build_server_verifier(name).verify(server, [])

    def subject(name: str) -> x509.GeneralName:
        try:
            return x509.IPAddress(ip_address(name))
        except ValueError:
            return x509.DNSName(name)

    verify(subject(host))
    verify(subject("localhost"))
    with pytest.raises(VerificationError):
        verify(subject("elsewhere.example.org"))
    with pytest.raises(VerificationError):
        PolicyBuilder().store(STORE).build_client_verifier().verify(server, [])


def test_a_couriers_certificate_serves_nobody_else():
    made = certify_courier(AUTHORITY, "north")
    courier = certificate(made.certificate)
    assert courier.subject.rfc4514_string() == "CN=north"
    assert expiry(made.certificate) > datetime.now(UTC)
    purpose = courier.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purpose) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert not courier.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    courier.verify_directly_issued_by(certificate(AUTHORITY.certificate))
    with pytest.raises(ValueError, match="Issuer certificate"):
        courier.verify_directly_issued_by(certificate(found_authority("another").certificate))


def test_a_node_key_is_what_flower_takes():
    node = make_node_key()
    private, public = load_ssh_private_key(node.private, None), load_ssh_public_key(node.public)
    assert isinstance(private, ec.EllipticCurvePrivateKey) and isinstance(public, ec.EllipticCurvePublicKey)
    assert private.public_key() == public and uses_nist_ec_curve(public)
    assert make_node_key().private != node.private
