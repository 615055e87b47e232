"""Whether a model may be trained in private, found out by trying it.

Per-example clipping bounds what one patient does only if each per-example gradient is one patient's alone.
The validator of layers (`common.models.private_ready`) knows layers by their type. A model of a user's own
may yet do in its `forward` what no layer shows: take the mean of a batch away, fold a case into several rows,
remember the cases it saw. So it is tried on a few random public cases:

1. what it says of a case is the same in company, alone, and after other cases, in training and in use;
2. no buffer or weight changes by a forward pass, nor the cases themselves, which whoever asks still needs;
3. it takes a batch of many cases, of one and of none, which Poisson sampling draws;
4. Opacus's per-example gradients are as many as there are cases, and each is the gradient of that case alone.

Weights are shaken first, since gradients behind a head that is still zero are zero themselves. Dropout,
whose chance is each case's own, is switched off. This is a trial, not a proof.

Shape legend: B cases of the trial.
"""

import copy
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from common.errors import USERS_CODE, UserError, named
from common.texts import LEAST_VOCABULARY, is_text

CASES, MANY = 4, 64
SHAKE = 0.1
"""Standard deviation of what is added to each weight."""


def require_cases_apart(model: nn.Module, case_shape: tuple[int, ...]) -> None:
    """Try a model, which is left as it is, as is torch's global random state.

    Args:
        model: Maps (B, *case_shape) to logits (B, C).
        case_shape: Shape of one case.

    Raises:
        UserError: saying why it can't be trained in private.
    """

    def trial() -> str:
        tried = shaken(model)
        return next(_complaints(tried, tried_cases(case_shape), tried_cases(case_shape)), "")

    if wrong := _said_by(trial, f"{MANY} cases, on {CASES}, on one or on none"):
        raise UserError(f"{type(model).__name__} can't be trained in private: {wrong}")


def require_frozen_apart(trunk: nn.Module, case_shape: tuple[int, ...]) -> None:
    """Try layers that stay as they are below what learns: what they make of a case must be its own alone.

    Args:
        trunk: Maps (B, *case_shape) to anything, in evaluation mode; it is left as it is.
        case_shape: Shape of one case.

    Raises:
        UserError: saying why nothing can be trained in private above them.
    """

    def trial() -> str:
        return _wrong_in_use(copy.deepcopy(trunk), tried_cases(case_shape), tried_cases(case_shape))

    if wrong := _said_by(trial, f"{CASES} cases, or on one"):
        raise UserError(f"nothing can be trained in private above {type(trunk).__name__}: {wrong}")


def require_judgement_apart(teacher: nn.Module, cases: Tensor) -> None:
    """Try a model that public cases train: what it says of a case, once trained, must be its own alone.

    Args:
        teacher: Maps cases (B, ...) to logits; it is left as it is.
        cases: Some public ones, two or more: it judges no others, and may rely on what they are like.

    Raises:
        UserError: saying why it can't be a teacher.
    """
    x_B, others_B = cases.tensor_split(2)

    def trial() -> str:
        return _wrong_in_use(shaken(teacher), x_B, others_B)

    if wrong := _said_by(trial, f"{len(x_B)} cases, or on one"):
        raise UserError(f"{type(teacher).__name__} can't be a teacher: {wrong}")


def _said_by(trial: Callable[[], str], on: str) -> str:
    """What a trial complains of; it draws the same chance each time, and none of the caller's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return trial()
        except USERS_CODE as error:
            return f"it fails on {on} ({named(error)})"


def _wrong_in_use(tried: nn.Module, x_B: Tensor, others_B: Tensor) -> str:
    tried.eval()
    together, before = _says(tried, x_B), _numbers(tried)
    alone = torch.cat([_says(tried, case[None]) for case in x_B])
    _says(tried, others_B)
    after = _numbers(tried)
    if not _close(alone, together):
        return "what it makes of a case depends on the others in the batch"
    if not all(torch.equal(before[name], after[name]) for name in before):
        return "a forward pass changes its weights or buffers"
    if not _close(_says(tried, x_B, chance=1), together):
        return "it draws chance, or remembers cases"
    return ""


def tried_cases(case_shape: tuple[int, ...]) -> Tensor:
    """Draw cases to try a model on: ids of every vocabulary where cases are texts, else numbers."""
    if is_text(case_shape):
        return torch.randint(LEAST_VOCABULARY, (CASES, *case_shape)).float()
    return torch.randn(CASES, *case_shape)


def shaken(model: nn.Module) -> nn.Module:
    """Return a copy in training mode with weights that are nowhere zero, and without dropout."""
    tried = copy.deepcopy(model).train()
    with torch.no_grad():
        for weight in tried.parameters():
            weight.add_(SHAKE * torch.randn_like(weight))
    for layer in tried.modules():
        if isinstance(layer, _DropoutNd):
            layer.p = 0.0
    return tried


def _complaints(model: nn.Module, x_B: Tensor, others_B: Tensor) -> Iterator[str]:
    if not any(weight.requires_grad for weight in model.parameters()):
        yield "none of its weights can be trained"
    untouched, given_B = x_B._version, x_B.clone()
    in_use = _says(model.eval(), x_B)
    model.train()
    before = _numbers(model)
    together = _says(model, x_B)
    if x_B._version != untouched or not torch.equal(x_B, given_B):
        yield "it changes its cases in place"
    if not _close(_says(model, x_B, chance=1), together):
        yield (
            "of the same cases it says something else the second time: it draws chance other than by "
            "torch.nn's dropout layers, or remembers cases"
        )
    alone = torch.cat([_says(model, case[None]) for case in x_B])
    if not _close(alone, together):
        yield "what it says of a case depends on the others in the batch"
    _says(model, others_B)
    _says(model, x_B.repeat(MANY // CASES, *[1] * (x_B.dim() - 1)))
    after = _numbers(model)
    if not all(torch.equal(before[name], after[name]) for name in before):
        yield "a forward pass changes its weights or buffers, which no noise protects"
    if not _close(_says(model, x_B), together) or not _close(_says(model.eval(), x_B), in_use):
        yield "it remembers cases: what it says changes with those it saw before"
    model.train()
    yield from _complaints_of_gradients(model, x_B)
    yield from _complaints_of_gradients(model, x_B.flip(0))  # whoever sorts may have found them in order
    if _says(model, x_B[:0]).shape != together[:0].shape:
        yield "it makes something of a batch without cases"
    for name, gradient in _per_example(model, x_B[:0]).items():
        if gradient is None or len(gradient):
            yield f"{name} has gradients in a batch without cases"


def _complaints_of_gradients(model: nn.Module, x_B: Tensor) -> Iterator[str]:
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    alone = [
        torch.autograd.grad(
            _loss(model, x_B[place : place + 1], place), [*trained.values()], allow_unused=True
        )
        for place in range(len(x_B))
    ]
    gradients = _per_example(model, x_B)
    for (name, weight), *of_case in zip(trained.items(), *alone, strict=True):
        gradient = gradients[name]
        if gradient is None:
            yield f"{name} takes no part in the logits: freeze it, or take it out"
        elif gradient.shape != (len(x_B), *weight.shape):
            yield f"{name} has {len(gradient)} gradients for {len(x_B)} cases: a case is folded into several"
        else:
            expected = torch.stack([torch.zeros_like(weight) if one is None else one for one in of_case])
            if not _close(gradient, expected):
                yield f"the per-example gradients of {name} are not those of each case alone"


def _says(model: nn.Module, x_B: Tensor, chance: int = 0) -> Tensor:
    torch.manual_seed(chance)
    with torch.no_grad():
        logits: Tensor = model(x_B)
    return logits


def _loss(model: nn.Module, x_B: Tensor, first: int = 0) -> Tensor:
    torch.manual_seed(0)
    logits = model(x_B)
    labels = torch.arange(first, first + len(x_B)) % logits.shape[1]
    return nn.functional.cross_entropy(logits, labels)


def _per_example(model: nn.Module, x_B: Tensor) -> dict[str, Tensor | None]:
    from opacus import GradSampleModule  # slow to import, and only who trains in private needs it

    tried = GradSampleModule(copy.deepcopy(model), loss_reduction="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the cases, which are data, need no gradient
        _loss(tried, x_B).backward()
    return {
        name.removeprefix("_module."): getattr(weight, "grad_sample", None)
        for name, weight in tried.named_parameters()
        if weight.requires_grad
    }


def _numbers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all weights and buffers, those too that aren't saved."""
    return {
        name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())
    }


def _close(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same but for rounding in another order."""
    scale = float(other.detach().abs().max()) if other.numel() else 0.0
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-3, atol=1e-4 * scale + 1e-7)
