"""Baselines that send weights: DP-FedAvg, DP-FedSGD and FedDF, each site under its own record-level DP.

Every round the server sends the student's weights w; each site takes private steps from there and returns
its own weights w_k in float32; the server moves by the mean of w_k − w over declared sizes, with momentum.
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from client.noise import PrivateRandomness
from common.config import RunConfig
from server.teacher import Teacher
from simulations.baselines.bench import Bench, Outcome, plan_alone, take_steps

FLOAT32 = 4
"""Bytes a weight."""

Server = Callable[[Teacher, list[nn.Module]], None]
"""What else the server does with the sites' models once the weights are averaged, in place."""


def dp_fedavg(config: RunConfig, bench: Bench) -> Outcome:
    """Federated averaging (McMahan et al. 2017, arXiv:1602.05629, algorithm 1) of private steps.

    The local optimiser is DP-SGD (Abadi et al. 2016, arXiv:1607.00133, algorithm 1) at each site, so that
    the site itself protects its records and trusts nobody; `privacy.steps-per-round` is its local work. With
    one step a round this is DP-FedSGD: a site's weights are then a noisy gradient.
    """
    return _exchange_weights(config, bench, lambda student, models: None)


def feddf(config: RunConfig, bench: Bench) -> Outcome:
    """FedDF (Lin et al. 2020, arXiv:2006.07242, algorithm 1): average weights, then distil the ensemble.

    After averaging, the server's model is distilled on the proxy towards softmax of the mean of the sites'
    logits (equation in §3). For linear models that mean *is* the averaged model, and nothing is left to
    distil but rounding: FedDF then equals FedAvg by construction.
    """

    def distil(student: Teacher, models: list[nn.Module]) -> None:
        total_PC = np.zeros(student.logits().shape)
        for model in models:
            model.eval()
            with torch.no_grad():
                total_PC += model(student.phi_P).numpy()
        student.learn(total_PC / len(models))

    return _exchange_weights(config, bench, distil)


def _exchange_weights(config: RunConfig, bench: Bench, server: Server) -> Outcome:
    plan, student = plan_alone(config), bench.taught(config)
    model, momentum = student.learner.model, config.aggregation.momentum
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    for round_number in range(1, plan.rounds + 1):
        moved, models = [torch.zeros_like(parameter) for parameter in parameters], []
        for party in bench.parties:
            local = copy.deepcopy(model).train()
            randomness = PrivateRandomness.seeded("weights", config.seed, party.name, round_number)
            take_steps(local, party, plan, plan.steps_per_round, randomness)
            _add_movement(moved, local, parameters, bench.weights[party.name])
            models.append(local)
        with torch.no_grad():
            for place, parameter in enumerate(parameters):
                velocity[place].mul_(momentum).add_(moved[place])
                parameter.add_(velocity[place])
        server(student, models)
    payload = FLOAT32 * sum(parameter.numel() for parameter in parameters)
    return Outcome(student.test_scores(), plan.guarantee(), plan.rounds, payload, payload)


def _add_movement(
    moved: list[Tensor], local: nn.Module, parameters: list[nn.Parameter], weight: float
) -> None:
    trained = [parameter for parameter in local.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for total, after, before in zip(moved, trained, parameters, strict=True):
            total.add_(after - before, alpha=weight)
