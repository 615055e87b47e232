"""What deep students send, and what it buys: opinions on public cases beside weights, in one run.

    python -m simulations.benchmarks.opinions_or_weights [--epsilon 3] [--seeds 0,1,2] [--json]

Every site's student is a perceptron (`mlp`) of 109,386 parameters on the pixels of `fashion`, and so is the
teacher. Its trunk is trained on the proxy. All contenders see the same cases, start from the same teacher
and pay the same ε; each has the rounds, steps and step size that did best at ε = 3 among a handful, with
seed 300, on 5,000 training images that nobody else saw.

Bytes are those of one site in all rounds: whole releases and tasks for the federation, weights in float32 for
the others.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common.config import Layers, RunConfig, Scalar
from common.errors import UserError
from common.metrics import headline_metric
from simulations.baselines.bench import Bench, Outcome
from simulations.baselines.registry import METHODS
from simulations.commands import parse_seeds, quiet_libraries
from simulations.settings import run_settings
from simulations.simulate import check

DEEP = (
    'student.model="mlp" student.features="none" '
    'teacher.model="mlp" teacher.features="none" teacher.layers="head"'
)


@dataclass(frozen=True)
class Contender:
    """One line of the table: a method, which layers take private steps and travel, and its settings."""

    label: str
    method: str
    layers: Layers
    settings: Mapping[str, Scalar]


def _steps(rounds: int, steps: int, size: float, momentum: float = 0.0) -> dict[str, Scalar]:
    return {
        "num-rounds": rounds,
        "privacy.steps-per-round": steps,
        "privacy.step-size": size,
        "aggregation.momentum": momentum,
    }


_DESCENT = _steps(30, 1, 4.0, 0.9)
CONTENDERS = (
    Contender("Teacher alone", "teacher-alone", "head", {}),
    Contender("Federation, int4, 400 cases", "federation", "head", {**_DESCENT, "codec": "int4"}),
    Contender(
        "Federation, int2, 200 cases", "federation", "head", {**_DESCENT, "codec": "int2", "proxy-cases": 200}
    ),
    Contender(
        "Federation, int4, steps in all layers",
        "federation",
        "all",
        {**_steps(30, 1, 0.5, 0.9), "codec": "int4"},
    ),
    Contender("DP-FedAvg, all weights", "dp-fedavg", "all", _steps(10, 10, 4.0)),
    Contender("DP-FedSGD, all weights", "dp-fedsgd", "all", _steps(30, 1, 4.0, 0.9)),
    Contender("DP-FedSGD, the head's weights", "dp-fedsgd", "head", _steps(30, 1, 4.0, 0.9)),
)


@dataclass(frozen=True)
class Line:
    """What a contender came to: scores by seed, and bytes of one site in all rounds."""

    label: str
    metric: str
    scores: tuple[float, ...]
    bytes_up: float
    bytes_down: float


def measure(config: RunConfig, contenders: Sequence[Contender], seeds: Sequence[int]) -> list[Line]:
    """Run every contender once a seed, under a progress bar.

    Raises:
        UserError: if the configuration is refused or a run fails.
    """
    check(config, seeds)
    found: dict[str, list[Outcome]] = {one.label: [] for one in contenders}
    with Progress(console=Console(stderr=True)) as progress:
        runs = progress.add_task("runs", total=len(contenders) * len(seeds))
        for seed in seeds:
            benches: dict[Layers, Bench] = {}
            for one in contenders:
                seeded = config.changed({"seed": seed, "student.private-layers": one.layers})
                bench = benches.get(one.layers) or benches.setdefault(one.layers, Bench.open(seeded))
                outcome = METHODS[one.method].run(seeded.changed(one.settings), bench)
                if outcome is None:
                    raise UserError(f"{one.label}: the run has nothing that it could learn from")
                found[one.label].append(outcome)
                progress.advance(runs)
    metric = headline_metric(bench.public.proxy.preprocessing.classes)
    return [line(label, metric, outcomes) for label, outcomes in found.items()]


def line(label: str, metric: str, outcomes: Sequence[Outcome]) -> Line:
    """Sum one contender's seeds up."""
    up, down = (
        statistics.fmean(sizes)
        for sizes in (
            [one.bytes_up * one.rounds for one in outcomes],
            [one.bytes_down * one.rounds for one in outcomes],
        )
    )
    return Line(label, metric, tuple(one.scores[metric] for one in outcomes), up, down)


def as_table(lines: Sequence[Line]) -> Table:
    """Lay the lines out for a terminal."""
    table = Table()
    table.add_column("")
    for column in (f"{lines[0].metric} × 100", "a site sends, in all", "and gets"):
        table.add_column(column, justify="right")
    for one in lines:
        spread = f" ± {100 * statistics.stdev(one.scores):.1f}" if len(one.scores) > 1 else ""
        score = f"{100 * statistics.fmean(one.scores):.1f}{spread}"
        table.add_row(one.label, score, f"{one.bytes_up:,.0f}", f"{one.bytes_down:,.0f}")
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.opinions_or_weights", description=__doc__
    )
    parser.add_argument("--epsilon", default="3", help="ε of the whole run at each site")
    parser.add_argument("--seeds", default="0,1,2", help="repetitions, with commas")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        config = run_settings("fashion", [DEEP, f"privacy.epsilon={arguments.epsilon}"])
        lines = measure(config, CONTENDERS, parse_seeds(arguments.seeds))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps([asdict(one) for one in lines], indent=2))
    else:
        Console().print(as_table(lines))


if __name__ == "__main__":
    main()
