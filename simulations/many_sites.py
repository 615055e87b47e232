"""What it costs to be many: every site adds noise of its own.

    python -m simulations.many_sites [--scenario fashion] [--run-config …] [--epsilons 1,3,8] [--seeds 0,1,2]

One party with all N records hides one of them behind noise of σ·C on its sum of clipped gradients. K sites
that trust nobody each hide theirs behind the same noise, and what adds up is √K·σ·C, on the same signal.
These lines show whether anything else stands between the federation and that party:

| line | what it is |
|---|---|
| `K sites` | the run itself |
| `1 site, √K times the noise` | the same, all records at one site, under an ε that brings K sites' noise |
| `1 site` | the same, all records at one site |
| `pooled` | one party with all records that takes the same steps in its weights |
| `K sites`, ε = 1000 | the run with next to no noise: what dealing records to sites costs by itself |

Where the first two lines are alike, no run whose sites each add their own noise to such steps comes nearer to
the third.
"""

import argparse
import json
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from common.config import RunConfig
from common.errors import UserError
from common.metrics import headline_metric
from simulations.baselines.bench import Bench, plan_alone
from simulations.baselines.product import federation
from simulations.baselines.references import pooled_dp
from simulations.commands import parse_seeds
from simulations.settings import run_settings

NEXT_TO_NO_NOISE = 1000.0
"""The largest ε that a run may ask for."""


@dataclass(frozen=True)
class Line:
    """One contender under one ε.

    Attributes:
        name: The contender.
        epsilon: Of every site, or of the pooled party.
        scores: × 100, seed by seed.
    """

    name: str
    epsilon: float
    scores: tuple[float, ...]


def measure(config: RunConfig, epsilons: Sequence[float], seeds: Sequence[int]) -> list[Line]:
    """Run every contender under every ε and seed."""
    found: dict[tuple[str, float], list[float]] = {}
    console = Console(stderr=True)
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        bench = Bench.open(seeded)
        metric = headline_metric(bench.public.proxy.preprocessing.classes)
        for name, epsilon, scores in contenders(seeded, bench, epsilons):
            found.setdefault((name, epsilon), []).append(100 * scores[metric])
            console.print(f"seed {seed}, {name}, ε = {epsilon:g}: {100 * scores[metric]:.1f}")
    return [Line(name, epsilon, tuple(scores)) for (name, epsilon), scores in found.items()]


def contenders(
    config: RunConfig, bench: Bench, epsilons: Sequence[float]
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Each contender's name, ε and scores on the public test cases, for one seed."""
    many = len(bench.parties)
    for epsilon in epsilons:
        own = config.changed({"privacy.epsilon": epsilon})
        alone = own.changed({"data.num-sites": 1})
        louder = alone.changed({"privacy.epsilon": epsilon_of_noise(own, math.sqrt(many))})
        yield f"{many} sites", epsilon, federation(own, bench).scores
        yield f"1 site, √{many} times the noise", epsilon, federation(louder, bench).scores
        yield "1 site", epsilon, federation(alone, bench).scores
        yield "pooled", epsilon, pooled_dp(own, bench)
    noiseless = config.changed({"privacy.epsilon": NEXT_TO_NO_NOISE})
    yield f"{many} sites", NEXT_TO_NO_NOISE, federation(noiseless, bench).scores


def epsilon_of_noise(config: RunConfig, times: float) -> float:
    """The ε at which a run's noise multiplier is so many times as large, to a thousandth."""
    wanted = times * plan_alone(config).noise_multiplier()
    low, high = 1e-6 * config.privacy.epsilon, config.privacy.epsilon
    while high > 1.001 * low:
        middle = math.sqrt(low * high)
        noise = plan_alone(config.changed({"privacy.epsilon": middle})).noise_multiplier()
        low, high = (middle, high) if noise > wanted else (low, middle)
    return high


def as_table(lines: Sequence[Line]) -> Table:
    """Lay the lines out for a terminal."""
    epsilons = list(dict.fromkeys(line.epsilon for line in lines))
    found = {(line.name, line.epsilon): line for line in lines}
    table = Table(title="Score × 100: what many sites cost")
    for column in ("", *(f"ε = {epsilon:g}" for epsilon in epsilons)):
        table.add_column(column, justify="right" if column else "left")
    for name in dict.fromkeys(line.name for line in lines):
        table.add_row(name, *(_in_words(found.get((name, epsilon))) for epsilon in epsilons))
    return table


def _in_words(line: Line | None) -> str:
    if line is None:
        return ""
    spread = f" ± {statistics.stdev(line.scores):.1f}" if len(line.scores) > 1 else ""
    return f"{statistics.mean(line.scores):.1f}{spread}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m simulations.many_sites", description=__doc__)
    parser.add_argument("--scenario", default="fashion", help="a scenario, or a run-config file")
    parser.add_argument("--run-config", action="append", default=[], help="as in `grandrounds simulate`")
    parser.add_argument("--epsilons", default="1,3,8", help="with commas")
    parser.add_argument("--seeds", default="0,1,2", help="with commas")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        config = run_settings(arguments.scenario, arguments.run_config)
        epsilons = [float(epsilon) for epsilon in arguments.epsilons.split(",")]
        lines = measure(config, epsilons, parse_seeds(arguments.seeds))
    except (UserError, ValueError) as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps([asdict(line) for line in lines], indent=2))
    else:
        Console().print(as_table(lines))


if __name__ == "__main__":
    main()
