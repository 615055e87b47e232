"""`grandrounds simulate`: a federation on this machine, seed by seed, with what it must be held against.

Each seed is one run of the real apps on the chosen backend. Then come the comparisons that need everybody's
records, the merged summary and the report. The folder of results appears under its name only when all of it
is whole.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import torch

from client.private_data import scenario_records
from client.simulated import close_sites, settle_ledgers
from common.config import RunConfig
from common.datasets import load_public, sites
from common.errors import ConfigError, UserError
from common.runs import RunFolder, disk_errors, working_folder
from common.summary import Round, Summary, merge, read
from server.federation.bundle import find_project
from server.preconditions import check as check_run
from server.results import ROUNDS, peak_memory_mib, write_results
from simulations.baselines.references import with_comparisons
from simulations.inprocess import run_inprocess
from simulations.ray_backend import run_ray

Backend = Literal["inprocess", "ray"]
MODELS = ("teacher.safetensors", "student.safetensors")

OnRound = Callable[[Round], None]
"""Called with each finished round, as `rounds.jsonl` has it."""
OnStage = Callable[[int, str], None]
"""Called with the seed and what begins: `rounds` or `comparisons`."""


def simulate(
    config: RunConfig,
    seeds: Sequence[int],
    backend: Backend,
    final: Path,
    on_stage: OnStage,
    on_round: OnRound,
) -> Summary:
    """Run a scenario once a seed, compare, and write the folder of results.

    Args:
        config: The run; its seed is replaced by each of `seeds`.
        seeds: Seeds of the repetitions.
        backend: Where the nodes live.
        final: The folder of results; it must not be there yet, or be empty.
        on_stage: Progress, stage by stage.
        on_round: Progress, round by round.

    Raises:
        UserError: if anything is refused or fails; then no folder is left.
    """
    torch.set_num_threads(1)
    check(config, seeds)
    with RunFolder.open(final) as folder:
        summaries = []
        for seed in seeds:
            seeded = config.model_copy(
                update={"seed": seed, "out": str(folder.path), "run_id": f"seed-{seed}", "resumable": False}
            )
            on_stage(seed, "rounds")
            with rounds_watched(folder.path / f"seed-{seed}", on_round):
                run_once(seeded, backend, final.with_name(f"{final.name}-seed-{seed}.log"))
            settle_ledgers(seeded, folder.path / f"seed-{seed}")
            on_stage(seed, "comparisons")
            summaries.append(compared(seeded, backend, folder.path / f"seed-{seed}"))
        merged = merge(summaries).model_copy(update={"run_id": final.name})
        write_results(merged, folder.path)
        for model in MODELS:
            with disk_errors(folder.path / model):
                shutil.copyfile(folder.path / f"seed-{seeds[0]}" / model, folder.path / model)
    return merged


def check(config: RunConfig, seeds: Sequence[int]) -> None:
    """Refuse what can be refused before anything starts."""
    if len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {','.join(map(str, seeds))}: a seed occurs twice")
    if config.resumable:
        expected = "false: a simulation starts anew; flwr run and grandrounds federation resume go on"
        raise ConfigError("run config", "resumable", True, expected)
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        public = load_public(seeded)
        check_run(seeded, public)
        for site in sites(seeded):
            scenario_records(seeded, site.name).for_schema_check([])  # refuses what can't be read
        # A scenario's public part and its sites' records come from one table.
        if config.privacy.unit == "patient" and public.test.patients is None:
            raise ConfigError("run config", "privacy.unit", "patient", "record: no column names the patients")


def run_once(config: RunConfig, backend: Backend, log_file: Path) -> None:
    """Run the apps once; Ray's log stays only if the run fails."""
    flat, nodes = config.flat(), len(sites(config))
    if backend == "inprocess":
        try:
            run_inprocess(flat, nodes)
        finally:
            close_sites()
    else:
        try:
            run_ray(find_project(), flat, nodes, log_file)
        except UserError:
            raise  # it names the log
        except BaseException:  # Ctrl-C
            log_file.unlink(missing_ok=True)
            raise
        log_file.unlink()


def compared(config: RunConfig, backend: Backend, folder: Path) -> Summary:
    """Add to the summary of one seed what needs everybody's records."""
    summary = read(folder / "summary.json")
    ours = ("out", "run-id")  # of the folder that becomes a part of the whole
    summary = summary.model_copy(
        update={
            "run_config": {key: value for key, value in summary.run_config.items() if key not in ours},
            "results": with_comparisons(config, summary.results),
            "backend": backend,
            "peak_memory_mib": max(summary.peak_memory_mib, peak_memory_mib()),
        }
    )
    write_results(summary, folder)
    return summary


@contextmanager
def rounds_watched(final: Path, on_round: OnRound) -> Iterator[None]:
    """Follow `rounds.jsonl` from another thread: the server app may be in this process or in another."""
    over = threading.Event()

    def follow() -> None:
        seen = 0
        while True:
            last_look = over.wait(0.05)
            lines: list[str] = []
            for place in (final, working_folder(final)):
                with suppress(OSError):  # not begun yet, or just about to get its final name
                    lines = (place / ROUNDS).read_text().split("\n")[:-1] or lines
            for line in lines[seen:]:
                on_round(Round.model_validate_json(line))
            seen = max(seen, len(lines))
            if last_look:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
