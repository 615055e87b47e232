"""Distillation on public cases: how a teacher or a student takes over soft labels, free of any budget.

Both sides use it: the server when its teacher learns from the ensemble, a site when its student takes over
the teacher's opinion before a private step. A `Learner` is a model behind frozen public features.

A linear model is fitted exactly: to hard labels by regularised logistic regression, to soft labels in the
limit of a high temperature, where Hinton's loss becomes least squares on centred logits (Hinton, Vinyals,
Dean 2015, arXiv:1503.02531, eq. 4), in closed form. Anything else takes AdamW on the loss itself
(`common.losses`).
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from common import seeds
from common.architectures import Architecture
from common.config import Distillation
from common.errors import UserError
from common.features import FeaturedModel, Features, above_trunk, fit_features
from common.fitness import require_frozen_apart
from common.losses import distillation_loss
from common.models import REGISTRY, build, cut, has_trunk, trunk_of
from common.proxy import Proxy
from common.trunks import public_trunk

BATCH = 256
RIDGE = 1e-3
"""Penalty that keeps least squares solvable where features repeat one another; it is no regularisation."""
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Learner:
    """A model behind frozen public features.

    Attributes:
        features: Fitted on the proxy; `x` to `phi`.
        model: Maps `phi_ND` to `logits_NC`.
    """

    features: Features
    model: nn.Module

    def phi(self, x: Floats) -> Tensor:
        """What the model sees of encoded cases."""
        return self.features.transform(x)

    def phi_public(self, x: Floats) -> Tensor:
        """The same for public cases, which are remembered: many parties of a simulation look at them."""
        return self.features.transform_public(x)

    def logits(self, phi: Tensor) -> Floats:
        """The model's logits, `(cases, classes)`, without gradients."""
        self.model.eval()
        with torch.no_grad():
            pieces = [self.model(piece) for piece in phi.split(2048)]
        return torch.cat(pieces).numpy().astype(np.float32)

    def whole(self) -> nn.Module:
        """Features and model as one module that takes encoded cases."""
        bare = self.features.kind == "none" and self.features.trunk is None
        return self.model if bare else FeaturedModel(self.features, self.model)

    def state(self) -> bytes:
        """The model's weights as safetensors."""
        return save_tensors({name: tensor.contiguous() for name, tensor in self.model.state_dict().items()})

    def restore(self, state: bytes) -> None:
        """Take weights from `state`; raises `RuntimeError` or `SafetensorError` if they don't fit."""
        self.model.load_state_dict(load_tensors(state))


def build_learner(
    architecture: Architecture, proxy: Proxy, seed: int, allowed_paths: Collection[str]
) -> Learner:
    """Fit an architecture's features on the proxy, train its trunk there, and build what learns on top.

    The trunk of a model from the registry is trained on the proxy (`common.trunks`); a model of one's own
    brings its trunk along, trained on other public cases perhaps. Layers that are to stay as they are become
    part of the features. A model without a trunk learns whole.

    Args:
        architecture: What to build.
        proxy: The public cases.
        seed: Public seed of the initial weights.
        allowed_paths: Import paths (`module:Class`) that this party itself allows, whatever others ask for.

    Raises:
        ConfigError: if the model is unknown or does not take such cases.
        UserError: if it has no last block, and that is what shall learn, or if its trunk mixes cases or
            remembers them.
    """
    features, model = _untaught(architecture, proxy, seed, allowed_paths)
    if has_trunk(model) and architecture.model in REGISTRY:
        trunk = public_trunk(architecture.model, features, proxy)
        trunk_of(model).load_state_dict(trunk.state_dict())
    return _above_trunk(architecture, proxy, seed, features, model)


def outline_learner(architecture: Architecture, proxy: Proxy, allowed_paths: Collection[str]) -> Learner:
    """Build a learner on a trunk that nobody has trained: it refuses what `build_learner` would."""
    return _above_trunk(architecture, proxy, 0, *_untaught(architecture, proxy, 0, allowed_paths))


def _untaught(
    architecture: Architecture, proxy: Proxy, seed: int, allowed_paths: Collection[str]
) -> tuple[Features, nn.Module]:
    features = fit_features(architecture.features, proxy.x, architecture.feature_size, seed)
    classes = len(proxy.preprocessing.classes)
    return features, build(architecture.model, features.shape, classes, seed, allowed_paths)


def _above_trunk(
    architecture: Architecture, proxy: Proxy, seed: int, features: Features, model: nn.Module
) -> Learner:
    layers, size = architecture.layers, architecture.feature_size
    if layers == "all" or not has_trunk(model):
        return Learner(features, model)
    lower, learned = cut(model, layers)
    if architecture.model not in REGISTRY:
        require_frozen_apart(lower, features.shape)
    features = above_trunk(features, lower, layers, proxy.x, size, seed)
    if layers == "head":
        learned = build("linear", features.shape, len(proxy.preprocessing.classes), seed)
    return Learner(features, learned)


def fit_labels(
    learner: Learner, phi: Tensor, y_N: NDArray[np.int64], settings: Distillation, seed: int
) -> None:
    """Train on labelled public cases (cross-entropy), in place."""
    targets_N = torch.tensor(y_N)

    def loss(index: Tensor) -> Tensor:
        return nn.functional.cross_entropy(learner.model(phi[index]), targets_N[index])

    if affine_layer(learner.model) is not None:
        _minimise_convex(learner.model, lambda: loss(torch.arange(len(targets_N))), settings.weight_decay)
    else:
        _minimise(learner.model, loss, len(targets_N), settings, seed)


def fit_soft_labels(
    learner: Learner,
    phi: Tensor,
    log_soft_labels_NC: Floats,
    y_N: NDArray[np.int64],
    settings: Distillation,
    seed: int,
) -> None:
    """Take over soft labels, in place.

    Args:
        learner: Whose model is fitted, from its present weights.
        phi: What it sees of the public cases.
        log_soft_labels_NC: Log soft labels at `settings.temperature`.
        y_N: Hard labels of the same cases, −1 where there is none.
        settings: Temperature, α, and the optimiser's numbers.
        seed: Public seed of the order of cases.
    """
    layer = affine_layer(learner.model)
    if layer is not None and settings.alpha == 1.0:
        _least_squares(layer, phi, settings.temperature * log_soft_labels_NC)
        return
    soft_NC = torch.tensor(log_soft_labels_NC, dtype=torch.float32)
    hard_N = torch.tensor(y_N)

    def loss(index: Tensor) -> Tensor:
        logits = learner.model(phi[index])
        return distillation_loss(logits, soft_NC[index], hard_N[index], settings.temperature, settings.alpha)

    _minimise(learner.model, loss, len(hard_N), settings, seed)


def affine_layer(model: nn.Module) -> nn.Linear | None:
    """Return the one linear layer of a linear model, or None."""
    leaves = [module for module in model.modules() if not list(module.children())]
    trained = [leaf for leaf in leaves if list(leaf.parameters())]
    passive = all(isinstance(leaf, nn.Linear | nn.Flatten | nn.Identity) for leaf in leaves)
    return trained[0] if passive and len(trained) == 1 and isinstance(trained[0], nn.Linear) else None


def _least_squares(layer: nn.Linear, phi_ND: Tensor, logits_NC: Floats) -> None:
    """Ridge regression of centred logits on features; the bias is not penalised."""
    flat_ND = phi_ND.reshape(len(phi_ND), -1).double()
    target_NC = torch.from_numpy(np.asarray(logits_NC, dtype=np.float64))
    target_NC = target_NC - target_NC.mean(dim=1, keepdim=True)
    mean_D, mean_C = flat_ND.mean(dim=0), target_NC.mean(dim=0)
    centred_ND = flat_ND - mean_D
    gram_DD = centred_ND.T @ centred_ND / len(flat_ND)
    gram_DD.diagonal().add_(RIDGE)
    weight_DC = torch.linalg.solve(gram_DD, centred_ND.T @ (target_NC - mean_C) / len(flat_ND))
    with torch.no_grad():
        layer.weight.copy_(weight_DC.T)
        layer.bias.copy_(mean_C - mean_D @ weight_DC)


def _minimise_convex(model: nn.Module, loss: Callable[[], Tensor], weight_decay: float) -> None:
    """Full-batch L-BFGS on loss + ½·λ·‖weights‖²; biases are not penalised."""
    penalised = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (
            loss() + 0.5 * weight_decay * torch.stack([weight.square().sum() for weight in penalised]).sum()
        )
        value.backward()
        return value

    optimizer.step(closure)
    optimizer.zero_grad(set_to_none=True)


def _minimise(
    model: nn.Module, loss: Callable[[Tensor], Tensor], cases: int, settings: Distillation, seed: int
) -> None:
    """AdamW over shuffled batches for `settings.epochs` epochs; raises `UserError` if it diverges."""
    model.train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        # A third faster; but a parameter that is a slice of a larger tensor it takes for a whole one.
        fused=all(one.is_floating_point() and one.is_contiguous() for one in parameters),
    )
    order = seeds.generator(seed, "order of public cases")
    for _ in range(settings.epochs):
        for batch in torch.from_numpy(order.permutation(cases)).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss(batch).backward()
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise UserError(
            f"learning from public cases diverged: lower learning-rate = {settings.learning_rate:g}"
        )
