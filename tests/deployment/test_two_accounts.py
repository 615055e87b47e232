"""Custodian and courier as units and containers run them: under two accounts, one of them without a network.

What systemd and Docker do is done here by hand, in namespaces: an account without privileges, a network with
nobody in it, a file system of which only the folders that the unit names can be written. It takes root.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from common.summary import read
from server.federation.flower import nodes
from server.federation.settings import open_federation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("two accounts"),
    pytest.mark.skipif(
        os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "--net", "true"], check=False).returncode,
        reason="NO NAMESPACES FOR WHOM THIS RUNS AS: THE TWO ACCOUNTS ARE NOT TESTED",
    ),
]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SITES = ("cleveland", "hungary", "switzerland", "long-beach")
GROUP, CUSTODIAN, COURIER, ANOTHER = 10000, 10001, 10002, 10003  # as in compose files
STUDY = 'scenario="heart" run-id="trial" num-rounds=1 min-sites=1'
PROBE = """
import json, os, socket, sys
from pathlib import Path
from client.connection import connect
from common.messages import Offer, decode_answer
folder, data = map(Path, sys.argv[1:])
def tried(act):
    try:
        return act()
    except OSError as error:
        return type(error).__name__
def heard():
    with socket.socket(socket.AF_UNIX) as knocking:
        knocking.connect(f"{folder}/door/custodian.sock")
    greeting = connect(f"unix:{folder}/door/custodian.sock", "").offer(Offer(bytes(32)).encode())
    return decode_answer(greeting).site
print(json.dumps({
    "custodian": tried(lambda: os.listdir(folder / "custodian")),
    "ledger": tried(lambda: (folder / "custodian/state/ledger.db").read_bytes().hex()),
    "key": tried(lambda: (folder / "custodian/site.key").read_bytes().hex()),
    "patients": tried(lambda: (data / "patients.csv").read_text()),
    "courier": tried(lambda: (folder / "courier/node.key").read_text()),
    "door": tried(heard),
}))
"""


def reachable() -> str:
    """Shell that lets other accounts get at this Python and project, in this mount namespace alone."""
    needed = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT}
    closed = {above for path in needed for above in path.parents if not above.stat().st_mode & 0o001}
    top = {path for path in closed if not closed & set(path.parents)}
    hidden = sorted(path for path in needed if top & set(path.parents))
    lines = ["hold=/mnt", "mount -t tmpfs none /mnt"]
    for number, path in enumerate(hidden):
        lines += [f'mkdir "$hold/{number}"', f'mount --bind {shlex.quote(str(path))} "$hold/{number}"']
    lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(path))}" for path in sorted(top)]
    for number, path in enumerate(hidden):
        where = shlex.quote(str(path))
        lines += [f"mkdir -p {where}", f'mount --bind "$hold/{number}" {where}']
    return "\n".join(lines)


def as_account(user: int, group: int, *command: str | Path, writable: tuple[Path, ...] = ()) -> list[str]:
    """A command that runs under an account without privileges; all that it may write is named."""
    script = ["set -e", reachable()]
    script += [f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(path))}" for path in writable]
    script += ["mount -o remount,bind,ro /"]
    account = f"--reuid={user} --regid={group} --clear-groups"
    script += [f'exec setpriv {account} --no-new-privs --inh-caps=-all --bounding-set=-all "$@"']
    return ["unshare", "--mount", "sh", "-c", "\n".join(script), "sh", *map(str, command)]


def grandrounds(*command: str | Path) -> str:
    program = [sys.executable, "-m", "grandrounds", *map(str, command)]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass
class Site:
    """One site, with its programs under their accounts.

    Attributes:
        top: Holds everything.
        programs: The custodian's and the courier's process.
    """

    top: Path
    programs: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """What `site join` made."""
        return self.top / "site"

    @property
    def data(self) -> Path:
        """The patients'."""
        return self.top / "data" / "hungary"

    @property
    def federation(self) -> Path:
        """The coordinator's; its SuperLink is reached without a gateway."""
        return self.top / "fed"

    def start(self, name: str, command: list[str]) -> None:
        with (self.top / f"{name}.log").open("wb") as log:
            mine = ENVIRONMENT | {"TMPDIR": str(self.folder / name)}
            self.programs[name] = subprocess.Popen(command, env=mine, stdout=log, stderr=log)

    def await_true(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not holds():
            for name, program in self.programs.items():
                assert program.poll() is None, (self.top / f"{name}.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def seen_by(self, user: int, group: int) -> dict[str, object]:
        """What an account gets at."""
        probe = as_account(user, group, sys.executable, "-c", PROBE, self.folder, self.data)
        done = subprocess.run(probe, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seen: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return seen


def found(site: Site) -> None:
    """Make a federation and its site Hungary, given to its accounts as its README says."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = ["--host", "127.0.0.1", "--port", port, "--superlink-port", port, "--sites", ",".join(SITES)]
    made = json.loads(grandrounds("federation", "init", site.federation, *where, "--json"))
    kit = next(one for one in made if one["site"] == "hungary")
    grandrounds("rehearse", site.top / "data")
    answers = ["--seal", kit["seal"], "--data", site.data / "data.toml", "--unit", "record", "--study", "*"]
    answers += ["--declared-size", "150", "--lifetime-epsilon", "4", "--run-epsilon", "1"]
    grandrounds("site", "join", kit["kit"], site.folder, *answers)
    policy = site.folder / "custodian" / "site.toml"
    text = policy.read_text().replace("every-seconds = 30.0", "every-seconds = 0.0")
    policy.write_text(text.replace("approval = true", "approval = false"))
    for path, owner, group in (
        (site.folder / "custodian", CUSTODIAN, GROUP),
        (site.folder / "door", CUSTODIAN, GROUP),
        (site.folder / "courier", COURIER, GROUP),
        (site.data, CUSTODIAN, CUSTODIAN),
    ):
        subprocess.run(["chown", "-R", f"{owner}:{group}", path], check=True)
    site.data.chmod(0o700)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(Path(tempfile.mkdtemp(dir="/var/tmp", prefix="gr-")))
    site.top.chmod(0o755)
    folder, program = site.folder, [sys.executable, "-m", "grandrounds", "site"]
    try:
        found(site)
        grandrounds("federation", "start", site.federation)
        serve = [*program, "serve", "--policy", folder / "custodian" / "site.toml"]
        mine = (folder / "custodian", folder / "door")
        alone = ["unshare", "--net"]
        site.start("custodian", [*alone, *as_account(CUSTODIAN, GROUP, *serve, writable=mine)])
        carry = [*program, "courier", "--settings", folder / "courier" / "courier.toml"]
        site.start("courier", as_account(COURIER, GROUP, *carry, writable=(folder / "courier",)))
        site.await_true((folder / "door" / "custodian.sock").exists)
        yield site
    finally:
        for started in site.programs.values():
            started.terminate()
        for started in site.programs.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(10)
            started.kill()
        with contextlib.suppress(AssertionError):
            grandrounds("federation", "stop", site.federation)
        shutil.rmtree(site.top)


def status_of(process: int) -> dict[str, str]:
    lines = (Path("/proc") / str(process) / "status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.parametrize(("name", "user"), [("custodian", CUSTODIAN), ("courier", COURIER)])
def test_neither_has_a_privilege_or_writes_but_to_its_own_folders(site, name, user):
    process = site.programs[name].pid
    status = status_of(process)
    assert status["Uid"].split() == [str(user)] * 4 and not status["Groups"].split()
    assert {int(status[kind], 16) for kind in ("CapEff", "CapPrm", "CapBnd", "CapInh")} == {0}
    assert status["NoNewPrivs"] == "1"
    mounts = [line.split() for line in Path(f"/proc/{process}/mounts").read_text().splitlines()]
    options = {place: kinds.split(",") for _, place, _, kinds, *_ in mounts}
    assert "ro" in options["/"]
    assert {place for place in options if place.startswith(str(site.top)) and "rw" in options[place]} == {
        str(site.folder / own) for own in ((name, "door") if name == "custodian" else (name,))
    }


def test_the_custodian_has_no_network(site):
    shown = Path(f"/proc/{site.programs['custodian'].pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in shown] == ["lo"]


def test_the_couriers_account_gets_to_the_door_and_to_nothing_behind_it(site):
    seen = site.seen_by(COURIER, GROUP)
    assert seen.pop("door") == "hungary" and "PRIVATE KEY" in str(seen.pop("courier"))
    assert seen == dict.fromkeys(seen, "PermissionError")


def test_the_custodians_account_does_not_get_at_the_couriers_keys(site):
    assert site.seen_by(CUSTODIAN, GROUP)["courier"] == "PermissionError"


def test_other_accounts_get_not_even_to_the_door(site):
    seen = site.seen_by(ANOTHER, ANOTHER)
    assert seen == dict.fromkeys(seen, "PermissionError")


def test_a_study_is_held_so(site):
    federation = open_federation(site.federation)
    site.await_true(lambda: "online" in {node.status for node in nodes(federation)})
    ended = json.loads(grandrounds("federation", "run", site.federation, "--run-config", STUDY, "--json"))
    assert ended["status"] == "finished:completed"
    (line,) = read(Path(ended["results"]) / "summary.json").history
    assert set(line.answered) == {"hungary"}
    assert (site.folder / "custodian" / "state" / "student.safetensors").exists()
