"""Book-keeping: the sum of clipped per-example gradients at nearly the price of a plain gradient.

A private step needs Σ_i f_i g_i, where g_i is example i's gradient over all trained parameters and
f_i = min(1, C / ‖g_i‖). Done by hand that is a backward pass for each example. But a layer's part of g_i is
made of two things that one ordinary pass has anyway: what went into the layer and the gradient of the loss
with respect to what came out of it (Goodfellow 2015, arXiv:1510.01799). So there is one forward pass, one
backward pass that stops at the layers' outputs, norms from these pairs, and one weighted product a layer
(Li et al. 2022, arXiv:2110.05679; Bu et al. 2023, arXiv:2210.00038). With a_it the input and δ_it the
gradient of the output at position t (a token, a pixel; a table has one), W the weight, b the bias:

| layer | example i's gradient | its squared norm | weighted sum |
|---|---|---|---|
| Linear, one position | δ_i a_iᵀ, δ_i | ‖δ_i‖² (‖a_i‖² + 1) | (f ∘ δ)ᵀ a, fᵀ δ |
| Linear, few positions | Σ_t δ_it a_itᵀ, Σ_t δ_it | Σ_tu (δ_it · δ_iu) (a_it · a_iu + 1) | (f ∘ δ)ᵀ a, fᵀ δ |
| Linear, many | the same | of the gradient itself, which is kept | fᵀ g |
| Conv | one convolution whose groups are the examples | of the gradient itself | fᵀ g |
| GroupNorm | one normalisation whose groups are the examples' | of the gradient itself | fᵀ g |
| LayerNorm | Σ_t δ_it ∘ x̂_it, Σ_t δ_it | of the gradient itself | fᵀ g |
| Embedding | the sum of δ_it by token | Σ of the sums' | Σ_i f_i g_i by token |

Where the only trained layer says the logits, as a head on features does, δ is the loss's own gradient, and
there is no way back to go.

Pairs of positions are cheaper than the gradient itself where 2 T² ≤ |W| (Bu et al., their mixed rule). For
convolutions they never were on a CPU: the grouped convolution costs hardly more than the plain one.

**What is guaranteed.** An example's contribution has norm at most C. Norms are over every trained parameter,
and never below the truth: `squared_norms` adds what its rounding can take away. Where a gradient is kept, it
is itself what is weighted. Where pairs of positions give a norm, it is raised by
(T + 2) · 2⁻²⁴ · Σ_t ‖a_it‖ ‖δ_it‖, which the rounding of this example's own product can't exceed, whatever
cancels; and C is taken 2⁻²⁰ smaller, for the rounding of factors. The sum over a batch is a float32 sum,
whose last bits depend on all examples, as in Opacus.

An example with a gradient that is not finite is taken out, and the pass done again without it. Nothing is
kept from one pass to the next but how much of a batch one pass may take.

**What is not known for sure is not done.** `known_layers` takes layers of exactly the classes above, without
hooks, parametrisations or shared parameters. `require_agreement` tries the model on random cases. And each
pass is checked: every layer called once, on the whole batch, and every trained parameter used once in the
autograd graph, as it is where the one layer's output is the logits and its input needs no gradient.
Otherwise `NotKnown` is raised before anything is added up, and `client.private_step` turns to Opacus.

Shapes: B examples, T positions, D inputs and P outputs of a layer, C channels, U pairs of example and token.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import cross_entropy

from common.fitness import CASES, shaken, tried_cases

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of logits and labels alone, neither of which it changes: `(logits_BC, y_B) -> scalar`, a mean."""

KEPT_NUMBERS = 2**22
"""Numbers of per-example gradients that are held at once (16 MiB): few enough to stay in a cache, and to be
memory that was used before; pages fresh from the operating system cost more than the arithmetic."""
SEEN_NUMBERS = 2**24
"""Numbers that go into layers and come out of them, of all examples of one pass (64 MiB)."""
UNTRIED = 256
"""Examples of a first pass, where nobody has seen how many numbers one of them makes."""
FEW_POSITIONS = 16
"""Positions of which pairs may be taken: so few that what is added for rounding stays near 10⁻⁶ of a norm."""
RUN = 128
"""Numbers whose norm is taken in their own precision."""
SHORTEST_RUN = 16
"""Shorter runs are slower than padding."""
MARGIN = 2.0**-20
"""What is taken off C, relatively, for the rounding of factors and of what they multiply."""
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


class NotKnown(Exception):
    """The model does something whose per-example gradients this module doesn't know for sure."""


def clip_factors(squared_B: Tensor, clipping_norm: float) -> Tensor:
    """Return min(1, C / ‖g_i‖) for squared norms in float64, as Opacus does but never rounded up."""
    norm_B = squared_B.sqrt().add_(1e-6)
    return norm_B.reciprocal_().mul_((1 - MARGIN) * clipping_norm).clamp_(max=1.0)


def squared_norms(gradient: Tensor) -> Tensor:
    """Return each example's squared norm (B,) in float64, from gradients (B, ...): never below the truth.

    The norms of runs are taken in the gradient's own precision, which is three times as fast, and their
    squares added in float64. In whatever order the squares of a run are summed, each addition rounds by at
    most half a unit in the last place, and squares and root by as much: so much is added. The result is not
    finite where a gradient isn't, or where its square overflows; such a gradient's factor would be too small
    for precise products.
    """
    flat = gradient.flatten(1) if gradient.dim() > 2 else gradient
    width = flat.shape[1]
    run = width if width <= RUN else _run(width)
    if run == width:
        norm_B: Tensor = torch.linalg.vector_norm(flat, dim=1).double()
    else:
        padded = nn.functional.pad(flat, (0, -width % run)) if width % run else flat
        runs = torch.linalg.vector_norm(padded.reshape(len(flat), -1, run), dim=2)
        norm_B = torch.linalg.vector_norm(runs, dim=1, dtype=torch.float64)
    return norm_B.square_().mul_(1 + (run + 3) * ROUNDING[gradient.dtype])


@lru_cache
def _run(width: int) -> int:
    """The longest run that divides the width, if one is long enough to be fast."""
    return next((run for run in range(RUN, SHORTEST_RUN - 1, -1) if width % run == 0), RUN)


def loss_gradients(loss: Loss, logits_BC: Tensor, y_B: Tensor) -> Tensor:
    """Return the gradient of each example's own loss with respect to its logits, (B, C).

    For cross-entropy it is softmax less one-hot label, and taken without autograd: torch is slow at the
    softmax of short rows, several times as slow as at that of columns.
    """
    if loss is cross_entropy and logits_BC.dim() == 2 and logits_BC.shape[0] == y_B.shape[0]:
        delta_CB = logits_BC.detach().T.contiguous().softmax(dim=0)
        return delta_CB.scatter_add_(0, y_B[None], delta_CB.new_full((1, y_B.shape[0]), -1.0)).T.contiguous()
    with torch.enable_grad():
        leaf_BC = logits_BC.detach().requires_grad_()
        value = loss(leaf_BC, y_B)
    # The loss is a mean over B examples, and each one's own gradient is asked for: B times the mean's.
    return torch.autograd.grad(value, leaf_BC, torch.full_like(value, len(y_B)))[0]


def total(tensors: list[Tensor]) -> Tensor:
    """Add up tensors of one shape."""
    return reduce(torch.add, tensors)


# ---- A layer's part in every example's gradient ------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A layer's one call in a forward pass.

    Attributes:
        x: Its input, (B, ...).
        version: Changes of `x` in place up to then.
        sees_data: Whether no gradient goes on to what made `x`.
        output: Where in the autograd graph the gradient of its output arrives.
        numbers: How many it has to do with for each example.
        statistics: A normalisation's mean and inverse deviation, which it saves for the backward pass.
    """

    x: Tensor
    version: int
    sees_data: bool
    output: GradientEdge
    numbers: int
    statistics: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Part:
    """What one layer contributes.

    Attributes:
        squared_B: Squared norms over its trained parameters, float64.
        weighted: From factors (B,) to Σ_i f_i g_i of its trained parameters, weight before bias.
    """

    squared_B: Tensor
    weighted: Callable[[Tensor], list[Tensor]]


def _kept(layer: nn.Module, weight: Callable[[], Tensor], bias: Callable[[], Tensor]) -> Part:
    """The part of a layer whose per-example gradients (B, *shape) are made and kept."""
    gradients = [make() for make, trained in zip((weight, bias), _trained(layer), strict=True) if trained]
    squared_B = total([squared_norms(gradient) for gradient in gradients])

    def weighted(factor_B: Tensor) -> list[Tensor]:
        return [(factor_B @ gradient.flatten(1)).view(gradient.shape[1:]) for gradient in gradients]

    return Part(squared_B, weighted)


def _linear(layer: nn.Linear, call: Call, delta: Tensor) -> Part:
    positions, (weight, bias) = _positions(layer, call), _trained(layer)
    a_ND, delta_NP = call.x, delta
    if call.x.dim() > 2:
        a_BTD, delta_BTP = (one.reshape(len(delta), positions, -1) for one in (call.x, delta))
        if positions > 1 and not _pairs_are_cheaper(layer, positions):
            return _kept(layer, lambda: delta_BTP.mT @ a_BTD, lambda: delta_BTP.sum(dim=1))
        a_ND, delta_NP = a_BTD.flatten(0, 1), delta_BTP.flatten(0, 1)
    squared_N = squared_norms(delta_NP)
    if weight:
        squared_N *= squared_norms(a_ND).add_(bias)
    squared_B = squared_N
    if positions > 1:
        wide_a, wide_delta = a_BTD.double(), delta_BTP.double()
        pairs_BTT = (wide_delta @ wide_delta.mT) * (weight * (wide_a @ wide_a.mT) + bias)
        sum_B = squared_N.sqrt().view(-1, positions).sum(dim=1)
        allowance_B = (positions + 2) * ROUNDING[delta.dtype] * sum_B
        squared_B = (pairs_BTT.sum(dim=(1, 2)).clamp(min=0).sqrt() + allowance_B).square()

    def weighted(factor_B: Tensor) -> list[Tensor]:
        factor_N = factor_B.repeat_interleave(positions) if positions > 1 else factor_B
        scaled_NP = delta_NP * factor_N[:, None]
        return [scaled_NP.mT @ a_ND] * weight + [scaled_NP.sum(dim=0)] * bias

    return Part(squared_B, weighted)


def _positions(layer: nn.Linear, call: Call) -> int:
    return call.x.numel() // (call.x.shape[0] * layer.in_features)


def _pairs_are_cheaper(layer: nn.Linear, positions: int) -> bool:
    return positions <= FEW_POSITIONS and 2 * positions**2 <= layer.weight.numel()


def _convolution(layer: nn.Conv1d | nn.Conv2d, call: Call, delta: Tensor) -> Part:
    examples = len(delta)

    def weight() -> Tensor:
        # Every example a group of its own: one convolution gives all of their gradients.
        outputs, *kernel = layer.weight.shape
        gradient: Tensor = torch.ops.aten.convolution_backward(
            delta.reshape(1, -1, *delta.shape[2:]),
            call.x.reshape(1, -1, *call.x.shape[2:]),
            layer.weight.new_empty(examples * outputs, *kernel),  # only its shape counts
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0] * len(layer.kernel_size),
            examples * layer.groups,
            [False, True, False],
        )[1]
        return gradient.view(examples, outputs, *kernel)

    return _kept(layer, weight, lambda: delta.flatten(2).sum(dim=2))


def _group_norm(layer: nn.GroupNorm, call: Call, delta: Tensor) -> Part:
    examples, channels = call.x.shape[:2]
    mean_BG, inverse_deviation_BG = call.statistics
    # Every example's channels are channels of their own: one backward pass gives all of their gradients.
    _, weight, bias = torch.ops.aten.native_group_norm_backward(
        delta.reshape(1, examples * channels, -1),
        call.x.reshape(1, examples * channels, -1),
        mean_BG.reshape(1, -1),
        inverse_deviation_BG.reshape(1, -1),
        layer.weight.repeat(examples),
        1,
        examples * channels,
        delta[0, 0].numel(),
        examples * layer.num_groups,
        [False, True, True],
    )
    return _kept(layer, lambda: weight.view(examples, -1), lambda: bias.view(examples, -1))


def _layer_norm(layer: nn.LayerNorm, call: Call, delta: Tensor) -> Part:
    mean, inverse_deviation = call.statistics
    shape = (len(delta), -1, *layer.normalized_shape)
    return _kept(
        layer,
        lambda: (delta * (call.x - mean) * inverse_deviation).reshape(shape).sum(dim=1),
        lambda: delta.reshape(shape).sum(dim=1),
    )


def _embedding(layer: nn.Embedding, call: Call, delta: Tensor) -> Part:
    examples = len(delta)
    token_BT = call.x.reshape(examples, -1)
    key_BT = torch.arange(examples)[:, None] * layer.num_embeddings + token_BT
    counts_BT = token_BT != (-1 if layer.padding_idx is None else layer.padding_idx)
    key_U, place = torch.unique(key_BT[counts_BT], return_inverse=True)
    delta_BTD = delta.reshape(*token_BT.shape, -1)
    gradient_UD = delta.new_zeros(len(key_U), layer.embedding_dim).index_add_(0, place, delta_BTD[counts_BT])
    example_U, token_U = key_U // layer.num_embeddings, key_U % layer.num_embeddings
    nothing_B = torch.zeros(examples, dtype=torch.float64)

    def weighted(factor_B: Tensor) -> list[Tensor]:
        scaled_UD = gradient_UD * factor_B[example_U, None]
        return [torch.zeros_like(layer.weight).index_add_(0, token_U, scaled_UD)]

    return Part(nothing_B.index_add_(0, example_U, squared_norms(gradient_UD)), weighted)


def _trained(layer: nn.Module) -> tuple[bool, bool]:
    """Whether its weight is trained, and its bias."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    return weight is not None and weight.requires_grad, bias is not None and bias.requires_grad


PARTS: dict[type[nn.Module], Callable[[Any, Call, Tensor], Part]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}

NORMALISATIONS = (nn.GroupNorm, nn.LayerNorm)
DIMENSIONS: dict[type[nn.Module], range] = {
    nn.Linear: range(2, 9),
    nn.Conv1d: range(3, 4),
    nn.Conv2d: range(4, 5),
    nn.GroupNorm: range(2, 9),
    nn.LayerNorm: range(2, 9),
    nn.Embedding: range(1, 9),
}
"""How many dimensions a batch of inputs has; torch takes an example without a batch, too."""


# ---- Which models ------------------------------------------------------------------------------------------

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def known_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that hold the trained parameters, in the order of these.

    Raises:
        NotKnown: naming the first reason why the model is not one for this module.
    """
    seen: set[int] = set()
    found = []
    for name, layer in model.named_modules():
        where = f"{name or 'the model'} ({type(layer).__name__})"
        if any(getattr(layer, hooks) for hooks in HOOKS):
            raise NotKnown(f"{where} has hooks")
        trained = {id(parameter) for parameter in layer.parameters(recurse=False) if parameter.requires_grad}
        if trained and not _is_plain(layer):
            raise NotKnown(f"{where} is of no known kind")
        if trained & seen:
            raise NotKnown(f"{where} shares a parameter")
        seen |= trained
        found += [layer] if trained else []
    if not found:
        raise NotKnown("no layer is trained")
    return found


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is exactly of a known class, holds what that class holds, and does what it does."""
    if type(layer) not in PARTS or "forward" in vars(layer) or layer._modules or layer._buffers:
        return False
    held = [parameter for parameter in layer._parameters.values() if parameter is not None]
    if [*layer._parameters][:1] != ["weight"] or [*layer._parameters][1:] not in ([], ["bias"]):
        return False
    if any(type(parameter) is not nn.Parameter or parameter.dtype not in ROUNDING for parameter in held):
        return False
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None and not layer.scale_grad_by_freq and not layer.sparse
    return True


# ---- A pass ------------------------------------------------------------------------------------------------


class BookKeeping:
    """Adds up the clipped gradients of one model, whose layers it watches until it is closed.

    Args:
        model: In training mode.
        loss: Per-example loss, reduced by mean.
        clipping_norm: C.
        at_once: Examples that one pass takes, as `require_agreement` says; larger batches are divided.

    Raises:
        NotKnown: if the model is not one for this module.
    """

    def __init__(self, model: nn.Module, loss: Loss, clipping_norm: float, at_once: int = UNTRIED) -> None:
        """Look at the model and watch its layers."""
        self._layers = known_layers(model)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model, self._loss, self._clipping_norm = model, loss, clipping_norm
        self._calls: dict[nn.Module, Call] = {}
        self.at_once = at_once
        self._handles = [layer.register_forward_hook(self._note) for layer in self._layers]

    def close(self) -> None:
        """Leave the model as it was found."""
        self._calls = {}
        for handle in self._handles:
            handle.remove()

    def __call__(self, phi_B: Tensor, y_B: Tensor) -> list[Tensor]:
        """Return Σ_i f_i g_i for the trained parameters in the model's order.

        Raises:
            NotKnown: if a pass is none whose gradients are known for sure.
        """
        examples = y_B.shape[0]  # a tensor's `len` is slower
        if examples == 0:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        if examples > self.at_once:
            return added(self(*piece) for piece in divided(phi_B, y_B, self.at_once))
        logits_BC = self._forward(phi_B)
        self.at_once = self._room()
        if examples > self.at_once:
            return self(phi_B, y_B)
        with torch.no_grad():
            parts = self._parts(logits_BC, y_B)
            self._calls = {}
            squared_B = total([part.squared_B for part in parts])
            if math.isfinite(squared_B.sum().item()):
                factor_B = clip_factors(squared_B, self._clipping_norm).to(logits_BC.dtype)
                return [gradient for part in parts for gradient in part.weighted(factor_B)]
        finite_B = squared_B.isfinite()
        return self(phi_B[finite_B], y_B[finite_B])

    def _forward(self, phi_B: Tensor) -> Tensor:
        """Return the logits of a pass whose calls were noted and are what is known."""
        self._calls = {}
        logits_BC: Tensor = self._model(phi_B)
        if len(self._calls) != len(self._layers):
            raise NotKnown("a layer is not called")
        for layer, call in self._calls.items():
            if (
                call.x.shape[0] != phi_B.shape[0]
                or call.x.dim() not in DIMENSIONS[type(layer)]
                or not call.x.numel()
            ):
                raise NotKnown("a layer sees something else than a batch of the examples")
        return logits_BC

    def _room(self) -> int:
        """How many examples like those of the last pass one pass may take."""
        kept = sum(_kept_numbers(layer, call) for layer, call in self._calls.items())
        seen = sum(call.numbers for call in self._calls.values())
        return max(1, min(KEPT_NUMBERS // max(1, kept), SEEN_NUMBERS // seen))

    def _note(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: remember what a layer saw."""
        if layer in self._calls or len(inputs) != 1 or output.grad_fn is None:
            raise NotKnown("a layer is called twice, by keyword or without gradients")
        if output.dtype != layer.weight.dtype:
            raise NotKnown("a layer answers in another precision than its own")
        # The graph's edge, not the output: what comes next may change that in place.
        edge = get_gradient_edge(output)
        statistics = _statistics(edge.node) if isinstance(layer, NORMALISATIONS) else ()
        (x,) = inputs
        numbers = (x.numel() + output.numel()) // max(1, x.shape[0])
        self._calls[layer] = Call(x.detach(), x._version, not x.requires_grad, edge, numbers, statistics)

    def _parts(self, logits_BC: Tensor, y_B: Tensor) -> list[Part]:
        """What each layer contributes."""
        calls = [self._calls[layer] for layer in self._layers]
        deltas = self._deltas(calls, logits_BC, y_B)
        parts = []
        for layer, call, delta in zip(self._layers, calls, deltas, strict=True):
            if delta is None or delta.shape[0] != y_B.shape[0] or call.x._version != call.version:
                raise NotKnown("a layer's output leads nowhere, or its input was changed in place")
            parts.append(PARTS[type(layer)](layer, call, delta))
        return parts

    def _deltas(self, calls: list[Call], logits_BC: Tensor, y_B: Tensor) -> Sequence[Tensor | None]:
        """Gradients of the examples' losses, of each its own, with respect to the layers' outputs."""
        delta_BC = loss_gradients(self._loss, logits_BC, y_B)
        if len(calls) == 1 and calls[0].sees_data and calls[0].output.node is logits_BC.grad_fn:
            return [delta_BC]  # the only trained layer says the logits: there is no way back to go
        uses = _uses(logits_BC)
        if any(uses[id(parameter)] != 1 for parameter in self._parameters):
            raise NotKnown("a parameter is not used exactly once, by its own layer")
        # The one backward pass, as far as the layers' outputs.
        return torch.autograd.grad(logits_BC, [call.output for call in calls], delta_BC, allow_unused=True)


# ---- The trial ---------------------------------------------------------------------------------------------

AGREEMENT = 1e-5
"""How far clipped sums may be from those made case by case, relative to these."""


def require_agreement(model: nn.Module, case_shape: tuple[int, ...]) -> int:
    """Try a model, which is left as it is, once in its life on a few random cases.

    Args:
        model: As it is to be trained; maps (B, *case_shape) to logits.
        case_shape: Shape of one case.

    Returns:
        How many examples one pass may take.

    Raises:
        NotKnown: if book-keeping doesn't give the clipped sums that clipping case by case gives.
    """
    if model not in _TRIED:
        try:
            apart, at_once = _tried(model, case_shape)
            wrong = "" if apart <= AGREEMENT else f"its sums are {apart:.1g} from those case by case"
            _TRIED[model] = Trial(wrong, at_once)
        except Exception as error:  # the user's own code may raise anything
            _TRIED[model] = Trial(f"it was tried in vain ({error})")
    trial = _TRIED[model]
    if trial.wrong:
        raise NotKnown(trial.wrong)
    return trial.at_once


@dataclass(frozen=True)
class Trial:
    """What a trial has shown: what is wrong, and how many examples one pass may take."""

    wrong: str
    at_once: int = UNTRIED


_TRIED: WeakKeyDictionary[nn.Module, Trial] = WeakKeyDictionary()


def _tried(model: nn.Module, case_shape: tuple[int, ...]) -> tuple[float, int]:
    """How far sums are from those case by case, and how many examples one pass may take."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tried = shaken(model)
        x_B = tried_cases(case_shape)
        y_B = torch.arange(CASES) % tried(x_B).shape[1]
        trained = [parameter for parameter in tried.parameters() if parameter.requires_grad]
        of_case = [
            torch.autograd.grad(cross_entropy(tried(x_B[i : i + 1]), y_B[i : i + 1]), trained)
            for i in range(CASES)
        ]
        norms = [_norm(gradient) for gradient in of_case]
        clipping_norm = sum(norms) / CASES  # so that it clips some
        wanted = [torch.zeros_like(parameter) for parameter in trained]
        for norm, gradient in zip(norms, of_case, strict=True):
            factor = min(1.0, clipping_norm / (norm + 1e-6))
            wanted = [sum_ + factor * part for sum_, part in zip(wanted, gradient, strict=True)]
        engine = BookKeeping(tried, cross_entropy, clipping_norm)
        found = engine(x_B, y_B)
    apart = _norm([one - other for one, other in zip(found, wanted, strict=True)]) / _norm(wanted)
    return apart, engine.at_once


def _norm(gradient: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient))


# ---- Particulars -------------------------------------------------------------------------------------------


def divided(phi_B: Tensor, y_B: Tensor, most: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Divide a batch into pieces of at most so many examples; one without any is a piece of its own."""
    count = max(1, -(-len(y_B) // most))
    return zip(phi_B.tensor_split(count), y_B.tensor_split(count), strict=True)


def added(sums: Iterable[list[Tensor]]) -> list[Tensor]:
    """Add up the sums of several batches, in float64 if there is more than one."""
    first, *others = sums
    for other in others:
        first = [one.double() + more for one, more in zip(first, other, strict=True)]
    return first


def _statistics(node: Any) -> tuple[Tensor, ...]:
    if not hasattr(node, "_saved_result2"):
        raise NotKnown(f"a normalisation ends in {node.name()}")
    return node._saved_result1, node._saved_result2


def _uses(logits_BC: Tensor) -> Counter[int]:
    """How many edges of the autograd graph lead to each leaf, by the leaf's id."""
    uses: Counter[int] = Counter()
    seen: set[Any] = {logits_BC.grad_fn}
    waiting: list[Any] = [logits_BC.grad_fn]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions if node is not None else ():
            if hasattr(following, "variable"):
                uses[id(following.variable)] += 1
            elif following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return uses


def _kept_numbers(layer: nn.Module, call: Call) -> int:
    """Size of the gradient that is kept for each example."""
    if isinstance(layer, nn.Embedding):
        return 0  # as many rows as it has tokens
    if isinstance(layer, nn.Linear):
        positions = _positions(layer, call)
        if positions == 1 or _pairs_are_cheaper(layer, positions):
            return 0
    return sum(parameter.numel() for parameter in layer.parameters(recurse=False) if parameter.requires_grad)
