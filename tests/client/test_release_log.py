"""The log of releases: every line is on disk, and a line that a crash cut short spoils no other."""

import hashlib

import pytest

from client.release_log import ReleaseLog
from common.errors import UserError


def test_it_says_what_was_sent_and_when(tmp_path):
    log = ReleaseLog(tmp_path / "releases.jsonl")
    assert list(log.read()) == []
    log.note("study", 1, b"first")
    log.note("study", 2, b"second")
    first, second = log.read()
    assert (first.study, first.round, first.bytes) == ("study", 1, 5)
    assert second.sha256 == hashlib.sha256(b"second").hexdigest()
    assert first.when <= second.when


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_cut_short_stays_alone(tmp_path, cut):
    log = ReleaseLog(tmp_path / "releases.jsonl")
    log.note("study", 1, b"first")
    log.note("study", 2, b"second")
    log.path.write_bytes(log.path.read_bytes()[:-cut])
    log.note("study", 3, b"third")
    rounds = [line.round for line in log.read()]
    assert rounds in ([1, 3], [1, 2, 3])
    if cut > 1:  # one byte less is the end of the line only, and the line is whole
        assert rounds == [1, 3]


def test_a_foreign_line_is_named(tmp_path):
    log = ReleaseLog(tmp_path / "releases.jsonl")
    log.note("study", 1, b"first")
    with log.path.open("a") as file:
        file.write('{"when": "now"}\n')
    with pytest.raises(UserError, match="line 2"):
        list(log.read())
