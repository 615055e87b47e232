"""What a round costs when nobody does anything: both backends side by side in one run.

    python -m simulations.benchmarks.rounds [--nodes 10,100] [--rounds 20] [--payload 1000] [--json]

The app in `noop_app` sends every node an array of `--payload` bytes and gets it back. A round's time is
what its ServerApp measures around `send_and_receive`: the median over the rounds after the first one, which
pays for the start of Ray's workers. `whole run` is what a user waits for, start and stop included.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.config import Scalar
from simulations.benchmarks.noop_app import noop
from simulations.inprocess import run_inprocess
from simulations.ray_backend import run_ray

NOOP_APP = Path(noop.__file__).parent

TARGETS = {10: 0.025, 100: 0.2}
"""Seconds that a round may take in process, by number of nodes."""
TARGET_RATIO = 3.0
"""How much longer Ray takes, at least."""


@dataclass(frozen=True)
class Timing:
    """One backend with one number of nodes."""

    round_seconds: float
    whole_run_seconds: float


@dataclass(frozen=True)
class Comparison:
    """Both backends with one number of nodes."""

    nodes: int
    inprocess: Timing
    ray: Timing
    ratio: float
    """Ray's round over the in-process round."""


def compare(nodes: int, rounds: int, payload: int) -> Comparison:
    """Time both backends.

    Args:
        nodes: How many nodes answer in each round.
        rounds: How many rounds count.
        payload: Bytes of the array that travels in each direction.
    """
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        config: dict[str, Scalar] = {
            "rounds": rounds + 1,
            "nodes": nodes,
            "payload": payload,
            "record": str(record),
            "failing-node": -1,
            "fail": False,
        }

        def inprocess(config: Mapping[str, Scalar]) -> None:
            run_inprocess(config, nodes, noop.server_app, noop.client_app)

        def ray(config: Mapping[str, Scalar]) -> None:
            run_ray(NOOP_APP, config, nodes, Path(folder) / "ray.log")

        here, there = _time(inprocess, config, record), _time(ray, config, record)
    return Comparison(nodes, here, there, there.round_seconds / here.round_seconds)


def _time(run: Callable[[Mapping[str, Scalar]], None], config: Mapping[str, Scalar], record: Path) -> Timing:
    started = time.perf_counter()
    run(config)
    whole = time.perf_counter() - started
    seconds = json.loads(record.read_text())["seconds"]
    return Timing(round_seconds=statistics.median(seconds[1:]), whole_run_seconds=whole)


def as_table(comparisons: list[Comparison]) -> Table:
    """Lay the comparisons out for a terminal."""
    table = Table(title="A no-op round")
    for column in (
        "sites",
        "in process",
        "target",
        "ray",
        "ray ÷ in process",
        "whole run in process",
        "whole run ray",
    ):
        table.add_column(column, justify="right")
    for c in comparisons:
        target = TARGETS.get(c.nodes)
        table.add_row(
            str(c.nodes),
            f"{c.inprocess.round_seconds * 1e3:.1f} ms",
            f"≤ {target * 1e3:.0f} ms" if target else "",
            f"{c.ray.round_seconds * 1e3:.0f} ms",
            f"{c.ratio:.0f} (≥ {TARGET_RATIO:.0f})",
            f"{c.inprocess.whole_run_seconds:.1f} s",
            f"{c.ray.whole_run_seconds:.1f} s",
        )
    return table


def met(comparison: Comparison) -> bool:
    """Whether a comparison meets its targets."""
    fast = comparison.inprocess.round_seconds <= TARGETS.get(comparison.nodes, float("inf"))
    return fast and comparison.ratio >= TARGET_RATIO


def main() -> None:
    """Run the benchmark; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.rounds", description=__doc__)
    parser.add_argument("--nodes", default="10,100", help="numbers of sites, with commas")
    parser.add_argument("--rounds", type=int, default=20, help="rounds that count")
    parser.add_argument("--payload", type=int, default=1000, help="bytes that travel each way")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    comparisons = [
        compare(int(nodes), arguments.rounds, arguments.payload) for nodes in arguments.nodes.split(",")
    ]
    if arguments.json:
        print(json.dumps([asdict(comparison) for comparison in comparisons], indent=2))
    else:
        Console().print(as_table(comparisons))
    raise SystemExit(not all(map(met, comparisons)))


if __name__ == "__main__":
    main()
