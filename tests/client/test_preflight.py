"""Preflight: each thing that can be wrong is a line that says what to do, and looking costs nothing."""

import os
import socket
import sqlite3
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest

from client.policy import read_policy
from client.preflight import Finding, preflight
from client.shelf import shelf_of
from common.errors import UserError


def findings(hospital, **options: str) -> dict[str, Finding]:
    return {finding.check: finding for finding in preflight(hospital.policy_path, **options)}


def keep_proxy(hospital) -> None:
    shelf_of(read_policy(hospital.policy_path)).keep_proxy(hospital.proxy, hospital.proxy.to_bytes())


def test_a_sound_site_passes_and_nothing_is_spent(hospital):
    keep_proxy(hospital)
    found = findings(hospital)
    assert list(found) == ["policy", "data", "memory", "models", "ledger", "clock", "socket"]
    assert all(finding.passed for finding in found.values()), found
    assert "public sets that the columns fit: 1" in found["data"].says
    with hospital.open() as site:
        assert [entry.kind for entry in site.ledger.entries()] == ["begin"]


def test_before_a_public_set_has_come_it_says_so(hospital):
    found = findings(hospital)
    assert all(finding.passed for finding in found.values())
    assert "no public set has come yet" in found["data"].says


def test_a_policy_that_is_not_right_ends_it(hospital):
    hospital.amend({"declared-size = 50": "declared-size = 0"})
    (only,) = preflight(hospital.policy_path)
    assert not only.passed and "data.declared-size" in only.says


def rewrite(path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


FAULTS = {
    "a column that is missing": ("data", lambda h: rewrite(h.folder / "patients.csv", "sugar", "salt")),
    "a word among numbers": ("data", lambda h: rewrite(h.folder / "patients.csv", "p1,", "p1,no,seventy,")),
    "no file": ("data", lambda h: (h.folder / "patients.csv").unlink()),
    "another unit than is promised": (
        "data",
        lambda h: rewrite(h.folder / "data.toml", 'patient = "patient"', ""),
    ),
    "two declared sizes": (
        "data",
        lambda h: rewrite(h.folder / "data.toml", "declared-size = 50", "declared-size = 60"),
    ),
    "a site that isn't described": (
        "data",
        lambda h: rewrite(h.folder / "data.toml", "sites.north", "sites.south"),
    ),
    "a label that nobody knows": ("data", lambda h: rewrite(h.folder / "patients.csv", ",yes,", ",maybe,")),
    "a ledger that is gone": ("ledger", lambda h: (h.folder / "state" / "ledger.db").unlink()),
    "a ledger that was edited": ("ledger", lambda h: edit(h.folder / "state" / "ledger.db")),
    "an anchor that is gone": ("ledger", lambda h: (h.folder / "ledger.anchor").unlink()),
    "a key that others can read": ("ledger", lambda h: (h.folder / "site.key").chmod(0o640)),
    "another key": ("ledger", lambda h: (h.folder / "site.key").write_bytes(bytes(32))),
    "a folder that isn't there": ("socket", lambda h: h.amend({"/door.sock": "/run/door.sock"})),
}


def edit(ledger) -> None:
    with sqlite3.connect(ledger) as database:
        database.execute("DROP TRIGGER entries_keep")
        database.execute("UPDATE entries SET body = replace(body, 'patient', 'hamster')")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_and_no_value_of_a_record_with_it(hospital, fault):
    check, break_it = FAULTS[fault]
    keep_proxy(hospital)
    break_it(hospital)
    found = findings(hospital)
    assert not found[check].passed, found
    others = {name for name, finding in found.items() if not finding.passed} - {check}
    assert others <= {"clock"}  # it reads the ledger too
    for finding in found.values():
        assert "seventy" not in finding.says and "maybe" not in finding.says


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux tells how much memory is free")
def test_a_model_that_does_not_fit_in_memory_is_named(hospital, monkeypatch):
    keep_proxy(hospital)
    monkeypatch.setattr("client.preflight._available_memory", lambda: 1 << 20)
    memory = findings(hospital)["memory"]
    assert not memory.passed and "mlp may need" in memory.says and "[student]" in memory.says


def test_a_model_that_there_is_not_is_named_before_it_serves(hospital):
    hospital.amend({'models = ["linear",': 'models = ["lineer",'})
    (found,) = (one for one in preflight(hospital.policy_path) if one.check == "models")
    assert not found.passed and "'lineer'" in found.says and "did you mean linear?" in found.says


def test_a_model_that_mixes_cases_is_named_before_it_serves(hospital, monkeypatch):
    keep_proxy(hospital)
    (hospital.folder / "our_models.py").write_text(
        "from torch import nn\n"
        "class Plain(nn.Module):\n"
        "    def __init__(self, case_shape, num_classes):\n"
        "        super().__init__()\n"
        "        self.head = nn.Linear(*case_shape, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.head(x)\n"
        "class Centred(Plain):\n"
        "    def forward(self, x):\n"
        "        return self.head(x - x.mean(0))\n"
    )
    monkeypatch.syspath_prepend(hospital.folder)
    hospital.amend({'models = ["linear"': 'models = ["our_models:Plain", "linear"'})
    sound = findings(hospital)["models"]
    assert sound.passed and "our_models:Plain: keep cases apart" in sound.says
    hospital.amend({"our_models:Plain": "our_models:Centred"})
    found = findings(hospital)["models"]
    assert not found.passed and "our_models:Centred: Centred can't be trained in private" in found.says


def test_a_clock_that_goes_back_is_noticed(hospital, monkeypatch):
    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(UTC) + timedelta(days=1)

    with monkeypatch.context() as patch, hospital.open() as site:
        patch.setattr("client.chain.datetime", Tomorrow)
        site.ledger.approve("study", bytes(32), "", "Dr. Who", "")
    clock = findings(hospital)["clock"]
    assert not clock.passed and "set the clock" in clock.says


# ---- The way to the coordinator ----


@pytest.fixture
def coordinator(tmp_path, certify):
    """A TLS server with a certificate of an authority of its own."""
    certify(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "custodian.crt", tmp_path / "custodian.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    with context.wrap_socket(listener.accept()[0], server_side=True):
                        pass
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", str(tmp_path / "ca.crt")
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_coordinator_that_can_be_reached_and_trusted(hospital, coordinator):
    address, authority = coordinator
    assert findings(hospital, coordinator=address, authority=authority)["coordinator"].passed
    stranger = findings(hospital, coordinator=address)["coordinator"]
    assert not stranger.passed and "no trusted TLS" in stranger.says


def test_a_coordinator_that_cannot_be_reached(hospital):
    nobody = findings(hospital, coordinator="127.0.0.1:1")["coordinator"]
    assert not nobody.passed and "can't be reached" in nobody.says
    with pytest.raises(UserError, match="host:port"):
        preflight(hospital.policy_path, coordinator="somewhere")


# ---- The command ----


def test_the_command_prints_a_line_each_and_its_exit_code_says_it_all(hospital):
    sound = hospital.run("check")
    assert sound.returncode == 0, sound.stderr
    assert sound.stdout.count("pass") == 7
    (hospital.folder / "patients.csv").unlink()
    broken = hospital.run("check")
    assert broken.returncode == 1
    assert broken.stdout.count("FAIL") == 1 and "patients.csv" in broken.stdout
    assert not (hospital.folder / "state" / "lock").exists()
