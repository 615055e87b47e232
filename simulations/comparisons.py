"""What a federation must be held against, where a simulation has everybody's records.

All are judged on the same public test cases, with the student's architecture:

- *a site alone*: its own private steps under the same (ε, δ), from an untaught student: neither the
  federation nor the teacher;
- *pooled, DP*: one trusted party holds all records, takes as many private steps under the same (ε, δ), from
  the same teacher's start, with the server's momentum in its weights, and learns nothing from a quantised
  logit;
- *pooled, no privacy*: the same party without clipping and noise, fitted to the end; the best of
  `WEIGHT_DECAYS` by public validation.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.noise import PrivateRandomness
from client.private_data import scenario_records
from client.private_step import StepSettings, Units, private_steps
from common.config import RunConfig
from common.datasets import PublicData, load_public, sites
from common.distillation import Learner, fit_labels
from common.models import private_ready
from common.plan import plan_of
from common.summary import Metrics, Results, statistic
from server.public_baselines import WEIGHT_DECAYS, best_by_validation
from server.results import metrics_of
from server.teacher import Teacher, choose_cases


@dataclass(frozen=True)
class Party:
    """Somebody who holds records: a site, or all of them together."""

    name: str
    units: Units
    declared_size: int


def with_comparisons(config: RunConfig, results: Results) -> Results:
    """Add to one seed's results what needs all private records."""
    public = load_public(config)
    parties = open_parties(config, public)
    pooled = pool(parties)
    each = {party.name: metrics_of(alone(config, public, party)) for party in parties}
    return results.model_copy(
        update={
            "sites_alone": mean_over_sites(each),
            "sites_alone_each": each,
            "pooled_dp": metrics_of(pooled_dp(config, public, pooled)),
            "pooled_no_privacy": metrics_of(pooled_no_privacy(config, public, pooled)),
        }
    )


def open_parties(config: RunConfig, public: PublicData) -> list[Party]:
    """Every site's records as the coordinator's proposed student sees them."""
    learner, found = untaught(config, public).learner, []
    for site in sites(config):
        records = scenario_records(config, site.name)
        units = records.for_private_step(public.proxy, learner, config.privacy.unit)
        found.append(Party(site.name, units, site.declared_size))
    return found


def pool(parties: list[Party]) -> Party:
    """One party with everybody's records; its declared size is the sum of theirs."""
    offsets = np.cumsum([0, *(len(party.units.y_N) for party in parties[:-1])])
    orders = [party.units.order_N + offset for party, offset in zip(parties, offsets, strict=True)]
    starts = [party.units.start_U + offset for party, offset in zip(parties, offsets, strict=True)]
    units = Units(
        torch.cat([party.units.phi_ND for party in parties]),
        torch.cat([party.units.y_N for party in parties]),
        np.concatenate(starts),
        np.concatenate([party.units.count_U for party in parties]),
        np.concatenate(orders),
    )
    return Party("pooled", units, sum(party.declared_size for party in parties))


def alone(config: RunConfig, public: PublicData, party: Party) -> dict[str, float]:
    """A site's own private steps from an untaught student."""
    student = untaught(config, public)
    take_steps(config, student.learner, party, momentum=config.aggregation.momentum)
    return student.test_scores()


def pooled_dp(config: RunConfig, public: PublicData, party: Party) -> dict[str, float]:
    """All records in one place under the same ε, from the same teacher's start."""
    cases_P = choose_cases(config, len(public.proxy))
    student = untaught(config, public)
    student.learn(Teacher.start(config, public, cases_P).logits().astype(np.float64))
    take_steps(config, student.learner, party, momentum=config.aggregation.momentum)
    return student.test_scores()


def pooled_no_privacy(config: RunConfig, public: PublicData, party: Party) -> dict[str, float]:
    """All records in one place, no privacy, fitted to the end."""
    labels_N: NDArray[np.int64] = party.units.y_N.numpy()
    candidates = []
    for decay in WEIGHT_DECAYS:
        student = untaught(config, public)
        tuned = config.student.model_copy(update={"weight_decay": decay})
        fit_labels(student.learner, party.units.phi_ND, labels_N, tuned, config.seed)
        candidates.append(student)
    return best_by_validation(candidates).test_scores()


def untaught(config: RunConfig, public: PublicData) -> Teacher:
    """The proposed student with its views of the public cases, ready for private steps."""
    cases_P = choose_cases(config, len(public.proxy))
    student = Teacher.open(config, public, cases_P, config.student)
    features = student.learner.features
    student.learner = Learner(features, private_ready(student.learner.model, features.shape))
    return student


def take_steps(config: RunConfig, learner: Learner, party: Party, momentum: float) -> None:
    """The run's private steps, all at once, under the run's whole budget."""
    # A party that stands alone buys no statistics: all of its ε goes into the steps.
    plan = plan_of(config, study="comparison", proxy_digest=bytes(32), classes=2)
    plan = plan.model_copy(update={"histogram_share": 0.0, "hold_out_share": 0.0})
    settings = StepSettings(
        noise_multiplier=plan.noise_multiplier(),
        clipping_norm=plan.clipping_norm,
        sample_rate=plan.sample_rate,
        declared_size=party.declared_size,
        step_size=plan.step_size,
        momentum=momentum,
    )
    randomness = PrivateRandomness.seeded("comparison", config.seed, party.name)
    steps = plan.rounds * plan.steps_per_round
    private_steps(learner.model, party.units, steps, settings, nn.functional.cross_entropy, randomness)


def mean_over_sites(each: dict[str, Metrics]) -> Metrics:
    """Average each metric over the sites that have it, seed by seed."""
    names = sorted({name for metrics in each.values() for name in metrics})
    return {
        name: statistic(
            np.mean([metrics[name].values for metrics in each.values() if name in metrics], axis=0).tolist()
        )
        for name in names
    }
