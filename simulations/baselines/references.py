"""Those who learn without a federation, where a simulation has everybody's records.

All are judged on the same public test cases, with the student's architecture:

- *a site alone*: its own private steps under the same (ε, δ), from an untaught student: neither the
  federation nor the teacher;
- *pooled, DP*: one trusted party holds all records, takes as many private steps under the same (ε, δ) (the
  largest, where sites differ), from the same teacher's start, with the server's momentum in its weights, and
  learns nothing from a quantised logit;
- *pooled, no privacy*: the same party without clipping and noise, fitted to the end; the best of
  `WEIGHT_DECAYS` by public validation.
"""

import numpy as np
from numpy.typing import NDArray

from client.noise import PrivateRandomness
from common.config import RunConfig
from common.datasets import sites
from common.distillation import fit_labels
from common.summary import Metrics, Results, statistic
from server.public_baselines import best_by_validation
from server.results import metrics_of
from server.teacher import WEIGHT_DECAYS, Teacher
from simulations.baselines.bench import Bench, Party, plan_alone, take_steps


def with_comparisons(config: RunConfig, results: Results) -> Results:
    """Add to one seed's results what needs all private records."""
    bench = Bench.open(config)
    each = {party.name: metrics_of(alone(config, bench, party)) for party in bench.parties}
    return results.model_copy(
        update={
            "sites_alone": mean_over_sites(each),
            "sites_alone_each": each,
            "pooled_dp": metrics_of(pooled_dp(config, bench)),
            "pooled_no_privacy": metrics_of(pooled_no_privacy(config, bench)),
        }
    )


def alone(config: RunConfig, bench: Bench, party: Party) -> dict[str, float]:
    """A site's own private steps from an untaught student."""
    student = bench.untaught(config)
    _take_all_steps(config, student, party)
    return student.test_scores()


def pooled_dp(config: RunConfig, bench: Bench) -> dict[str, float]:
    """All records in one place under the same ε, from the same teacher's start."""
    student = bench.taught(config)
    _take_all_steps(config, student, bench.pooled)
    return student.test_scores()


def pooled_no_privacy(config: RunConfig, bench: Bench) -> dict[str, float]:
    """All records in one place, no privacy, fitted to the end."""
    units = bench.pooled.units
    labels_N: NDArray[np.int64] = units.y_N.numpy()
    candidates = []
    for decay in WEIGHT_DECAYS:
        student = bench.untaught(config)
        tuned = config.student.model_copy(update={"weight_decay": decay})
        fit_labels(student.learner, units.phi_ND, labels_N, tuned, config.seed)
        candidates.append(student)
    return best_by_validation(candidates).test_scores()


def mean_over_sites(each: dict[str, Metrics]) -> Metrics:
    """Average each metric over the sites that have it, seed by seed."""
    names = sorted({name for metrics in each.values() for name in metrics})
    return {
        name: statistic(
            np.mean([metrics[name].values for metrics in each.values() if name in metrics], axis=0).tolist()
        )
        for name in names
    }


def _take_all_steps(config: RunConfig, student: Teacher, party: Party) -> None:
    """The run's private steps, all at once, under the party's whole budget."""
    caps = {site.name: config.privacy.most_epsilon(place) for place, site in enumerate(sites(config))}
    asked = plan_alone(config)
    plan = asked.within(caps.get(party.name, max(caps.values())), asked.rounds)
    randomness = PrivateRandomness.seeded("comparison", config.seed, party.name)
    steps = plan.rounds * plan.steps_per_round
    take_steps(student.learner.model, party, plan, steps, randomness, config.aggregation.momentum)
