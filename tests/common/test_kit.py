"""Kits: what is packed comes out again, and what comes from outside is taken for hostile."""

import gzip
import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from common.kit import LARGEST, MANIFEST, NEEDED, SECRET, TO_READ, Manifest, Proposal, pack, seal_of, unpack

MANIFEST_OF_NORTH = Manifest(
    federation="trial",
    site="north",
    address="fed.example.org:8443",
    bundle="ab" * 32,
    expires="2030-01-01",
    proposal=Proposal(studies=("trial",), unit="patient", declared_size=100, run_epsilon=1.0, delta=1e-5),
)
FILES = {name: name.encode() for name in NEEDED}


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return gzip.compress(plain.getvalue())


def file(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


@given(
    st.fixed_dictionaries({name: st.binary(max_size=200) for name in NEEDED}),
    st.dictionaries(st.sampled_from(TO_READ), st.binary(max_size=200)),
)
def test_what_is_packed_comes_out_again(needed, more):
    sealed = pack(MANIFEST_OF_NORTH, needed | more)
    kit = unpack(sealed, "north.kit")
    assert (kit.manifest, dict(kit.files), kit.seal) == (MANIFEST_OF_NORTH, needed | more, seal_of(sealed))


def test_secrets_are_for_the_owner_alone():
    with tarfile.open(fileobj=io.BytesIO(pack(MANIFEST_OF_NORTH, FILES))) as tar:
        modes = {member.name.partition("/")[2]: member.mode for member in tar}
    assert {name for name, mode in modes.items() if mode == 0o600} == set(SECRET)
    assert {mode for name, mode in modes.items() if name not in SECRET} == {0o644}


@pytest.mark.parametrize(
    "sealed",
    [
        b"",
        b"no archive",
        pack(MANIFEST_OF_NORTH, FILES)[:-20],
        archive(file("../../etc/passwd")),
        archive(file("/etc/passwd")),
        archive(file("north/../../x")),
        archive(file("north/authorized_keys")),
        archive(link("north/node.key", "/etc/shadow")),
        archive(link("north/node.key", "/etc/shadow", tarfile.LNKTYPE)),
        archive(link("north/node.key", "", tarfile.FIFOTYPE)),
        archive(file("north/node.key"), file("north/node.key")),
        archive(file("north/README.md", bytes(2 * LARGEST))),
        gzip.compress(bytes(64 * LARGEST)),
        os.urandom(2 * LARGEST),
    ],
    ids=lambda _: "kit",  # their bytes differ from process to process, and names may not
)
def test_what_is_no_kit_is_refused_in_one_line(sealed):
    with pytest.raises(UserError) as refused:
        unpack(sealed, "north.kit")
    assert str(refused.value).startswith("north.kit: ") and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [MANIFEST, *NEEDED])
def test_a_missing_file_is_named(name):
    whole = {MANIFEST: MANIFEST_OF_NORTH.model_dump_json(by_alias=True).encode(), **FILES}
    parts = [file(f"north/{one}", content) for one, content in whole.items() if one != name]
    with pytest.raises(UserError, match=name):
        unpack(archive(*parts), "north.kit")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ('"site":"north"', '"site":"../north"'),
        ('"address":"fed.example.org:8443"', '"address":"fed.example.org:8443 --insecure"'),
        ('"bundle":"', '"bundle":"XY'),
        ('"format":1', '"format":2'),
        ('"format":1', '"format":1,"extra":1'),
    ],
)
def test_a_manifest_is_read_to_the_letter(key, value):
    text = MANIFEST_OF_NORTH.model_dump_json(by_alias=True)
    assert key in text
    whole = {MANIFEST: text.replace(key, value).encode(), **FILES}
    with pytest.raises(UserError, match=r"kit\.json"):
        unpack(archive(*(file(f"north/{name}", content) for name, content in whole.items())), "north.kit")
