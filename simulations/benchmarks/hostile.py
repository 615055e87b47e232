"""What hostile sites do to a run: the real apps, with couriers that `simulations.attacks` has replaced.

    python -m simulations.benchmarks.hostile [--scenario fashion] [--seeds 0,1,2] [--run-config …] [--json]
                                             [--defences stacking+validated,…] [--cases flip:1,flip:4,…]

Ten sites, of which the first, the first two or the first four are hostile. Every line is one attack by so
many sites, every column one defence: a choice of run-config keys. A cell is the mean score × 100 over the
seeds and, where there are several, the least of them. What counts:

- one of ten: at most two points below the same defence's run without a hostile site, and so for a colluding
  pair;
- four of ten: not below the model of public cases alone, seed by seed.

The exit code is 1 if `stacking+validated` misses one of these. A run on `fashion` takes half a minute of a
core, so all of the table takes hours: choose.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from client.app import app as honest_app
from client.simulated import close_sites
from common.config import RunConfig, Scalar
from common.datasets import sites
from common.errors import UserError
from common.summary import read
from simulations.attacks import ATTACKS, InfiltratedApp
from simulations.commands import parse_seeds
from simulations.inprocess import run_inprocess
from simulations.settings import run_settings

SITES = 10
MOST_LOST = 2.0
"""Points that a minority of one or two may cost."""
FEW, MANY = 2, 4
ATTACKED = (*((attack, 1) for attack in ATTACKS), ("collude", FEW), *((attack, MANY) for attack in ATTACKS))
"""Attacks, and how many of the ten sites take part."""
PROMISED = "stacking+validated"
NOBODY = "nobody"

DEFENCES: Mapping[str, Mapping[str, Scalar]] = {
    "mean": {"aggregation.rule": "mean"},
    "trimmed-mean": {"aggregation.rule": "trimmed-mean", "aggregation.trim": 0.4},
    "median": {"aggregation.rule": "median"},
    "geometric-median": {"aggregation.rule": "geometric-median"},
    "outlier-weights": {"aggregation.rule": "outlier-weights"},
    "mean+validated": {"aggregation.rule": "mean", "aggregation.validated": True},
    "outlier-weights+validated": {"aggregation.rule": "outlier-weights", "aggregation.validated": True},
    "stacking": {"aggregation.rule": "stacking"},
    PROMISED: {"aggregation.rule": "stacking", "aggregation.validated": True},
}
"""What a coordinator may set against hostile sites."""


@dataclass(frozen=True)
class Case:
    """One attack against one defence.

    Attributes:
        defence: The defence.
        attack: The attack; empty where all sites are honest.
        hostile: How many sites attack.
    """

    defence: str
    attack: str
    hostile: int


@dataclass(frozen=True)
class Cell(Case):
    """What came of it, × 100 and seed by seed.

    Attributes:
        scores: The federation's.
        public_only: The model of public cases alone.
    """

    scores: tuple[float, ...]
    public_only: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.scores) / len(self.scores)


def measure(config: RunConfig, case: Case, seed: int) -> tuple[float, float]:
    """Run one attack against one defence; return the federation's score and public cases' alone, × 100."""
    with tempfile.TemporaryDirectory(prefix="grandrounds-") as out:
        changes = {"seed": seed, "out": out, "run-id": "attacked", **DEFENCES[case.defence]}
        own = config.changed(changes)
        app = InfiltratedApp(honest_app, ATTACKS[case.attack], range(case.hostile)) if case.hostile else None
        try:
            run_inprocess(own.flat(), len(sites(own)), None, app)
        finally:
            close_sites()
        summary = read(Path(out) / "attacked" / "summary.json")
    results, metric = summary.results, summary.headline_metric
    public_only = results.public_only[metric].mean if results.public_only else 0.0
    return 100 * results.federation[metric].mean, 100 * public_only


def measure_all(config: RunConfig, cases: Sequence[Case], seeds: Sequence[int]) -> list[Cell]:
    """Fill all cells, one seed after another, so that its public features are computed once."""
    found: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    console = Console(stderr=True)
    for seed, case in track(list(product(seeds, cases)), "runs", console=console):
        score, public_only = measure(config, case, seed)
        found[case].append((score, public_only))
        console.print(f"seed {seed}, {case.defence}, {_line(case)}: {score:.1f}, public {public_only:.1f}")
    return [
        Cell(
            **asdict(case), scores=tuple(score for score, _ in pairs), public_only=tuple(p for _, p in pairs)
        )
        for case, pairs in found.items()
    ]


def cases_of(defences: Sequence[str], attacked: Sequence[str]) -> list[Case]:
    """Every defence without a hostile site, and against each attack, such as `flip:4`."""
    cases = []
    for defence in defences:
        if defence not in DEFENCES:
            raise UserError(f"--defences: {defence!r} is none of {', '.join(DEFENCES)}")
        cases.append(Case(defence, "", 0))
        for one in attacked:
            attack, _, hostile = one.partition(":")
            if attack not in ATTACKS or hostile not in map(str, range(1, SITES + 1)):
                raise UserError(f"--cases: {one!r} is no attack and number of sites, such as flip:4")
            cases.append(Case(defence, attack, int(hostile)))
    return cases


def met(cell: Cell, clean: Cell) -> bool:
    """Whether a cell is as good as was to be reached, beside its defence's run without hostile sites."""
    if cell.hostile > FEW:
        return all(score >= public for score, public in zip(cell.scores, cell.public_only, strict=True))
    return clean.mean - cell.mean <= MOST_LOST


def as_table(cells: Sequence[Cell]) -> Table:
    """Lay the cells out for a terminal; what misses is marked."""
    defences, lines = dict.fromkeys(one.defence for one in cells), dict.fromkeys(map(_line, cells))
    found = {(one.defence, _line(one)): one for one in cells}
    public = cells[0].public_only
    table = Table(
        title=f"Score × 100 with hostile sites; public cases alone: {sum(public) / len(public):.1f}",
        caption="* more than two points lost to one or two sites, or below public cases alone in a seed",
    )
    for column in ("hostile", *defences):
        table.add_column(column, justify="left" if column == "hostile" else "right")
    for line in lines:
        row = [found.get((defence, line)) for defence in defences]
        table.add_row(
            line, *("" if one is None else _in_words(one, found[one.defence, NOBODY]) for one in row)
        )
    return table


def _line(cell: Case) -> str:
    return f"{cell.hostile} × {cell.attack}" if cell.hostile else NOBODY


def _in_words(cell: Cell, clean: Cell) -> str:
    least = f" ({min(cell.scores):.1f})" if len(cell.scores) > 1 else ""
    return f"{cell.mean:.1f}{least}{'' if met(cell, clean) else ' *'}"


def main() -> None:
    """Run the benchmark; the exit code is 1 if the defence that is promised misses a target."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.hostile", description=__doc__)
    parser.add_argument("--scenario", default="fashion", help="a scenario, or a run-config file")
    parser.add_argument("--run-config", action="append", default=[], help="as in `grandrounds simulate`")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, with commas")
    parser.add_argument("--defences", default=",".join(DEFENCES), help=f"of {', '.join(DEFENCES)}")
    every = ",".join(f"{attack}:{hostile}" for attack, hostile in ATTACKED)
    parser.add_argument("--cases", default=every, help="attacks and numbers of sites")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    settings = [*arguments.run_config, f"data.num-sites={SITES}", "data.partition='dirichlet'"]
    try:
        config = run_settings(arguments.scenario, settings)
        cases = cases_of(arguments.defences.split(","), arguments.cases.split(","))
        cells = measure_all(config, cases, parse_seeds(arguments.seeds))
    except (UserError, ValueError) as error:
        parser.error(str(error))
    if arguments.json:
        print(json.dumps([asdict(cell) for cell in cells], indent=2))
    else:
        Console().print(as_table(cells))
    clean = {cell.defence: cell for cell in cells if not cell.hostile}
    raise SystemExit(not all(met(cell, clean[PROMISED]) for cell in cells if cell.defence == PROMISED))


if __name__ == "__main__":
    main()
