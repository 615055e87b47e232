"""What privacy costs a step: private steps and plain ones side by side in one run, on one thread.

    python -m simulations.benchmarks.private_step [--models linear,mlp] [--batches 256,1024,2400] [--json]

A batch of 2,400 is a full one at a site of the scenario `fashion`.

| step | is |
|---|---|
| plain | take the batch, forward, backward, SGD, as one writes them in torch |
| private | a step of `client.private_step.private_steps`: the same with clipping and noise |
| by Opacus | the same where `client.bookkeeping` doesn't know the model, so that Opacus's hooks clip |
| noise | drawing the step's noise, and nothing else |

The *floor* is plain and noise together: no private step can do less, however it clips. The noise costs as
much for a batch of ten as for one of ten thousand, and some twenty times what a plain optimizer spends on a
weight; so for a small batch the floor of a wide layer is high. What a private step takes above its floor is
norms, weighting and, where the model is tiny, the calls themselves: several times as many.

Time is the processor's, not the wall's. The kinds take turns, and each number is the median over the turns.
Memory is what a process grows by for model, data and two steps, after a step with a small batch; each kind
in a process of its own (Linux only). Below 4 MiB, where the allocator's pages count for more than the step,
the table has the difference instead of the ratio.
"""

import argparse
import json
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from client.noise import PrivateRandomness
from client.private_step import StepSettings, Units, private_steps
from common.models import build

CASE_SHAPES = {"linear": (128,), "mlp": (1, 28, 28), "cnn": (1, 28, 28), "resnet-gn": (1, 28, 28)}
"""What each model sees of a case; `linear` sees what it does in the scenario `fashion`."""
TARGETS = {"linear": 1.3, "mlp": 1.3, "cnn": 1.4, "resnet-gn": 1.3}
"""Times of a plain step that a private one may take."""
MEMORY_TARGET = 1.5
LEAST_MIB = 4.0
"""Of a plain step's memory, for a ratio to it to say something."""
CLASSES = 10
SECONDS = 1.0
"""How long plain steps are taken in all turns together, at least."""
FEWEST_TURNS, MOST_TURNS = 3, 60
STEPS, TURN_SECONDS = 16, 1.0
"""Steps of a turn, in one call: so many, but of slow models only what takes about a second. They share what a
call prepares, and the memory that the first of them has to ask the system for."""

Steps = Callable[[int], None]


@dataclass(frozen=True)
class Cost:
    """One model at one batch size; times are seconds of a step."""

    model: str
    parameters: int
    batch: int
    plain: float
    private: float
    opacus: float
    noise: float
    plain_mib: float
    private_mib: float
    ratio: float
    """Private over plain."""
    floor: float
    """Plain and noise over plain."""


def kinds(name: str, batch: int) -> dict[str, Steps]:
    """Return what takes so many steps of each kind, each with a model of its own."""
    shape = CASE_SHAPES[name]
    drawn = torch.Generator().manual_seed(0)
    phi_N = torch.rand(batch, *shape, generator=drawn)
    y_N = torch.randint(0, CLASSES, (batch,), generator=drawn)
    units, randomness = Units.group(phi_N, y_N, None), PrivateRandomness()
    loss = nn.functional.cross_entropy
    plain, private, opacus = (build(name, shape, CLASSES, seed=0).train() for _ in range(3))
    opacus.register_forward_hook(lambda *_: None)  # book-keeping takes no model with hooks
    settings = StepSettings(
        noise_multiplier=1.0, clipping_norm=1.0, sample_rate=1.0, declared_size=batch, step_size=0.01
    )
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)
    everybody = torch.arange(batch)

    def plain_steps(count: int) -> None:
        for _ in range(count):
            sgd.zero_grad(set_to_none=True)
            loss(plain(phi_N[everybody]), y_N[everybody]).backward()
            sgd.step()

    nothing_P = np.zeros(sum(parameter.numel() for parameter in plain.parameters()), dtype=np.float32)

    def noise(count: int) -> None:
        for _ in range(count):
            randomness.noised(nothing_P, 1.0)

    return {
        "plain": plain_steps,
        "private": lambda count: private_steps(private, units, count, settings, loss, randomness),
        "opacus": lambda count: private_steps(opacus, units, count, settings, loss, randomness),
        "noise": noise,
    }


def cost(name: str, batch: int, plain_mib: float, private_mib: float) -> Cost:
    """Time one model at one batch size."""
    steps = kinds(name, batch)
    for kind in steps.values():
        kind(1)
    seconds = _seconds(steps["plain"], 1)
    count = max(1, min(STEPS, round(TURN_SECONDS / seconds)))
    turns = min(max(round(SECONDS / (count * seconds)), FEWEST_TURNS), MOST_TURNS)
    opacus = steps.pop("opacus")
    times = [[_seconds(kind, count) for kind in steps.values()] for _ in range(turns)]
    plain, private, noise = (statistics.median(of_kind) for of_kind in zip(*times, strict=True))
    return Cost(
        model=name,
        parameters=sum(one.numel() for one in build(name, CASE_SHAPES[name], CLASSES, seed=0).parameters()),
        batch=batch,
        plain=plain,
        private=private,
        opacus=statistics.median(_seconds(opacus, 1) for _ in range(FEWEST_TURNS)),
        noise=noise,
        plain_mib=plain_mib,
        private_mib=private_mib,
        ratio=private / plain,
        floor=(plain + noise) / plain,
    )


def _seconds(steps: Steps, count: int) -> float:
    started = time.process_time()
    steps(count)
    return (time.process_time() - started) / count


def mib(name: str, batch: int, kind: str) -> float:
    """Measure a kind's memory; to be called before this process holds freed memory of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_growth, (name, batch, kind))


def _growth(name: str, batch: int, kind: str) -> float:
    """MiB that this process grows by."""
    kinds(name, 8)[kind](1)  # loads the code
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = _status("VmRSS")
    kinds(name, batch)[kind](2)
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def as_table(costs: list[Cost]) -> Table:
    """Lay the costs out for a terminal."""
    table = Table(title=f"A private step, in plain steps (memory ≤ {MEMORY_TARGET})")
    for column in ("model", "batch", "plain, ms", "private", "target", "floor", "Opacus", "memory"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for c in costs:
        table.add_row(
            c.model,
            f"{c.batch:,}",
            f"{c.plain * 1e3:.2f}",
            f"{c.ratio:.2f}",
            f"≤ {TARGETS[c.model]}",
            f"{c.floor:.2f}",
            f"{c.opacus / c.plain:.1f}",
            _memory(c),
        )
    return table


def _memory(c: Cost) -> str:
    if c.plain_mib < LEAST_MIB:
        return f"{c.private_mib - c.plain_mib:+.1f} MiB"
    return f"{c.private_mib / c.plain_mib:.2f}"


def main() -> None:
    """Run the benchmark and print what it measured."""
    parser = argparse.ArgumentParser(
        prog="python -m simulations.benchmarks.private_step", description=__doc__
    )
    parser.add_argument("--models", default=",".join(CASE_SHAPES), help="names of models, with commas")
    parser.add_argument("--batches", default="256,1024,2400", help="sizes of batches, with commas")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [
        (name, int(batch)) for name in arguments.models.split(",") for batch in arguments.batches.split(",")
    ]
    memory = [(mib(name, batch, "plain"), mib(name, batch, "private")) for name, batch in wanted]
    bar = track(wanted, "private steps", console=Console(stderr=True), transient=True)
    costs = [cost(*case, *held) for case, held in zip(bar, memory, strict=True)]
    if arguments.json:
        print(json.dumps([asdict(one) for one in costs], indent=2))
    else:
        Console().print(as_table(costs))


if __name__ == "__main__":
    main()
