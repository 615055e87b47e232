"""Programs in the background: what is taken is named, and what runs is known by its lock."""

import fcntl
import os
import socket

import pytest

from common.errors import UserError
from server.federation.processes import PARTS, SUPERLINK, become, pid_of, require_port, running, start
from server.federation.settings import Federation

from .conftest import settings


@pytest.fixture
def federation(tmp_path) -> Federation:
    for folder in ("state", "logs"):
        (tmp_path / folder).mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return Federation(tmp_path, settings(superlink_port=port))


def test_a_port_that_is_taken_is_one_clear_error_before_anything_starts(federation):
    with socket.socket() as other:
        other.bind(("127.0.0.1", federation.settings.superlink_port))
        other.listen()
        for attempt in (require_port, start, lambda taken: become(taken, SUPERLINK)):
            with pytest.raises(UserError, match=f"port {federation.settings.superlink_port} of .* is taken"):
                attempt(federation)
    assert set(running(federation).values()) == {None}
    require_port(federation)


def test_a_host_that_is_not_ours_is_named(federation):
    away = settings(superlink_host="192.0.2.1", superlink_port=federation.settings.superlink_port)
    with pytest.raises(UserError, match=r"192\.0\.2\.1"):
        require_port(Federation(federation.path, away))


def test_a_program_is_known_by_the_lock_it_holds_and_not_by_a_number(federation):
    file = federation.state / "superlink.pid"
    file.write_text(f"{os.getpid()}\n")  # of a process that has long been somebody else's
    assert pid_of(federation, SUPERLINK) is None
    with file.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert pid_of(federation, SUPERLINK) == os.getpid()
        with pytest.raises(UserError, match="runs already"):
            become(federation, SUPERLINK)
    assert running(federation) == {part.name: None for part in PARTS}
