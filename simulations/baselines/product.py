"""The federation itself, run through the real apps as `simulate` runs them."""

import tempfile
from pathlib import Path

import numpy as np

from common.accounting import Guarantee
from common.config import RunConfig
from common.plan import plan_of
from common.summary import Summary, read
from server.app import draw_up
from server.subsets import rows_of_round
from server.teacher import choose_cases
from simulations.baselines.bench import Bench, Outcome
from simulations.simulate import run_once


def summary_of(config: RunConfig) -> Summary:
    """Run it once and keep nothing but its summary.

    Raises:
        UserError: if the run fails.
    """
    with tempfile.TemporaryDirectory(prefix="grandrounds-") as out:
        own = config.model_copy(update={"out": out, "run_id": "compared", "resumable": False})
        run_once(own, "inprocess", Path(out) / "unused.log")
        return read(Path(out) / "compared" / "summary.json")


def federation(config: RunConfig, bench: Bench) -> Outcome:
    """Run coordinator, couriers and custodians on this machine."""
    summary = summary_of(config)
    scores = {name: score.mean for name, score in summary.results.federation.items()}
    return Outcome(
        scores,
        _guarantee(summary),
        summary.rounds,
        summary.bytes_up_per_site_per_round.mean,
        _task_bytes(config, bench),
    )


def _guarantee(summary: Summary) -> Guarantee:
    paid = max(summary.privacy, key=lambda line: line.epsilon)
    return Guarantee(paid.epsilon, paid.delta, paid.unit, paid.adjacency, paid.accountant, paid.horizon)  # type: ignore[arg-type]


def _task_bytes(config: RunConfig, bench: Bench) -> int:
    """The length of a round's task: the plan, the cases and their soft labels."""
    proxy = bench.public.proxy
    classes = len(proxy.preprocessing.classes)
    plan = plan_of(config, study="compared", proxy_digest=proxy.digest, classes=classes)
    cases_P = choose_cases(config, len(proxy))
    cases_R = cases_P[rows_of_round(config, len(cases_P), 1)]
    return len(draw_up(plan, 1, cases_R, np.zeros((len(cases_R), classes))).encode())
