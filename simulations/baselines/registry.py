"""All methods of a comparison in one table, in the order in which they are shown.

A method is a function of a run config and a `Bench`. It takes data, student, teacher and privacy from the
run that is compared, and its own schedule from `usual`, or, where they were tuned for a scenario, from
`tuned/` beside this file (`tuning` writes it): rounds, steps, step size, momentum. Both are run-config
overrides.
"""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from common.config import RunConfig, Scalar
from common.summary import Metrics
from server.public_baselines import best_public
from server.report.verdict import Kind
from server.results import metrics_of
from server.teacher import NONE, Teacher, choose_cases
from simulations.baselines import references
from simulations.baselines.bench import Bench, Outcome, plan_alone
from simulations.baselines.labels import ds_fl, fedmd
from simulations.baselines.one_shot_heads import fedauxfdp
from simulations.baselines.product import federation
from simulations.baselines.weights import dp_fedavg, feddf
from simulations.settings import run_settings

TUNED = Path(__file__).with_name("tuned")
"""One file a scenario, and one for another number of sites, such as `fashion-200.toml`; each a list of
settings by method and ε."""

Run = Callable[[RunConfig, Bench], Outcome | None]
"""None where the run has nothing that the method could learn from."""


@dataclass(frozen=True)
class Method:
    """One line of a comparison.

    Attributes:
        label: What tables call it.
        kind: What it has to go by; a baseline is a federation of somebody else's.
        run: The method.
        sends: What a site sends and gets in a round.
        paper: Where it is from.
        private: Whether it depends on ε; what doesn't is computed once a seed.
        usual: Overrides of the run config where nothing was tuned for the scenario.
    """

    label: str
    kind: Kind
    run: Run
    sends: str = "nothing"
    paper: str = ""
    private: bool = True
    usual: Mapping[str, Scalar] = field(default_factory=dict)


def settings_of(name: str, config: RunConfig) -> dict[str, Scalar]:
    """A method's own overrides for a run: those tuned at the nearest ε of its scenario, or the usual."""
    tuned = tuned_for(name, config)
    if not tuned:
        return dict(METHODS[name].usual)
    wanted = math.log(config.privacy.epsilon)
    nearest = min(tuned, key=lambda one: abs(math.log(float(one["epsilon"])) - wanted))
    return {key: value for key, value in nearest.items() if key not in ("method", "epsilon")}


def configured(name: str, config: RunConfig) -> RunConfig:
    """The run config under which a method runs."""
    return config.changed(settings_of(name, config), f"settings of {name}")


def tuned_for(name: str, config: RunConfig) -> list[dict[str, Scalar]]:
    """What was found for a method with a run's number of sites, or else with its scenario's, if anything."""
    for file in (tuned_name(config), config.scenario):
        if found := [one for one in read_tuned(file) if one["method"] == name]:
            return found
    return []


def tuned_name(config: RunConfig) -> str:
    """Name the file for a run: its scenario, and the number of sites if it isn't the scenario's own."""
    number = config.data.num_sites
    usual = run_settings(config.scenario, []).data.num_sites
    return f"{config.scenario}-{number}" if number != usual else config.scenario


@lru_cache(maxsize=8)
def read_tuned(name: str) -> list[dict[str, Scalar]]:
    """What a file in `TUNED` holds, if it is there."""
    path = TUNED / f"{name}.toml"
    if not path.exists():
        return []
    found: list[dict[str, Scalar]] = tomllib.loads(path.read_text(encoding="utf-8"))["settings"]
    return found


# ---- Those who learn without a federation ------------------------------------------------------------------


def _teacher_alone(config: RunConfig, bench: Bench) -> Outcome | None:
    if config.teacher.model == NONE:
        return None
    cases_P = choose_cases(config, len(bench.public.proxy))
    return Outcome(Teacher.start(config, bench.public, cases_P).test_scores())


def _public_only(config: RunConfig, bench: Bench) -> Outcome | None:
    return _public(best_public(config, bench.public, bench.public.proxy.y))


def _public_only_if_labelled(config: RunConfig, bench: Bench) -> Outcome | None:
    hidden = bench.public.proxy_labels
    return None if hidden is None else _public(best_public(config, bench.public, hidden))


def _public(metrics: Metrics | None) -> Outcome | None:
    return None if metrics is None else Outcome(_scores(metrics))


def _sites_alone(config: RunConfig, bench: Bench) -> Outcome:
    each = {party.name: metrics_of(references.alone(config, bench, party)) for party in bench.parties}
    return Outcome(_scores(references.mean_over_sites(each)), plan_alone(config).guarantee())


def _scores(metrics: Metrics) -> dict[str, float]:
    return {name: score.mean for name, score in metrics.items()}


def _pooled_dp(config: RunConfig, bench: Bench) -> Outcome:
    return Outcome(references.pooled_dp(config, bench), plan_alone(config).guarantee())


def _pooled_no_privacy(config: RunConfig, bench: Bench) -> Outcome:
    return Outcome(references.pooled_no_privacy(config, bench))


def _where_tuned(name: str, run: Run) -> Run:
    """A method whose settings were found for some scenarios; elsewhere it would be another line's double."""
    return lambda config, bench: run(config, bench) if tuned_for(name, config) else None


# ---- The table ---------------------------------------------------------------------------------------------

_TEN_ROUNDS: dict[str, Scalar] = {
    "num-rounds": 10,
    "privacy.steps-per-round": 3,
    "aggregation.momentum": 0.0,
}
_FEDAVG = "McMahan et al. 2017, arXiv:1602.05629"
_OPINION = "P·C values in the run's codec, both ways"
_WEIGHTS = "all weights in float32, both ways"

METHODS: Mapping[str, Method] = {
    "teacher-alone": Method("Teacher alone", "public", _teacher_alone, private=False),
    "public-only": Method("Public data alone", "public", _public_only, private=False),
    "public-only-if-labelled": Method(
        "Public data, all labelled", "public", _public_only_if_labelled, private=False
    ),
    "sites-alone": Method("Sites alone, on average", "sites", _sites_alone),
    "fedmd": Method(
        "FedMD", "baseline", fedmd, _OPINION, "Li and Wang 2019, arXiv:1910.03581", usual=_TEN_ROUNDS
    ),
    "ds-fl": Method(
        "DS-FL (ERA)",
        "baseline",
        ds_fl,
        _OPINION,
        "Itahara et al. 2021, arXiv:2008.06180",
        usual={**_TEN_ROUNDS, "aggregation.temperature": 0.1},
    ),
    "fedauxfdp": Method(
        "FedAUXfdp, one shot",
        "baseline",
        fedauxfdp,
        "a head and a certainty in float32 up, the teacher's head down, once",
        "Hoech et al. 2022, arXiv:2205.14960",
        usual={"student.weight-decay": 0.1, "proxy-cases": 0},
    ),
    "dp-fedavg": Method(
        "DP-FedAvg",
        "baseline",
        dp_fedavg,
        _WEIGHTS,
        _FEDAVG,
        usual=_TEN_ROUNDS,
    ),
    "feddf": Method(
        "FedDF",
        "baseline",
        feddf,
        _WEIGHTS,
        "Lin et al. 2020, arXiv:2006.07242",
        usual={**_TEN_ROUNDS, "proxy-cases": 0},
    ),
    "dp-fedsgd": Method(
        "DP-FedSGD",
        "baseline",
        dp_fedavg,
        _WEIGHTS,
        f"{_FEDAVG}, one step a round",
        usual={"privacy.steps-per-round": 1},
    ),
    "oneshot": Method(
        "Federation in one round",
        "federation",
        federation,
        "P·C values in the run's codec and C noisy counts up, a task down, once",
        usual={"method": "oneshot", "aggregation.rule": "auto", "patience": 0},
    ),
    "federation": Method(
        "Federation", "federation", federation, "P·C values in the run's codec up, a task down"
    ),
    "federation-tuned": Method(
        "Federation, rounds tuned",
        "federation",
        _where_tuned("federation-tuned", federation),
        "P·C values in the run's codec up, a task down",
        usual={"privacy.steps-per-round": 1},
    ),
    "pooled-dp": Method("All records pooled, same privacy", "pooled", _pooled_dp),
    "pooled-dp-tuned": Method(
        "All records pooled, steps tuned",
        "pooled",
        _where_tuned("pooled-dp-tuned", _pooled_dp),
        usual={"privacy.steps-per-round": 1},
    ),
    "pooled-no-privacy": Method(
        "All records pooled, no privacy", "pooled", _pooled_no_privacy, private=False
    ),
}
