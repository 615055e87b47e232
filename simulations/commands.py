"""Commands that compose coordinator and sites on this machine."""

import logging
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from common.config import RunConfig
from common.errors import UserError
from simulations.settings import run_settings

screen = Console(stderr=True)


def simulate(
    scenario: Annotated[
        str, typer.Argument(help="heart, thyroid, fashion, own, or a run-config TOML file.")
    ] = "heart",
    backend: Annotated[str, typer.Option(help="inprocess (no Ray) or ray.")] = "inprocess",
    run_config: Annotated[
        list[str] | None,
        typer.Option(help="Overrides: 'key=value …' as Flower takes them, or a TOML file. May be repeated."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Repetitions, such as 0,1,2. Default: the run config's seed.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of results; default runs/<date>-<scenario>.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary on standard output, and nothing else.")
    ] = False,
) -> None:
    """Run a federation on this machine, hold it against what it must beat, and write the results."""
    if backend not in ("inprocess", "ray"):
        raise UserError(f"--backend {backend!r} is refused: expected inprocess or ray")
    sys.path.append(os.getcwd())  # the user's own `module:function` lies where the command is typed
    config = run_settings(scenario, run_config or [])
    repetitions = [config.seed] if seeds is None else parse_seeds(seeds)
    final = (out or Path(config.out) / (config.run_id or default_name(config))).absolute()

    from common.summary import Round, to_json
    from server.report.terminal import results_table
    from server.results import in_words
    from simulations.simulate import simulate as run

    quiet_libraries()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[news]}"),
        TimeElapsedColumn(),
        console=screen,
    )
    bars: dict[int, TaskID] = {}

    def on_stage(seed: int, stage: str) -> None:
        progress.start()
        if stage == "rounds":
            bars[seed] = progress.add_task(f"seed {seed}: rounds", total=config.schedule[0], news="")
        else:
            progress.update(bars[seed], description=f"seed {seed}: {stage}")

    def on_round(line: Round) -> None:
        progress.update(bars[line.seed], completed=line.round, news=in_words(line))

    try:
        summary = run(config, repetitions, backend, final, on_stage, on_round)  # type: ignore[arg-type]
        for seed, bar in bars.items():
            progress.update(bar, description=f"seed {seed}: done")
    finally:
        if bars:  # what was refused before the first round shows no bar
            progress.stop()
    if as_json:
        sys.stdout.write(to_json(summary))
    else:
        Console().print(results_table(summary))
        Console().print(f"Report: {final / 'report.html'}", soft_wrap=True)


def compare(
    scenario: Annotated[
        str, typer.Argument(help="heart, thyroid, fashion, own, or a run-config TOML file.")
    ] = "heart",
    epsilons: Annotated[str, typer.Option(help="Budgets to compare under, such as 1,3,8.")] = "1,3,8",
    seeds: Annotated[str, typer.Option(help="Repetitions, such as 0,1,2.")] = "0,1,2",
    methods: Annotated[
        str | None, typer.Option(help="Some of the methods, with commas between. Default: all.")
    ] = None,
    run_config: Annotated[
        list[str] | None, typer.Option(help="Overrides, as in simulate. May be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of results; default runs/compare-<scenario>-<digest of the question>."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print compare.json on standard output, and nothing else.")
    ] = False,
) -> None:
    """Hold the federation against other methods. If interrupted, the same command goes on."""
    sys.path.append(os.getcwd())  # the user's own `module:function` lies where the command is typed
    config = run_settings(scenario, run_config or [])
    _require_options(run_settings(scenario, []), config)
    budgets, repetitions = parse_epsilons(epsilons), parse_seeds(seeds)

    from common.runs import working_folder
    from simulations.baselines.registry import METHODS
    from simulations.compare import ask
    from simulations.compare import compare as run
    from simulations.compare_page import comparison_table
    from simulations.comparison import Cell

    chosen = list(METHODS) if methods is None else [name.strip() for name in methods.split(",")]
    question = ask(config, budgets, repetitions, chosen)
    name = config.run_id or f"compare-{config.scenario}-{question.digest()[:8]}"
    final = (out or Path(config.out) / name).absolute()
    quiet_libraries()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=screen,
    )
    bar = progress.add_task("", total=None)

    def on_cell(cell: Cell, done: int, total: int) -> None:
        progress.start()
        at = "" if cell.epsilon is None else f", ε = {cell.epsilon:g}"
        description = f"seed {cell.seed}{at}: {METHODS[cell.method].label}"
        progress.update(bar, description=description, completed=done, total=total)

    try:
        comparison = run(config, question, final, on_cell)
        progress.update(bar, description="done", completed=progress.tasks[0].total)
    except BaseException:
        progress.stop()
        if progress.tasks[0].total and working_folder(final).exists():  # what was refused has begun no cell
            screen.print("What is finished is kept: the same command goes on from there.")
        raise
    finally:
        progress.stop()
    if as_json:
        sys.stdout.write(comparison.model_dump_json(indent=1) + "\n")
    else:
        Console().print(comparison_table(comparison))
        Console().print(f"Page: {final / 'compare.html'}", soft_wrap=True)


def _require_options(own: RunConfig, changed: RunConfig) -> None:
    """Refuse overrides of what a comparison goes through by itself."""
    for key, option in (("privacy.epsilon", "--epsilons"), ("seed", "--seeds")):
        if (value := changed.flat()[key]) != own.flat()[key]:
            raise UserError(f"--run-config: {key} = {value} is refused: a comparison takes it by {option}")


def parse_epsilons(text: str) -> list[float]:
    """Read `1,3,8`."""
    try:
        epsilons = [float(part) for part in text.split(",")]
    except ValueError:
        epsilons = []
    if not epsilons or not all(0 < epsilon <= 1e3 for epsilon in epsilons):
        raise UserError(
            f"--epsilons {text!r} is refused: expected numbers above 0, up to 1000, such as 1,3,8"
        )
    return epsilons


def parse_seeds(text: str) -> list[int]:
    """Read `0,1,2`."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
        expected = "whole numbers from 0 to 2^63 - 1 with commas between, such as 0,1,2"
        raise UserError(f"--seeds {text!r} is refused: expected {expected}")
    return seeds


def default_name(config: RunConfig) -> str:
    """A run's name when nobody gave one: date, time and scenario."""
    return f"{datetime.now():%Y%m%d-%H%M%S-%f}-{config.scenario}"


def quiet_libraries() -> None:
    """Keep what libraries say out of the progress bar; warnings still show."""
    for name in ("flwr", "absl", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)


def proxy(
    scenario: Annotated[str, typer.Argument(help="A scenario's name, or a run-config TOML file.")] = "heart",
    run_config: Annotated[list[str] | None, typer.Option(help="Overrides, as in simulate.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder to write to, such as a site's shelf of proxies.")
    ] = Path(),
) -> None:
    """Write a scenario's proxy to a file named by its digest, for sites that take public cases by hand."""
    from common.datasets import load_public

    public = load_public(run_settings(scenario, run_config or []))
    path = out / f"{public.proxy.digest.hex()}.safetensors"
    try:
        public.proxy.save(path)
    except OSError as error:
        raise UserError(f"--out {out}: can't be written: {error.strerror}") from None
    Console().print(str(path), highlight=False, soft_wrap=True)


def rehearse(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the sites' folders go.")],
    scenario: Annotated[str, typer.Option(help="A scenario's name, or a run-config TOML file.")] = "heart",
    run_config: Annotated[list[str] | None, typer.Option(help="Overrides, as in simulate.")] = None,
) -> None:
    """Write what each site of a scenario has, as files of its own, to rehearse a deployment with."""
    from simulations.rehearsal import write_sites

    for path in write_sites(run_settings(scenario, run_config or []), folder):
        Console().print(str(path), highlight=False, soft_wrap=True)
