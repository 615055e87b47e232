"""A federation with all its sites on this machine: founded as people found one, each program a process.

Coordinator: SuperLink, SuperExec and, where nginx is installed, the gateway. Each site: a custodian, and the
courier's programs. With a network (`simulations.drills.network`) the coordinator and every courier have a
network namespace of their own, and custodians one without any network; without it, all share the loopback.
Programs are started again when they end, as the units in kits do.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.founding import Choices
from client.joining import door, join, open_kit
from common.config import RunConfig
from common.datasets import sites
from common.errors import UserError
from common.logs import VARIABLE
from common.run_config_files import as_toml
from common.runs import CHECKPOINT, working_folder
from common.site_files import own_program
from server.federation import flower
from server.federation.processes import nginx
from server.federation.provisioning import Made, found_federation
from server.federation.settings import Federation, Settings, open_federation
from simulations.drills.network import Network
from simulations.drills.processes import Program, Services, descendants, kill, parent, words
from simulations.rehearsal import write_sites
from simulations.settings import run_settings

COORDINATOR = "coordinator"
PATIENCE = 300.0
"""Seconds for programs to be there."""
HEADROOM = 3.0
"""Each site's cap on a run's ε, over the study's: room for tasks that are charged again after a death."""
NGINX = nginx()
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Local:
    """The federation.

    Attributes:
        folder: Holds everything.
        federation: The coordinator's folder; another one once studies have moved.
        config: The study that is run, again and again under other names.
        services: The programs.
        network: Between them, if they have one of their own.
        environments: What a place's programs have in their environment beyond the usual.
    """

    folder: Path
    federation: Federation
    config: RunConfig
    services: Services
    network: Network | None = None
    environments: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def sites(self) -> Sequence[str]:
        """The sites' names."""
        return self.federation.settings.sites

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.folder / name

    def policy(self, name: str) -> Path:
        """A site's policy."""
        return self.site(name) / "custodian" / "site.toml"

    def call(self, *command: str | Path, place: str = COORDINATOR) -> "subprocess.CompletedProcess[str]":
        """Run one of our commands at a place to its end."""
        return subprocess.run(
            self._at(place, [*own_program(), *map(str, command)]),
            env=self._environment(place),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def start(self, command: Sequence[str | Path], log: Path) -> "subprocess.Popen[str]":
        """Start one of our commands at the coordinator, with its messages in a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self._at(COORDINATOR, [*own_program(), *map(str, command)]),
                env=self._environment(COORDINATOR),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def run_all(self) -> None:
        """Start everything and wait until every site is online."""
        self.run_coordinator()
        for site in self.sites:
            self.run_custodian(site)
            self.run_courier(site)
        self.await_nodes()

    def run_coordinator(self) -> None:
        """Start the coordinator's programs and tell the SuperLink the sites' keys."""
        self.run_front()
        self._run_part("superexec")
        self.await_superlink()

    def run_front(self) -> None:
        """Start what sites meet of the coordinator, the SuperLink and the gateway, and don't wait for it."""
        self._run_part("superlink")
        if NGINX:
            self.run_gateway()

    def run_gateway(self) -> None:
        """Start the gateway, where nginx is installed; without it the SuperLink stands in its place."""
        if NGINX:
            folder = str(self.federation.path)
            files = ["-p", folder, "-e", "logs/nginx.log", "-c", "nginx.conf", "-g", "daemon off;"]
            self._run("gateway", COORDINATOR, [NGINX, *files])
            return
        self._run_part("superlink")
        self.await_superlink()

    def lose_coordinator(self) -> None:
        """Kill the coordinator's programs for good, server processes too."""
        for part in ("superexec", "superlink"):
            self.services.retire(part, signal.SIGKILL)
        kill(self.servers())
        if NGINX:
            self.services.retire("gateway")  # whose workers would outlive a kill

    def await_superlink(self) -> None:
        """Wait until the SuperLink is there and knows the sites' keys.

        Raises:
            UserError: if it doesn't come.
        """
        done = self.call("federation", "register", self.federation.path)
        if done.returncode:
            raise UserError(f"the SuperLink did not start: {done.stderr}{self.said('superlink')}")

    def run_custodian(self, name: str) -> None:
        """Start a site's custodian."""
        serve = [*own_program(), "site", "serve", "--policy", str(self.policy(name))]
        self._run(f"{name} custodian", f"{name} custodian", serve)

    def run_courier(self, name: str) -> None:
        """Start a site's courier."""
        settings = self.site(name) / "courier" / "courier.toml"
        self._run(f"{name} courier", name, [*own_program(), "site", "courier", "--settings", str(settings)])

    def nodes(self) -> Mapping[str, str]:
        """What the SuperLink says of each site's node; nothing if it doesn't answer."""
        shown = self.call("federation", "status", self.federation.path, "--json").stdout
        try:
            return {node["site"]: node["status"] for node in json.loads(shown)["nodes"]}
        except ValueError:
            return {}

    def superlink_answers(self) -> bool:
        """Whether the SuperLink is there."""
        return bool(self.nodes()) if self.network else flower.answers(self.federation)

    def await_nodes(self, names: Sequence[str] | None = None) -> None:
        """Wait until sites are online.

        Raises:
            UserError: if they don't come.
        """
        wanted = self.sites if names is None else names
        found: Mapping[str, str] = {}

        def there() -> bool:
            nonlocal found
            found = self.nodes()
            return all(found.get(name) == "online" for name in wanted)

        if not wait(there, PATIENCE):
            raise UserError(f"not every node is online: {found}")

    def couriers(self, name: str) -> list[int]:
        """The processes that carry a message at a site just now."""
        pid = self.services.programs[f"{name} courier"].pid
        found = descendants(pid) if pid else []
        return [
            one
            for one in found
            if "client.pinned_app" in words(one)
            or ("forkserver" in words(one) and "forkserver" in words(parent(one)))
        ]

    def supernode(self, name: str) -> list[int]:
        """A site's SuperNode."""
        pid = self.services.programs[f"{name} courier"].pid
        return [one for one in (descendants(pid) if pid else []) if "client.supernode" in words(one)]

    def servers(self) -> list[int]:
        """The server processes of runs, also of those whose SuperExec has died."""
        return [one for one in self.services.processes() if "flwr-serverapp" in words(one)]

    def said(self, name: str) -> str:
        """What a program has said, over all its starts."""
        log = self._log(name)
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def _log(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}.log"

    def _run_part(self, part: str) -> None:
        self._run(part, COORDINATOR, [*own_program(), "federation", part, str(self.federation.path)])

    def _run(self, name: str, place: str, command: Sequence[str]) -> None:
        program = Program(self._at(place, command), self._log(name), self._environment(place))
        self.services.run(name, program)

    def _at(self, place: str, command: Sequence[str]) -> list[str]:
        return [*(self.network.prefix(place) if self.network else ()), *command]

    def _environment(self, place: str) -> dict[str, str]:
        ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", VARIABLE: "text"}
        return {**os.environ, **ours, **self.environments.get(place, {})}


def heart_study(sites: int, settings: str) -> RunConfig:
    """A study on `heart`, with its four hospitals or dealt to so many sites."""
    dealt = [] if sites == 4 else [f'data.partition="iid" data.num-sites={sites}']
    return run_settings("heart", [settings, *dealt])


@contextlib.contextmanager
def local_federation(
    folder: Path, config: RunConfig, *, networked: bool = False, lifetime_epsilon: float = 1000.0
) -> Iterator[Local]:
    """Found a federation and its sites; nothing runs yet, and all that ran is ended afterwards.

    Args:
        folder: Where all of it goes; its path must be short, since a socket's is.
        config: The study; its sites are the federation's.
        networked: Whether every place has a network namespace.
        lifetime_epsilon: Each site's cap for ever.

    Raises:
        UserError: if something can't be made.
    """
    names = [site.name for site in sites(config)]
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network.between([COORDINATOR, *names])) if networked else None
        outer, inner = free_ports(2)
        settings = Settings(
            name="drill",
            host=network.address(COORDINATOR) if network else "127.0.0.1",
            port=outer,
            superlink_host="127.0.0.1",
            superlink_port=inner if NGINX else outer,
            bundle="0" * 64,
            sites=tuple(names),
        )
        made = found_federation(folder / "fed", settings, config)
        write_sites(config, folder / "data")
        services = stack.enter_context(Services())
        local = Local(folder, open_federation(folder / "fed"), config, services, network)
        for kit in made:
            _join(local, kit, lifetime_epsilon)
        yield local


def _join(local: Local, kit: Made, lifetime_epsilon: float) -> None:
    opened, config = open_kit(kit.path, kit.seal), local.config
    proposal = opened.manifest.proposal
    choices = Choices(
        site=kit.site,
        description=str(local.folder / "data" / kit.site / "data.toml"),
        unit=config.privacy.unit,
        declared_size=proposal.declared_size or 1,
        delta=config.privacy.delta,
        lifetime_epsilon=lifetime_epsilon,
        run_epsilon=HEADROOM * config.privacy.epsilon,
        studies=["*"],
        listen=door(local.site(kit.site)),
    )
    joined = join(opened, local.site(kit.site), choices)
    # Nobody sits here to approve each study; and drills are not to take half a minute a round.
    text = joined.policy.read_text().replace("approval = true", "approval = false")
    joined.policy.write_text(text.replace("every-seconds = 30.0", "every-seconds = 0.0"))


@dataclass
class Study:
    """One study that somebody watches, and resumes when it breaks off.

    Attributes:
        local: Where it runs.
        name: Its run-id.
        changes: Keys of its run config that differ from the federation's study.
        resumed: How often it was resumed.
        failures: What was said of each time it ended otherwise than well.
        result: What `federation run --json` said at the good end.
    """

    local: Local
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    resumed: int = 0
    failures: list[str] = field(default_factory=list)
    result: dict[str, Any] | None = None
    _process: "subprocess.Popen[str] | None" = None

    def begin(self) -> None:
        """Submit it."""
        flat = {**self.local.config.flat(), "run-id": self.name, **self.changes}
        flat.pop("out")
        file = self.local.folder / f"{self.name}.toml"
        file.write_text(as_toml(flat))
        self._process = self._start("run", self.local.federation.path, "--run-config", file)

    def resume(self) -> None:
        """Go on with it, whatever is still being watched; begin again if no round was begun.

        A server process that dies between its last word on disk and its last word to Flower leaves a study
        that is whole.
        """
        self.let_go()
        final = self.local.federation.runs / self.name
        if final.exists():
            self.result = {"results": str(final)}
            return
        if not (working_folder(final) / CHECKPOINT).exists():
            self.begin()
            return
        self.resumed += 1
        self._process = self._start("resume", self.local.federation.path, self.name)

    def ended(self) -> bool:
        """Whether it has ended, well or not."""
        if self._process is None or self._process.poll() is None:
            return self._process is None
        out = self._process.stdout.read() if self._process.stdout else ""
        if self._process.returncode == 0:
            self.result = json.loads(out)
        else:
            self.failures.append(f"exit code {self._process.returncode}: {self._said()}")
        self._process = None
        return True

    def to_its_end(self, patience: float, most_resumes: int) -> bool:
        """Watch it until it is complete, resuming where it broke off; whether it is."""
        deadline, most = time.monotonic() + patience, self.resumed + most_resumes
        while time.monotonic() < deadline and self.result is None:
            if self.ended() and self.result is None:
                if self.resumed >= most:
                    return False
                time.sleep(1.0)
                self.resume()
            time.sleep(0.2)
        return self.result is not None

    def _start(self, *command: str | Path) -> "subprocess.Popen[str]":
        return self.local.start(["federation", *command, "--json"], self._log)

    def let_go(self) -> None:
        """Watch it no longer."""
        if self._process is not None and self._process.poll() is None:
            kill([*descendants(self._process.pid), self._process.pid])
            self._process.wait()
        self._process = None

    @property
    def _log(self) -> Path:
        return self.local.folder / f"{self.name}.log"

    def _said(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        told = [line for line in lines if not line.startswith("What it learned is kept")]
        return told[-1] if told else ""


def wait(until: Callable[[], bool], patience: float, look: float = 0.3) -> bool:
    """Wait for something; False if it doesn't come about in time."""
    deadline = time.monotonic() + patience
    while not (there := until()) and time.monotonic() < deadline:
        time.sleep(look)
    return there


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
