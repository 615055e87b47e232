"""What a byte buys: the federation's score for each codec.

    python -m simulations.benchmarks.bytes [SCENARIO] [--codecs int8,int4,int2,int1] [--cases 400,200]
        [--epsilons 1,3,8] [--seeds 0,1,2] [--run-config 'key=value …'] [--picture FILE.svg] [--json]

Every point is whole runs of the scenario, one a seed, without the comparisons that `grandrounds simulate`
adds. Bytes are those of one site's release in one round, its header of 121 bytes included: the mean over
sites, rounds and seeds, and the largest. Without `--cases` or `--epsilons` the scenario's own are taken.
"""

import argparse
import io
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from common.config import RunConfig
from common.errors import UserError
from common.runs import write_whole
from common.summary import Summary, merge
from simulations.baselines.product import summary_of
from simulations.commands import parse_seeds, quiet_libraries
from simulations.settings import run_settings
from simulations.simulate import check


@dataclass(frozen=True)
class Point:
    """One codec at one ε and one number of proxy cases (0: all)."""

    codec: str
    cases: int
    epsilon: float
    bytes_mean: float
    bytes_max: int
    metric: str
    score: float
    std: float


def configurations(arguments: argparse.Namespace) -> list[RunConfig]:
    """Every combination of what was asked for.

    Raises:
        UserError: if one is refused.
    """
    axes = {
        "privacy.epsilon": arguments.epsilons.split(",") if arguments.epsilons else [],
        "codec": [json.dumps(name) for name in arguments.codecs.split(",")],
        "proxy-cases": arguments.cases.split(",") if arguments.cases else [],
    }
    asked = [[f"{key}={value}" for value in values] for key, values in axes.items() if values]
    return [
        run_settings(arguments.scenario, [*arguments.run_config, *overrides])
        for overrides in itertools.product(*asked)
    ]


def point(config: RunConfig, summaries: Sequence[Summary]) -> Point:
    """Sum the seeds of one configuration up."""
    summary = merge(summaries)
    sizes, metric = summary.bytes_up_per_site_per_round, summary.headline_metric
    score = summary.results.federation[metric]
    asked = (config.codec, config.proxy_cases, config.privacy.epsilon)
    return Point(*asked, sizes.mean, sizes.max, metric, score.mean, score.std)


def measure(configs: Sequence[RunConfig], seeds: Sequence[int]) -> list[Point]:
    """Run everything under a progress bar.

    Raises:
        UserError: if a configuration is refused, before any run, or if a run fails.
    """
    for config in configs:
        check(config, seeds)
    points = []
    with Progress(console=Console(stderr=True)) as progress:
        runs = progress.add_task("runs", total=len(configs) * len(seeds))
        for config in configs:
            summaries = []
            for seed in seeds:
                summaries.append(summary_of(config.model_copy(update={"seed": seed})))
                progress.advance(runs)
            points.append(point(config, summaries))
    return points


def as_table(points: Sequence[Point]) -> Table:
    """Lay the points out for a terminal."""
    table = Table()
    for column in ("ε", "codec", "proxy cases", "bytes a round", "at most", f"{points[0].metric} × 100"):
        table.add_column(column, justify="right")
    for one in points:
        score = f"{100 * one.score:.1f} ± {100 * one.std:.1f}"
        sizes = (f"{one.bytes_mean:,.0f}", f"{one.bytes_max:,}")
        table.add_row(f"{one.epsilon:g}", one.codec, str(one.cases or "all"), *sizes, score)
    return table


def draw(points: Sequence[Point], path: Path) -> None:
    """Draw score against bytes: a line for each ε and number of cases, a point for each codec.

    Raises:
        UserError: if the file can't be written.
    """
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bytes", "font.size": 10}):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        for epsilon, cases in dict.fromkeys((one.epsilon, one.cases) for one in points):
            line = [one for one in points if (one.epsilon, one.cases) == (epsilon, cases)]
            label = f"ε = {epsilon:g}, {cases or 'all'} proxy cases"
            sizes, scores = [one.bytes_mean for one in line], [100 * one.score for one in line]
            spread = [100 * one.std for one in line]
            axes.errorbar(sizes, scores, yerr=spread, marker="o", capsize=3, label=label)
            for one in line:
                place = (one.bytes_mean, 100 * one.score)
                axes.annotate(one.codec, place, xytext=(5, 5), textcoords="offset points")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks([125 * 2**power for power in range(10)])
        sizes = [one.bytes_mean for one in points]
        axes.set_xlim(min(sizes) / 1.4, max(sizes) * 1.4)
        axes.set_xlabel("bytes that a site sends in a round")
        axes.set_ylabel(f"{points[0].metric} × 100")
        axes.grid(axis="y", linewidth=0.5)
        axes.legend(loc="lower right", frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_whole(path, drawn.getvalue())


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.bytes", description=__doc__)
    parser.add_argument("scenario", nargs="?", default="fashion")
    parser.add_argument("--codecs", default="int8,int4,int2,int1", help="codecs, with commas")
    parser.add_argument("--cases", default="", help="numbers of proxy cases, with commas; 0 takes all")
    parser.add_argument("--epsilons", default="", help="ε of the whole run, with commas")
    parser.add_argument("--seeds", default="0,1,2", help="repetitions, with commas")
    parser.add_argument("--run-config", action="append", default=[], help="overrides, as in simulate")
    parser.add_argument("--picture", type=Path, help="an SVG file to draw to")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    quiet_libraries()
    try:
        points = measure(configurations(arguments), parse_seeds(arguments.seeds))
        if arguments.picture:
            draw(points, arguments.picture)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    if arguments.json:
        print(json.dumps([asdict(one) for one in points], indent=2))
    else:
        Console().print(as_table(points))


if __name__ == "__main__":
    main()
