"""The bench on which all methods are judged: one seed's public cases, and every site's records.

A simulation holds everybody's records, so a baseline may open them here, through the same reader as a
custodian (`client.private_data`), and learn from them by the same step (`client.private_step`) under the
same plan (`common.plan`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from client.noise import PrivateRandomness
from client.private_data import scenario_records
from client.private_step import StepSettings, Units, private_steps
from common.accounting import Guarantee
from common.config import RunConfig
from common.datasets import PublicData, load_public, sites
from common.distillation import Learner
from common.models import private_ready
from common.plan import Plan, plan_of
from server.teacher import Teacher, choose_cases


@dataclass(frozen=True)
class Party:
    """Somebody who holds records: a site, or all of them together."""

    name: str
    units: Units
    declared_size: int


@dataclass(frozen=True)
class Outcome:
    """What a method came to with one seed.

    Attributes:
        scores: Metric to score on the public test cases.
        guarantee: What each site's units paid; None where nothing private was read, or nothing protected it.
        rounds: How often sites and server exchange something; 0 where they don't.
        bytes_up, bytes_down: What one site sends and gets in a round, without envelopes.
    """

    scores: dict[str, float]
    guarantee: Guarantee | None = None
    rounds: int = 0
    bytes_up: float = 0.0
    bytes_down: float = 0.0


@dataclass(frozen=True)
class Bench:
    """One seed's cases.

    Attributes:
        public: Proxy, validation and test.
        parties: Every site's records as the coordinator's proposed student sees them.
    """

    public: PublicData
    parties: tuple[Party, ...]

    @classmethod
    def open(cls, config: RunConfig) -> "Bench":
        """Read what is public and what the sites hold; ε, rounds and step sizes play no part in it."""
        torch.set_num_threads(1)
        public = load_public(config)
        learner, found = untaught(config, public).learner, []
        for site in sites(config):
            records = scenario_records(config, site.name)
            units = records.for_private_step(public.proxy, learner, config.privacy.unit)
            found.append(Party(site.name, units, site.declared_size))
        return cls(public, tuple(found))

    @cached_property
    def pooled(self) -> Party:
        """One party with everybody's records."""
        return pool(self.parties)

    @property
    def weights(self) -> dict[str, float]:
        """Each site's share of all declared sizes."""
        total = sum(party.declared_size for party in self.parties)
        return {party.name: party.declared_size / total for party in self.parties}

    def untaught(self, config: RunConfig) -> Teacher:
        """The proposed student with its views of the public cases, ready for private steps."""
        return untaught(config, self.public)

    def taught(self, config: RunConfig) -> Teacher:
        """The same after it has learned from the run's teacher, if there is one."""
        student = self.untaught(config)
        cases_P = choose_cases(config, len(self.public.proxy))
        student.learn(Teacher.start(config, self.public, cases_P).logits().astype(np.float64))
        return student


def untaught(config: RunConfig, public: PublicData) -> Teacher:
    """The proposed student with its views of the public cases, ready for private steps."""
    cases_P = choose_cases(config, len(public.proxy))
    student = Teacher.open(config, public, cases_P, config.student)
    features = student.learner.features
    student.learner = Learner(features, private_ready(student.learner.model, features.shape))
    return student


def pool(parties: tuple[Party, ...]) -> Party:
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


def plan_alone(config: RunConfig) -> Plan:
    """The run's plan for who buys no statistics: all of ε goes into the private steps."""
    plan = plan_of(config, study="comparison", proxy_digest=bytes(32), classes=2)
    return plan.model_copy(update={"histogram_share": 0.0, "hold_out_share": 0.0})


def take_steps(
    model: nn.Module,
    party: Party,
    plan: Plan,
    steps: int,
    randomness: PrivateRandomness,
    momentum: float = 0.0,
) -> None:
    """Take some of the plan's private steps on a party's records, in place."""
    settings = StepSettings(
        noise_multiplier=plan.noise_multiplier(),
        clipping_norm=plan.clipping_norm,
        sample_rate=plan.sample_rate,
        declared_size=party.declared_size,
        step_size=plan.step_size,
        momentum=momentum,
    )
    private_steps(model, party.units, steps, settings, nn.functional.cross_entropy, randomness)
