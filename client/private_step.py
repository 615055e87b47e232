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
- noise comes from `client.noise`.

Neighbouring relation: add or remove one unit. The sum changes by at most C in 2-norm. Full batch (q = 1) is
Poisson sampling at rate 1.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.noise import PrivateRandomness

MICRO_BATCH = 1024
"""Examples whose gradients are held in memory at once; it changes no result beyond rounding."""

Loss = Callable[[Tensor, Tensor], Tensor]


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


class SiteOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer with noise from the site's own stream and broken gradients counted as zero."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, settings: StepSettings, randomness: PrivateRandomness
    ) -> None:
        """Wrap `optimizer`; the expected batch size is q times the declared size."""
        super().__init__(
            optimizer,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.clipping_norm,
            # Opacus types it as an int, only ever divides by it, and rounding it would tie q to m.
            expected_batch_size=settings.sample_rate * settings.declared_size,
            loss_reduction="mean",
        )
        self.randomness = randomness
        self.examples = 0

    def clip_and_accumulate(self) -> None:
        """Zero the examples with a non-finite gradient anywhere, then clip and sum.

        Raises:
            RuntimeError: if there isn't one gradient for each of `examples`: then clipping would bound
                something else than an example.
        """
        finite_B: Tensor | None = None
        for gradient in self.grad_samples:
            if len(gradient) != self.examples:
                raise RuntimeError(f"{len(gradient)} gradients for {self.examples} examples")
            finite = torch.isfinite(gradient.flatten(1)).all(dim=1)
            finite_B = finite if finite_B is None else finite_B & finite
        if finite_B is not None and not bool(finite_B.all()):
            for parameter in self.params:
                # masked_fill, not a product: 0 · inf is not zero.
                broken = ~finite_B.reshape(-1, *[1] * (parameter.grad_sample.dim() - 1))
                parameter.grad_sample = parameter.grad_sample.masked_fill(broken, 0.0)
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Add σ·C times hardened Gaussians to the clipped sum."""
        for parameter in self.params:
            draws = self.randomness.gaussian(parameter.numel()) * (self.noise_multiplier * self.max_grad_norm)
            # Added in float64 and rounded once: a float32 sum would keep its lattice under any noise.
            noised = parameter.summed_grad.double().reshape(-1) + torch.from_numpy(draws)
            parameter.grad = noised.reshape(parameter.shape).to(parameter.dtype)


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
    trained = GradSampleModule(head, loss_reduction="mean")
    trained.train()
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    plain = torch.optim.SGD(parameters, lr=settings.step_size, momentum=settings.momentum)
    optimizer = SiteOptimizer(plain, settings, randomness)
    try:
        # torch warns that the features, which are data, need no gradient.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            batch = units.sample(randomness, settings.sample_rate)
            # An empty draw still takes its noisy step: skipping it would show that nobody was sampled.
            pieces = np.array_split(batch, max(1, -(-len(batch) // MICRO_BATCH)))
            for piece in pieces:
                index = torch.from_numpy(piece)
                loss(trained(units.phi_ND[index]), units.y_N[index]).backward()
                optimizer.examples = len(piece)
                optimizer.signal_skip_step(piece is not pieces[-1])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    finally:
        trained.remove_hooks()
        for parameter in parameters:
            parameter.grad = None
