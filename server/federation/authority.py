"""Keys and certificates: the federation's authority, who shows what to whom, and what Flower knows a node by.

One authority signs two kinds of certificates: the coordinator's, which sites check (server authentication,
with its host as subject alternative name), and each courier's, which the gateway asks for (client
authentication). A certificate of one kind isn't taken for the other. Node keys are Flower's: P-384 in
OpenSSH's format.
"""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LASTS, CERTIFICATE_LASTS = timedelta(days=3650), timedelta(days=825)
CLOCKS_DIFFER = timedelta(hours=1)
"""Certificates are good from a little before they are made."""


@dataclass(frozen=True)
class Credentials:
    """A key and what vouches for it, both as PEM.

    Attributes:
        certificate: The certificate.
        key: Its private key, PKCS #8, not encrypted.
    """

    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class NodeKey:
    """A key pair that Flower knows a SuperNode by, as OpenSSH writes them."""

    private: bytes
    public: bytes


def found_authority(federation: str) -> Credentials:
    """Make the federation's own authority; it signs leaves only."""
    key = ec.generate_private_key(ec.SECP384R1())
    name = _name(f"Grand Rounds federation {federation}")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    builder = _builder(name, name, key, AUTHORITY_LASTS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA384())
    )
    return _as_pem(certificate, key)


def certify_server(
    authority: Credentials, hosts: list[str], lasts: timedelta = CERTIFICATE_LASTS
) -> Credentials:
    """Make the coordinator's certificate, good for these names and addresses."""
    names = x509.SubjectAlternativeName([_general_name(host) for host in dict.fromkeys(hosts)])
    return _leaf(authority, hosts[0], ExtendedKeyUsageOID.SERVER_AUTH, names, lasts)


def certify_courier(authority: Credentials, site: str, lasts: timedelta = CERTIFICATE_LASTS) -> Credentials:
    """Make a site's certificate, which the gateway asks for."""
    return _leaf(authority, site, ExtendedKeyUsageOID.CLIENT_AUTH, None, lasts)


def make_node_key() -> NodeKey:
    """Make the key pair of a SuperNode."""
    key = ec.generate_private_key(ec.SECP384R1())
    return NodeKey(
        private=key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        public=key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n",
    )


def _leaf(
    authority: Credentials,
    name: str,
    purpose: x509.ObjectIdentifier,
    alternatives: x509.SubjectAlternativeName | None,
    lasts: timedelta,
) -> Credentials:
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    key = ec.generate_private_key(ec.SECP256R1())
    builder = (
        _builder(_name(name), issuer.subject, key, lasts)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    )
    if alternatives is not None:
        builder = builder.add_extension(alternatives, critical=False)
    signing = _private_key(authority.key)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
    )
    return _as_pem(builder.sign(signing, hashes.SHA384()), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, lasts: timedelta
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCKS_DIFFER)
        .not_valid_after(now + lasts)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _private_key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    key = load_pem_private_key(pem, password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # we made it
    return key


def _usage(**what: bool) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**(dict.fromkeys(every, False) | what))


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _as_pem(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Credentials:
    return Credentials(
        certificate=certificate.public_bytes(Encoding.PEM),
        key=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )
