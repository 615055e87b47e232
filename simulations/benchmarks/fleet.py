"""How many sites one SuperLink carries while they wait for work.

    python -m simulations.benchmarks.fleet [--nodes 50,200] [--polls 10] [--json]

A SuperNode asks every three seconds whether there is a message for it: with thousands of sites this, not the
study, is what a coordinator's machine does all day. Here a SuperLink with its database on disk serves real
fleet connections of Flower's, each of which asks `--polls` times as fast as it can. `ms` is the SuperLink's
own processor time an enquiry, which another load on the machine doesn't change; `sites a core` is how often
that fits into three seconds.
"""

import argparse
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from flwr.supernode.fleet_http_connection import http_request_response
from rich.console import Console
from rich.table import Table

from simulations.superlink import superlink

POLLING_SECONDS = 3.0
"""How often a SuperNode asks (`flwr.supernode.start_client_internal`)."""
ASKING_AT_ONCE = 4


@dataclass(frozen=True)
class Load:
    """What enquiries cost with so many nodes registered.

    Attributes:
        nodes: Registered and active.
        joining_ms: Processor time of the SuperLink for a node to register and be active.
        ms: Processor time of the SuperLink for one enquiry without a message.
        sites_a_core: Sites whose enquiries fill one core.
    """

    nodes: int
    joining_ms: float
    ms: float
    sites_a_core: int


def load(nodes: int, polls: int) -> Load:
    """Measure with `nodes` nodes that ask `polls` times each."""
    with (
        tempfile.TemporaryDirectory() as folder,
        superlink(
            Path(folder), "fleet", "--isolation", "process", "--database", f"{folder}/state.db"
        ) as running,
        ExitStack() as up,
    ):
        before = _processor_seconds(running.pid)
        asks = [
            up.enter_context(http_request_response(running.address, insecure=True, max_retries=0))[1]
            for _ in range(nodes)
        ]
        joined = _processor_seconds(running.pid)
        with ThreadPoolExecutor(ASKING_AT_ONCE) as pool:
            for _ in range(polls):
                answers = list(pool.map(lambda ask: ask(), asks))
                assert answers == [None] * nodes, "a message came that nobody sent"
        asked = _processor_seconds(running.pid)
    each = (asked - joined) / (nodes * polls)
    return Load(nodes, 1e3 * (joined - before) / nodes, 1e3 * each, int(POLLING_SECONDS / each))


def _processor_seconds(pid: int) -> float:
    """Processor time of a process so far, from Linux's /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", default="50,200", help="numbers of nodes, with commas between")
    parser.add_argument("--polls", type=int, default=10, help="enquiries of each node")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    loads = [load(int(nodes), arguments.polls) for nodes in arguments.nodes.split(",")]
    if arguments.json:
        print(json.dumps([asdict(one) for one in loads], indent=2))
        return
    table = Table(title="One SuperLink, sites that wait for work")
    for column in ("nodes", "joining, ms", "an enquiry, ms", "sites a core"):
        table.add_column(column, justify="right")
    for one in loads:
        table.add_row(str(one.nodes), f"{one.joining_ms:.1f}", f"{one.ms:.2f}", f"{one.sites_a_core:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
