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


def parse_seeds(text: str) -> list[int]:
    """Read `0,1,2`."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**63:
        raise UserError(f"--seeds {text!r} is refused: expected numbers with commas between, such as 0,1,2")
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
