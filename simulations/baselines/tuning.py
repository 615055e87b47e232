"""Chooses the baselines' settings for a scenario: `python -m simulations.baselines.tuning fashion`.

Every baseline gets the same kind of try: a small grid, each point run with the seeds 300 and 301 at ε = 1, 3
and 8, and the best mean score at each ε written to `tuned/`. No case on which a comparison is judged has
a say: seeds from 300 on deal other splits, and scores are taken on the public *validation* cases, of which a
tuning has more than a run (`JUDGES`). The search itself spends no budget in the books: a baseline is given
its best settings for free.
"""

import itertools
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from common.config import RunConfig, Scalar
from common.errors import UserError
from common.metrics import headline_metric
from simulations.baselines.bench import Bench
from simulations.baselines.registry import METHODS, TUNED, read_tuned, tuned_name
from simulations.commands import parse_epsilons
from simulations.settings import run_settings

SEEDS = (300, 301)

JUDGES: Mapping[str, str] = {
    "fashion": "data.validation-size=5000",
    "reviews": "data.validation-size=2500",
    "heart": "data.validation-size=230 data.test-size=30",
    "thyroid": "data.validation-size=2300 data.test-size=200",
}
"""By scenario: as many validation cases as a run has test cases, or as there are to spare."""

Grid = Mapping[str, tuple[Scalar, ...]]

STEP, ROUNDS = "privacy.step-size", "num-rounds"
GRIDS: Mapping[str, Grid] = {
    "fedmd": {"privacy.steps-per-round": (1, 3, 5), STEP: (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)},
    "ds-fl": {STEP: (1.0, 2.0, 4.0, 8.0), "aggregation.temperature": (0.03, 0.1, 0.3, 1.0)},
    "fedauxfdp": {"student.weight-decay": (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)},
    "dp-fedavg": {"privacy.steps-per-round": (1, 3, 5), STEP: (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)},
    "dp-fedsgd": {ROUNDS: (1.0, 2.0, 3.0, 5.0), STEP: (0.25, 0.5, 1.0, 2.0)},
}
"""What is tried by method, beside its usual settings. Step sizes, and DP-FedSGD's rounds, are in multiples of
the run's own."""
ALIKE = {"feddf": "dp-fedavg", "federation-tuned": "dp-fedsgd", "pooled-dp-tuned": "dp-fedsgd"}
"""Who learns takes the same private steps in both, so one takes over what was found for the other."""


def points(name: str, config: RunConfig) -> Iterator[dict[str, Scalar]]:
    """Every setting in a method's grid, as run-config overrides."""
    grid = GRIDS[name]
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        if STEP in point:
            point[STEP] = config.privacy.step_size * float(point[STEP])
        if ROUNDS in point:
            point[ROUNDS] = round(config.num_rounds * float(point[ROUNDS]))
        yield {**METHODS[name].usual, **point}


def tune(
    scenario: str, overrides: Sequence[str], methods: Sequence[str], epsilons: Sequence[float]
) -> list[tuple[dict[str, Scalar], str]]:
    """Find methods' best settings at each ε.

    Returns:
        Entries for a file in `TUNED`, each with a remark.
    """
    found: dict[tuple[str, float, str], list[float]] = {}
    for seed in SEEDS:
        config = run_settings(scenario, [*overrides, JUDGES[scenario], f"seed={seed}"])
        bench = Bench.open(config)
        metric = headline_metric(bench.public.proxy.preprocessing.classes)
        bench = Bench(replace(bench.public, test=bench.public.validation), bench.parties)
        cells = [
            (name, epsilon, at) for name in methods for epsilon in epsilons for at in points(name, config)
        ]
        for name, epsilon, at in track(cells, f"{scenario}, seed {seed}", console=Console(stderr=True)):
            own = config.changed({"privacy.epsilon": epsilon, **at})
            outcome = METHODS[name].run(own, bench)
            score = outcome.scores.get(metric, 0.0) if outcome else 0.0
            found.setdefault((name, epsilon, json.dumps(at)), []).append(score)
    alike = {name: like for name, like in ALIKE.items() if like in methods}
    names = {name: name for name in methods} | alike
    return [_best(found, name, like, epsilon) for name, like in names.items() for epsilon in epsilons]


def _best(
    found: Mapping[tuple[str, float, str], list[float]], name: str, like: str, epsilon: float
) -> tuple[dict[str, Scalar], str]:
    means = {at: float(np.mean(scores)) for (*key, at), scores in found.items() if key == [like, epsilon]}
    best = max(means, key=lambda at: means[at])
    remark = f"{100 * means[best]:.1f}; the {len(means)} tried gave {100 * min(means.values()):.1f} and more"
    if like != name:
        remark = f"as {like}"
    entry = {**METHODS[name].usual, **json.loads(best)}
    return {"method": name, "epsilon": epsilon, **entry}, remark


def main(
    scenario: Annotated[str, typer.Argument(help=f"One of {', '.join(JUDGES)}.")],
    methods: Annotated[str, typer.Option(help="Some of the methods, with commas.")] = ",".join(GRIDS),
    epsilons: Annotated[str, typer.Option(help="Budgets to tune under, with commas.")] = "1,3,8",
    run_config: Annotated[
        list[str] | None, typer.Option(help="Overrides, as in compare; a number of sites has its own file.")
    ] = None,
) -> None:
    """Tune the baselines for a scenario and write the result into tuned/."""
    if scenario not in JUDGES:
        raise UserError(f"{scenario!r} is refused: expected one of {', '.join(JUDGES)}")
    overrides, names, budgets = run_config or [], methods.split(","), parse_epsilons(epsilons)
    if unknown := [name for name in names if name not in GRIDS]:
        raise UserError(f"--methods {unknown[0]!r} is refused: expected some of {', '.join(GRIDS)}")
    command = f"python -m simulations.baselines.tuning {shlex.join(sys.argv[1:])}"
    file = tuned_name(run_settings(scenario, overrides))
    found = tune(scenario, overrides, names, budgets)
    new = {(entry["method"], entry["epsilon"]) for entry, _ in found}
    kept = [one for one in read_tuned(file) if (one["method"], one["epsilon"]) not in new]
    text = [f"# Written by `{command}`.\n"]
    for entry, remark in [*found, *((one, "kept from an earlier search") for one in kept)]:
        lines = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in entry.items())
        text.append(f"[[settings]] # {remark}\n{lines}")
    path = TUNED / f"{file}.toml"
    path.write_text("\n".join(text), encoding="utf-8")
    read_tuned.cache_clear()
    Console().print(str(path))


if __name__ == "__main__":
    typer.run(main)
