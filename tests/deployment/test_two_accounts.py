"""Custodian and courier as units and containers run them: under two accounts, one without a network.

What systemd and Docker do is done here by hand, in namespaces: an account without privileges, a network with
nobody in it, a file system of which only the folders that the unit names can be written. It takes root.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import app as courier
from common.config import RunConfig
from common.summary import read
from simulations.inprocess import run_inprocess

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
GROUP, CUSTODIAN, COURIER, ANOTHER = 10000, 10001, 10002, 10003  # as in compose files
STUDY = {"scenario": "heart", "run-id": "trial", "num-rounds": 1, "min-sites": 1}
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
    lines = ["hold=$(mktemp -d)", 'mount -t tmpfs none "$hold"']
    for number, path in enumerate(hidden):
        lines += [f'mkdir "$hold/{number}"', f'mount --bind {shlex.quote(str(path))} "$hold/{number}"']
    lines += [f"mount -t tmpfs -o mode=755 none {shlex.quote(str(path))}" for path in sorted(top)]
    for number, path in enumerate(hidden):
        where = shlex.quote(str(path))
        lines += [f"mkdir -p {where}", f'mount --bind "$hold/{number}" {where}']
    return "\n".join(lines)


def as_account(
    user: int, group: int, *command: str | Path, writable: tuple[Path, ...] | None = None
) -> list[str]:
    """A command that runs under an account without privileges.

    Args:
        user: The account's number.
        group: Its only group.
        command: The command.
        writable: If given, all it may write, and it gets no network.
    """
    script = ["set -e", reachable()]
    if writable is not None:
        script += [f"mount --bind {shlex.quote(str(path))} {shlex.quote(str(path))}" for path in writable]
        script += ["mount -o remount,bind,ro /"]
    account = f"--reuid={user} --regid={group} --clear-groups"
    script += [f'exec setpriv {account} --no-new-privs --inh-caps=-all --bounding-set=-all "$@"']
    alone = ["--net"] if writable is not None else []
    return ["unshare", "--mount", *alone, "sh", "-c", "\n".join(script), "sh", *map(str, command)]


def grandrounds(*command: str | Path) -> str:
    program = [sys.executable, "-m", "grandrounds", *map(str, command)]
    done = subprocess.run(program, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Site:
    """One site, with its custodian served under its account.

    Attributes:
        folder: What `site join` made.
        data: The patients'.
        custodian: Process id of the custodian.
    """

    folder: Path
    data: Path
    custodian: int

    def seen_by(self, user: int, group: int) -> dict[str, object]:
        """What an account gets at."""
        probe = as_account(user, group, sys.executable, "-c", PROBE, self.folder, self.data)
        done = subprocess.run(probe, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seen: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return seen


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Hungary, founded and given to its accounts as its README says."""
    top = Path(tempfile.mkdtemp(dir="/var/tmp", prefix="gr-"))
    top.chmod(0o755)
    folder, data = top / "site", top / "data" / "hungary"
    try:
        fed = top / "fed"
        made = grandrounds("federation", "init", fed, "--sites", "hungary", "--host", "127.0.0.1", "--json")
        (kit,) = json.loads(made)
        grandrounds("rehearse", top / "data")
        answers = ["--seal", kit["seal"], "--data", data / "data.toml", "--unit", "record", "--study", "*"]
        answers += ["--declared-size", "150", "--lifetime-epsilon", "4", "--run-epsilon", "1"]
        grandrounds("site", "join", kit["kit"], folder, *answers)
        policy = folder / "custodian" / "site.toml"
        text = policy.read_text().replace("every-seconds = 30.0", "every-seconds = 0.0")
        policy.write_text(text.replace("approval = true", "approval = false"))
        for path, owner, group in (
            (folder / "custodian", CUSTODIAN, GROUP),
            (folder / "door", CUSTODIAN, GROUP),
            (folder / "courier", COURIER, GROUP),
            (data, CUSTODIAN, CUSTODIAN),
        ):
            subprocess.run(["chown", "-R", f"{owner}:{group}", path], check=True)
        data.chmod(0o700)
        serve = [sys.executable, "-m", "grandrounds", "site", "serve", "--policy", policy]
        mine = (folder / "custodian", folder / "door")
        with (top / "log").open("wb") as log:
            program = subprocess.Popen(
                as_account(CUSTODIAN, GROUP, *serve, writable=mine), env=ENVIRONMENT, stdout=log, stderr=log
            )
        try:
            deadline = time.monotonic() + 60
            while not (folder / "door" / "custodian.sock").exists():
                assert program.poll() is None and time.monotonic() < deadline, (top / "log").read_text()
                time.sleep(0.1)
            yield Site(folder, data, program.pid)
        finally:
            program.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(10)
            program.kill()
    finally:
        shutil.rmtree(top)


def test_the_custodian_has_no_privilege_no_network_and_writes_its_own_folders_only(site):
    process = Path("/proc") / str(site.custodian)
    status = dict(
        line.split(":\t", 1) for line in (process / "status").read_text().splitlines() if ":\t" in line
    )
    assert status["Uid"].split() == [str(CUSTODIAN)] * 4 and status["Groups"].split() == []
    assert {int(status[name], 16) for name in ("CapEff", "CapPrm", "CapBnd", "CapInh")} == {0}
    assert status["NoNewPrivs"] == "1"
    interfaces = [
        line.split(":")[0].strip() for line in (process / "net" / "dev").read_text().splitlines()[2:]
    ]
    assert interfaces == ["lo"]
    mounts = [line.split() for line in (process / "mounts").read_text().splitlines()]
    assert "ro" in next(options.split(",") for _, place, _, options, *_ in reversed(mounts) if place == "/")


def test_the_couriers_account_gets_to_the_door_and_to_nothing_behind_it(site):
    seen = site.seen_by(COURIER, GROUP)
    assert seen.pop("door") == "hungary" and "PRIVATE KEY" in str(seen.pop("courier"))
    assert seen == dict.fromkeys(seen, "PermissionError")


def test_the_custodians_account_does_not_get_at_the_couriers_keys(site):
    assert site.seen_by(CUSTODIAN, GROUP)["courier"] == "PermissionError"


def test_other_accounts_get_not_even_to_the_door(site):
    seen = site.seen_by(ANOTHER, ANOTHER)
    assert seen == dict.fromkeys(seen, "PermissionError")


def test_a_study_is_held_so(site, tmp_path):
    class AtTheDoor(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            context.node_config = {"custodian": f"unix:{site.folder}/door/custodian.sock"}
            return courier(message, context)

    config = RunConfig.from_run_config(STUDY | {"out": str(tmp_path)})
    run_inprocess(config.flat(), 1, None, AtTheDoor())
    (line,) = read(tmp_path / "trial" / "summary.json").history
    assert set(line.answered) == {"hungary"}
    assert (site.folder / "custodian" / "state" / "student.safetensors").exists()
