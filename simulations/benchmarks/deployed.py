"""What a deployment costs: a round beside Flower's own, what a site sends, what a waiting custodian holds.

    python -m simulations.benchmarks.deployed round [--sites 2] [--rounds 10] [--json]
    python -m simulations.benchmarks.deployed outbound [--sites 4] [--rounds 30] [--json]      # as root
    python -m simulations.benchmarks.deployed custodians [--number 50] [--json]

`round`: rounds of `heart` through SuperLink, gateway, SuperNodes, couriers and custodians; and rounds of a
Flower app that does nothing, with as many nodes, through Flower's own programs, without TLS, as they come.
`outbound`: one study with every place in a network namespace; each packet that a site sends is counted whole,
IP header included, and so is where it goes. `custodians`: so many served sites on one machine before the
first task, each with its share of what they hold in common (PSS), or with all of that (RSS).
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from client.founding import Choices, found
from common.config import RunConfig
from common.errors import UserError
from common.runs import working_folder
from common.site_files import own_program
from server.flower_programs import flwr_answer, program, tail
from server.results import ROUNDS
from simulations.drills.local import (
    COORDINATOR,
    Local,
    Study,
    free_ports,
    heart_study,
    local_federation,
    wait,
)
from simulations.drills.processes import Program, Services
from simulations.superlink import superlink

PATIENCE = 1800.0
NOOP = Path(__file__).parent / "noop_app"
MOST_OVERHEAD, MOST_OUTBOUND, MOST_MEMORY = 1.0, 1_000_000, 80.0
"""What is to be reached: seconds a round, bytes of a site's study, MiB of a custodian."""
TCP = 6


@dataclass(frozen=True)
class Overhead:
    """Seconds of a round, the median over many."""

    ours: float
    flowers: float
    overhead: float


@dataclass(frozen=True)
class Outbound:
    """What one site sent, from its first packet to the study's end.

    Attributes:
        bytes: IP packets, headers included.
        packets: How many; a frame of Ethernet would add 18 bytes to each.
        elsewhere: Packets to anywhere but the coordinator's gateway.
        rounds: Rounds of the study.
        seconds: From the site's start to the end.
    """

    bytes: int
    packets: int
    elsewhere: int
    rounds: int
    seconds: float


@dataclass(frozen=True)
class Memory:
    """MiB of one custodian that waits: the most of any."""

    number: int
    pss: float
    rss: float


def round_overhead(sites: int, rounds: int) -> Overhead:
    """Time our rounds and Flower's own, one deployment after the other."""
    folder = Path(tempfile.mkdtemp(prefix="gr-"))
    try:
        ours, flowers = _our_rounds(folder, sites, rounds), _flowers_rounds(folder / "floor", sites, rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Overhead(ours, flowers, ours - flowers)


def outbound(sites: int, rounds: int) -> dict[str, Outbound]:
    """Count what each site sends in a study.

    Raises:
        UserError: if this machine can't have a network of its own, or the study doesn't complete.
    """
    folder = Path(tempfile.mkdtemp(prefix="gr-"))
    try:
        with local_federation(folder, _study(sites, rounds), networked=True) as local:
            began = time.monotonic()
            local.run_all()
            if not (study := _studied(local)).result:
                raise UserError(f"the study did not complete: {study.failures}")
            seconds = time.monotonic() - began
            assert local.network is not None
            gateway = (local.network.address(COORDINATOR), TCP, local.federation.settings.port)
            sent = {site: local.network.sent[site] for site in local.sites}
            return {
                site: Outbound(one.bytes, one.packets, one.packets - one.to[gateway], rounds, seconds)
                for site, one in sent.items()
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def custodians(number: int) -> Memory:
    """Serve so many sites and weigh each while it waits."""
    folder = Path(tempfile.mkdtemp(prefix="gr-"))
    try:
        with Services() as services:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
            for place in range(number):
                policy = _found_one(folder / f"s{place}")
                command = [*own_program(), "site", "serve", "--policy", str(policy)]
                services.run(f"{place}", Program(command, folder / f"{place}.log", environment))
            sockets = [folder / f"s{place}" / "custodian.sock" for place in range(number)]
            if not wait(lambda: all(socket.exists() for socket in sockets), PATIENCE):
                raise UserError(f"not every custodian serves: {(folder / '0.log').read_text()}")
            pids = [pid for one in services.programs.values() if (pid := one.pid) is not None]
            return Memory(
                len(pids), max(_mib(pid, "Pss") for pid in pids), max(_mib(pid, "Rss") for pid in pids)
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _our_rounds(folder: Path, sites: int, rounds: int) -> float:
    with local_federation(folder, _study(sites, rounds)) as local:
        local.run_all()
        study = Study(local, "timed")
        study.begin()
        noted = working_folder(local.federation.runs / study.name) / ROUNDS
        ends: list[float] = []
        deadline = time.monotonic() + PATIENCE
        while len(ends) < rounds and time.monotonic() < deadline:
            held = noted.read_text().count("\n") if noted.exists() else 0
            ends += [time.monotonic()] * (held - len(ends))
            time.sleep(0.02)
        if not study.to_its_end(PATIENCE, most_resumes=0):
            raise UserError(f"the study did not complete: {study.failures}")
    return statistics.median(after - before for before, after in pairwise(ends))


def _flowers_rounds(home: Path, nodes: int, rounds: int) -> float:
    """Time the app that does nothing, through Flower's programs as they come."""
    home.mkdir()
    record = home / "record.json"
    with superlink(home, "floor", "--database", str(home / "state.db")) as link, Services() as services:
        for place, port in enumerate(free_ports(nodes)):
            node = [program("flower-supernode"), "--insecure", "--superlink", link.address]
            node += ["--host", "127.0.0.1", "--port", str(port), "--node-config", f"partition-id={place}"]
            services.run(f"node {place}", Program(node, home / f"node-{place}.log", link.environment))
        settings = f'rounds={rounds} nodes={nodes} record="{record}"'
        flwr_answer(link.environment, "run", str(NOOP), "floor", "--run-config", settings)
        if not wait(record.exists, PATIENCE):
            raise UserError(f"Flower's own app did not end:\n{tail(home / 'superlink.log')}")
        time.sleep(0.5)
        seconds: list[float] = json.loads(record.read_text())["seconds"]
        return statistics.median(seconds[1:])


def _study(sites: int, rounds: int) -> RunConfig:
    return heart_study(sites, f"num-rounds={rounds} min-sites={sites} round-timeout=300.0")


def _studied(local: Local) -> Study:
    study = Study(local, "counted")
    study.begin()
    study.to_its_end(PATIENCE, most_resumes=0)
    return study


def _found_one(folder: Path) -> Path:
    folder.mkdir()
    (folder / "data.toml").write_text(
        'target = "ill"\nclasses = ["no", "yes"]\n\n[[features]]\nname = "age"\nkind = "numeric"\n\n'
        '[sites.one]\ndeclared-size = 100\nfile = "patients.csv"\n'
    )
    choices = Choices(
        site="one",
        description="data.toml",
        unit="record",
        declared_size=100,
        delta=1e-5,
        lifetime_epsilon=2.0,
        run_epsilon=1.0,
        studies=["*"],
        listen="unix:custodian.sock",
    )
    return found(folder, choices)


def _mib(pid: int, what: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise UserError(f"/proc/{pid}/smaps_rollup says nothing of {what}")


def main() -> int:
    """Measure one thing and print it; exit code 1 if it isn't what is to be reached."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["round", "outbound", "custodians"])
    parser.add_argument("--sites", type=int, default=0, help="default: 2, or 4 for outbound")
    parser.add_argument("--rounds", type=int, default=0, help="default: 10, or 30 for outbound")
    parser.add_argument("--number", type=int, default=50, help="of custodians")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    shown: object
    if given.what == "round":
        cost = round_overhead(given.sites or 2, given.rounds or 10)
        shown, well = asdict(cost), cost.overhead <= MOST_OVERHEAD
        text = f"a round {cost.ours:.2f} s, Flower's own {cost.flowers:.2f} s: {cost.overhead:+.2f} s"
    elif given.what == "outbound":
        sent = outbound(given.sites or 4, given.rounds or 30)
        shown = {site: asdict(one) for site, one in sent.items()}
        well = all(one.bytes <= MOST_OUTBOUND and not one.elsewhere for one in sent.values())
        text = "\n".join(
            f"{site}: {one.bytes:,} bytes in {one.packets:,} packets, {one.elsewhere} of them not to the "
            f"gateway, in {one.rounds} rounds and {one.seconds:.0f} s"
            for site, one in sent.items()
        )
    else:
        memory = custodians(given.number)
        shown, well = asdict(memory), memory.rss <= MOST_MEMORY
        text = f"{memory.number} custodians: {memory.pss:.1f} MiB (PSS), {memory.rss:.1f} MiB (RSS) at most"
    if given.json:
        sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    else:
        Console(soft_wrap=True, highlight=False).print(text, markup=False)
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
