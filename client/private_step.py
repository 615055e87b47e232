"""The private step: Opacus's DP-SGD with every public number public.

One step of the subsampled Gaussian mechanism (Abadi et al. 2016, arXiv:1607.00133, algorithm 1):
per-example gradients clipped to C, summed, N(0, σ²C²) added, divided by the *declared* size. What differs
from `PrivacyEngine.make_private`:

- q and the denominator come from the plan and the site's declared size, never from the data loader, hence
  never from n;
- the unit of sampling is the patient where patients are named: sampled patients contribute one record each,
  drawn afresh;
- a per-example gradient that is not finite counts as zero *before* the sum, so that one broken record can't
  make itself seen;
- clipped gradients are added up by `client.bookkeeping` where it knows the model, else from Opacus's hooks;
- noise comes from `client.noise`.

Neighbouring relation: add or remove one unit. The sum changes by at most C in 2-norm. Full batch (q = 1) is
Poisson sampling at rate 1.
"""

import inspect
import logging
import warnings
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizerFastGradientClipping
from torch import Tensor, nn

from client.bookkeeping import (
    KEPT_NUMBERS,
    BookKeeping,
    Loss,
    NotKnown,
    added,
    clip_factors,
    divided,
    require_agreement,
    squared_norms,
)
from client.noise import PrivateRandomness

SGD_STEP = inspect.unwrap(torch.optim.SGD.step)
"""A step of torch's SGD without the profiling around it, which costs a small model more than its noise."""
MICRO_BATCH = 1024
"""Examples whose gradients Opacus holds in memory at once; it changes no result beyond rounding."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSettings:
    """The public numbers of a private step.

    Attributes:
        noise_multiplier: σ, in units of the clipping norm.
        clipping_norm: C, largest 2-norm of one example's gradient over all trained parameters.
        sample_rate: q; 1 is full batch.
        declared_size: The site's public size m; the expected batch is q·m, whatever n is.
        step_size: Learning rate of plain SGD.
        momentum: SGD's momentum across the steps of one call.
    """

    noise_multiplier: float
    clipping_norm: float
    sample_rate: float
    declared_size: int
    step_size: float
    momentum: float = 0.0


@dataclass(frozen=True)
class Units:
    """Private examples grouped by the unit of privacy.

    Attributes:
        phi_ND: What the student sees of each record.
        y_N: Labels.
        start_U, count_U: Where in `order_N` each unit's records begin, and how many it has.
        order_N: Records sorted by unit.
    """

    phi_ND: Tensor
    y_N: Tensor
    start_U: NDArray[np.int64]
    count_U: NDArray[np.int64]
    order_N: NDArray[np.int64]

    @classmethod
    def group(cls, phi_ND: Tensor, y_N: Tensor, patients_N: NDArray[np.int64] | None) -> "Units":
        """Group records by patient, or take each as a unit of its own."""
        n = len(y_N)
        if patients_N is None:
            return cls(phi_ND, y_N, np.arange(n), np.ones(n, dtype=np.int64), np.arange(n))
        order_N = np.argsort(patients_N, kind="stable")
        _, start_U, count_U = np.unique(patients_N[order_N], return_index=True, return_counts=True)
        return cls(phi_ND, y_N, start_U.astype(np.int64), count_U.astype(np.int64), order_N)

    def sample(self, randomness: PrivateRandomness, sample_rate: float) -> NDArray[np.int64]:
        """Draw the records of one step: each unit with probability q, one record a sampled unit."""
        taken_U = randomness.poisson_mask(len(self.count_U), sample_rate)
        start, count = self.start_U[taken_U], self.count_U[taken_U]
        return self.order_N[start + randomness.choice(count)] if len(count) else np.empty(0, dtype=np.int64)

    def batch(self, randomness: PrivateRandomness, sample_rate: float) -> tuple[Tensor, Tensor]:
        """Draw one step's features and labels."""
        if sample_rate == 1 and len(self.count_U) == len(self.order_N):
            return self.phi_ND, self.y_N  # everybody, with their only record: nothing is drawn or copied
        batch = torch.from_numpy(self.sample(randomness, sample_rate))
        return self.phi_ND[batch], self.y_N[batch]


class SiteOptimizer(DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus's optimizer for gradients that were clipped already, with noise from the site's own stream."""

    def __init__(
        self, optimizer: torch.optim.SGD, settings: StepSettings, randomness: PrivateRandomness
    ) -> None:
        """Wrap `optimizer`; the expected batch size is q times the declared size."""
        super().__init__(
            optimizer,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.clipping_norm,
            # Opacus types it as an int; rounding it would tie q to m.
            expected_batch_size=settings.sample_rate * settings.declared_size,
            loss_reduction="sum",  # `add_noise` makes it the mean, of all parameters at once
        )
        self.randomness = randomness
        self.clipped_sums: list[Tensor] = []
        self._precision = reduce(torch.promote_types, (parameter.dtype for parameter in self.params))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a noisy step."""
        if self.pre_step():
            SGD_STEP(self.original_optimizer)

    def accumulate(self) -> None:
        """Take over the step's clipped sums."""
        for parameter, clipped_sum in zip(self.params, self.clipped_sums, strict=True):
            parameter.summed_grad = clipped_sum

    def add_noise(self) -> None:
        """Hide the clipped sums, as one vector, under noise of deviation σ·C, and divide by q·m."""
        held = self.params
        whole = torch.cat([parameter.summed_grad.reshape(-1) for parameter in held])
        deviation = self.noise_multiplier * self.max_grad_norm
        noised = torch.from_numpy(self.randomness.noised(whole.numpy(), deviation))
        # A sum is float64 where a batch was large. Made alike before it is divided, it doesn't show that.
        mean = noised.to(self._precision).div_(self.expected_batch_size)
        pieces = mean.split([parameter.numel() for parameter in held])
        for parameter, piece in zip(held, pieces, strict=True):
            parameter.grad, parameter.summed_grad = piece.view_as(parameter).to(parameter.dtype), None


class OpacusHooks:
    """Adds up clipped gradients of any model that Opacus can wrap, from per-example gradients of its hooks.

    It does what `client.bookkeeping.BookKeeping` does, for every layer that this doesn't know.
    """

    def __init__(self, model: nn.Module, loss: Loss, clipping_norm: float) -> None:
        """Wrap the model until `close`."""
        # torch warns that the features, which are data, need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        self._wrapped = GradSampleModule(model, loss_reduction="mean")
        # Any: Opacus hangs its results on the parameters.
        self._parameters: list[Any] = [one for one in model.parameters() if one.requires_grad]
        self._loss, self._clipping_norm = loss, clipping_norm

    def close(self) -> None:
        """Leave the model as it was found."""
        self._wrapped.remove_hooks()

    def __call__(self, phi_B: Tensor, y_B: Tensor) -> list[Tensor]:
        """Return Σ_i f_i g_i; an example whose gradient is not finite anywhere counts as zero.

        Raises:
            RuntimeError: if there isn't one gradient for each example: then clipping would bound something
                else than an example.
        """
        if len(y_B) > MICRO_BATCH:
            return added(self(*piece) for piece in divided(phi_B, y_B, MICRO_BATCH))
        self._loss(self._wrapped(phi_B), y_B).backward()
        gradients = [parameter.grad_sample for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = parameter.grad_sample = None
        for gradient in gradients:
            if gradient is None or len(gradient) != len(y_B):
                found = 0 if gradient is None else len(gradient)
                raise RuntimeError(f"{found} gradients for {len(y_B)} examples")
        squared_B = torch.stack([squared_norms(gradient) for gradient in gradients]).sum(dim=0)
        finite_B = squared_B.isfinite()
        if not bool(finite_B.all()):
            # Left out, not multiplied: 0 · inf is not zero.
            gradients, squared_B = [gradient[finite_B] for gradient in gradients], squared_B[finite_B]
        factor_B = clip_factors(squared_B, self._clipping_norm)
        return [torch.einsum("i,i...", factor_B.to(gradient.dtype), gradient) for gradient in gradients]


class Clipping:
    """Adds up clipped gradients by book-keeping, or by Opacus as soon as the model asks for it."""

    def __init__(
        self, model: nn.Module, loss: Loss, clipping_norm: float, case_shape: tuple[int, ...]
    ) -> None:
        """Choose for a model in training mode."""
        self._opacus = partial(OpacusHooks, model, loss, clipping_norm)
        self._engine: BookKeeping | OpacusHooks
        try:
            at_once = require_agreement(model, case_shape)
            self._engine = BookKeeping(model, loss, clipping_norm, at_once)
        except NotKnown as reason:
            self._turn_to_opacus(reason)

    def close(self) -> None:
        """Leave the model as it was found."""
        self._engine.close()

    def __call__(self, phi_B: Tensor, y_B: Tensor) -> list[Tensor]:
        """Return Σ_i f_i g_i for the trained parameters in the model's order."""
        try:
            return self._engine(phi_B, y_B)
        except NotKnown as reason:
            self._engine.close()
            self._turn_to_opacus(reason)
            return self._engine(phi_B, y_B)

    def _turn_to_opacus(self, reason: NotKnown) -> None:
        log.info("per-example gradients by Opacus: %s", reason)
        self._engine = self._opacus()


def numbers_held(model: nn.Module, case_shape: tuple[int, ...], batch: int) -> int:
    """Estimate how many numbers a private step adds to what a process holds.

    Args:
        model: Maps (B, *case_shape) to logits; its buffers may change.
        case_shape: Shape of one case.
        batch: Examples of the step.

    Returns:
        What layers say and gradients of those examples that are taken at once.
    """
    said: list[int] = []
    layers = [layer for layer in model.modules() if not list(layer.children())]
    handles = [layer.register_forward_hook(lambda *call: said.append(call[2][0].numel())) for layer in layers]
    cases = torch.zeros(2, *case_shape)
    with torch.no_grad():
        model.eval()(cases)
    for handle in handles:
        handle.remove()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    try:
        with closing(BookKeeping(model, nn.functional.cross_entropy, clipping_norm=1.0)) as engine:
            engine(cases, torch.zeros(2, dtype=torch.int64))
        return min(batch, engine.at_once) * sum(said) + min(batch * trained, max(KEPT_NUMBERS, trained))
    except NotKnown:
        return min(batch, MICRO_BATCH) * (sum(said) + trained)


def private_steps(
    head: nn.Module,
    units: Units,
    steps: int,
    settings: StepSettings,
    loss: Loss,
    randomness: PrivateRandomness,
) -> None:
    """Take `steps` private steps on `head`, in place.

    Args:
        head: What is trained; maps `phi_BD` to `logits_BC`.
        units: The private examples.
        steps: Number of noisy steps; each is taken, even where no unit was sampled.
        settings: The public numbers.
        loss: Per-example loss, reduced by mean: `(logits_BC, y_B) -> scalar`.
        randomness: The site's private stream.
    """
    head.train()
    if (
        settings.sample_rate == 1
    ):  # a batch may be the records themselves: let it be a copy, whatever a model does
        units = replace(units, phi_ND=units.phi_ND.clone())
    # Any: Opacus hangs a sum on each.
    parameters: list[Any] = [parameter for parameter in head.parameters() if parameter.requires_grad]
    plain = torch.optim.SGD(parameters, lr=settings.step_size, momentum=settings.momentum, foreach=False)
    optimizer = SiteOptimizer(plain, settings, randomness)
    clipping = Clipping(head, loss, settings.clipping_norm, units.phi_ND.shape[1:])
    try:
        for _ in range(steps):
            # An empty draw still takes its noisy step: skipping it would show that nobody was sampled.
            optimizer.clipped_sums = clipping(*units.batch(randomness, settings.sample_rate))
            optimizer.step()
    finally:
        clipping.close()
        for parameter in parameters:
            parameter.grad = parameter.summed_grad = None
