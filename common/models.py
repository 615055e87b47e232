"""Models: the registry of architectures, fitness for private training, and models on disk.

A site may train any of these, and every site a different one: what travels is what a model thinks, never
what it is. Each is a `Classifier`: a *trunk* that makes features of a case and a linear *head* that makes
logits of features, so that a trunk can be frozen (`common.features`) and a head alone be learned in
private, whatever the architecture. No architecture here knows batch normalisation: it mixes the cases of a
batch, and then no gradient is one patient's alone.

A model file is safetensors with a `ModelCard` in its header. Nothing is ever unpickled, and a file can't
name code to run.

Shapes: N cases, C classes, D features, L ids; `case_shape` is (D,) for tables, (1, L) for texts and (colours,
height, width) for images.
"""

import copy
import importlib
import json
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.config import Layers
from common.errors import USERS_CODE, ConfigError, UserError, named
from common.fitness import CASES, require_cases_apart, tried_cases
from common.runs import write_whole
from common.texts import LARGEST_VOCABULARY, PADDING, is_text

log = logging.getLogger(__name__)

CaseShape = tuple[int, ...]

SMALLEST_SIDE = 8
"""Pixels below which the convolutional architectures have nothing left to convolve."""
GROUPS = 8
"""Groups of channels that are normalised together."""
CARD = "model_card"


class ModelFileError(UserError, ValueError):
    """A model file that is broken, or that doesn't fit."""


# ---- Architectures -----------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A trunk and a linear head.

    Attributes:
        trunk: Maps x (N, *case_shape) to features (N, D).
        head: Maps features (N, D) to logits (N, C).
    """

    def __init__(self, trunk: nn.Module, width: int, num_classes: int) -> None:
        """Put a fresh head on a trunk that gives `width` features."""
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, C)."""
        logits_NC: Tensor = self.head(self.trunk(x))
        return logits_NC


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions and a way around them (He et al. 2016, arXiv:1512.03385), with GroupNorm."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Change the number of channels, and divide the resolution by `stride`."""
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(GROUPS, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, channels),
        )
        alike = stride == 1 and channels_in == channels
        shortcut = nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False)
        self.around = nn.Identity() if alike else shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of `channels`."""
        return torch.relu(self.inner(x) + self.around(x))


class MeanOfPieces(nn.Module):
    """The mean of the vectors of a text's pieces; padding has no say, and an empty text is zero."""

    embedding: nn.Embedding

    def __init__(self, width: int) -> None:
        """Give every id that a text may have a vector of `width`."""
        super().__init__()
        self.embedding = nn.Embedding(LARGEST_VOCABULARY, width, padding_idx=PADDING)

    def forward(self, ids_N1L: Tensor) -> Tensor:
        """Return (N, width)."""
        ids_NL = ids_N1L.flatten(1).long()
        there_NL1 = (ids_NL != PADDING).unsqueeze(2).float()
        mean_ND: Tensor = (self.embedding(ids_NL) * there_NL1).sum(dim=1) / there_NL1.sum(dim=1).clamp(min=1)
        return mean_ND


def _linear(case_shape: CaseShape, num_classes: int) -> Classifier:
    model = Classifier(nn.Flatten(), math.prod(case_shape), num_classes)
    # Its loss is convex, so the start decides nothing: it begins without an opinion.
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    return model


def _mlp(case_shape: CaseShape, num_classes: int) -> Classifier:
    hidden = [nn.Linear(math.prod(case_shape), 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
    return Classifier(nn.Sequential(nn.Flatten(), *hidden), 64, num_classes)


def _cnn(case_shape: CaseShape, num_classes: int) -> Classifier:
    def stage(channels_in: int, channels: int, shrink: nn.Module) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels, 3, padding=1)
        return [convolution, nn.GroupNorm(GROUPS, channels), nn.ReLU(), shrink]

    trunk = nn.Sequential(
        *stage(case_shape[0], 16, nn.MaxPool2d(2)),
        *stage(16, 32, nn.MaxPool2d(2)),
        *stage(32, 48, nn.AdaptiveAvgPool2d(4)),
        nn.Flatten(),
    )
    return Classifier(trunk, 48 * 4 * 4, num_classes)


def _resnet_gn(case_shape: CaseShape, num_classes: int) -> Classifier:
    trunk = nn.Sequential(
        nn.Conv2d(case_shape[0], 16, 3, padding=1, bias=False),
        nn.GroupNorm(GROUPS, 16),
        nn.ReLU(),
        ResidualBlock(16, 16, stride=1),
        ResidualBlock(16, 32, stride=2),
        ResidualBlock(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return Classifier(trunk, 64, num_classes)


def _text(case_shape: CaseShape, num_classes: int) -> Classifier:
    """A deep averaging network (Iyyer et al. 2015, doi:10.3115/v1/P15-1162)."""
    trunk = nn.Sequential(MeanOfPieces(64), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU())
    return Classifier(trunk, 64, num_classes)


REGISTRY: Mapping[str, Callable[[CaseShape, int], Classifier]] = {
    "linear": _linear,
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet-gn": _resnet_gn,
    "text": _text,
}
"""At 28 × 28 grey pixels and 10 classes: 7,850, 109,386, 26,554 and 77,562 parameters; at texts and 2 classes
528,706."""

FOR_IMAGES = frozenset({"cnn", "resnet-gn"})
FOR_TEXTS = frozenset({"text"})


# ---- Building ----------------------------------------------------------------------------------------------


def build(
    name: str, case_shape: CaseShape, num_classes: int, seed: int, allowed_paths: Collection[str] = ()
) -> nn.Module:
    """Make a model whose initial weights depend on the arguments alone.

    Torch's global random state stays as it was.

    Args:
        name: A name from `REGISTRY`, or an import path `module:Class`.
        case_shape: Shape of one case.
        num_classes: C.
        seed: Public seed of the initial weights.
        allowed_paths: Import paths that this party's own policy allows, whatever a coordinator may ask for.

    Raises:
        ConfigError: if the name is unknown, the import path isn't allowed or leads to no model, or the
            architecture doesn't take such cases.
    """
    by_path = ":" in name
    if by_path and name not in allowed_paths:
        raise _refused(name, "an import path from this party's own allow-list")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if by_path:
            return load_by_path(name, case_shape, num_classes)
        _check_registered(name, case_shape)
        return REGISTRY[name](case_shape, num_classes)


def load_by_path(path: str, case_shape: CaseShape, num_classes: int) -> nn.Module:
    """Import a model of the user's own and try it on a few random cases.

    Args:
        path: `module:Class`, or any other callable that takes (case_shape, num_classes) and returns an
            `nn.Module`.
        case_shape: Shape of one case.
        num_classes: C.

    Raises:
        ConfigError: if it can't be imported or built, or doesn't map cases to finite logits (N, C), or
            doesn't leave them as they are.
    """
    module_name, _, attribute = path.partition(":")
    try:
        make = getattr(importlib.import_module(module_name), attribute)
    except USERS_CODE as error:  # importing runs it
        raise _refused(path, f"module:Class that can be imported ({named(error)})") from error
    arguments = f"(case_shape, num_classes) = ({case_shape}, {num_classes})"
    try:
        model = make(case_shape, num_classes)
    except USERS_CODE as error:
        raise _refused(path, f"a class that takes {arguments} ({named(error)})") from error
    if not isinstance(model, nn.Module):
        raise _refused(path, f"a class that makes a torch.nn.Module, not a {type(model).__name__}")
    was_training = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wrong = _wrong_with(model.eval(), tried_cases(case_shape), num_classes)
        # Pixels and categories lie between 0 and 1, and a model may rely on it.
        if wrong and _wrong_with(model, torch.rand(CASES, *case_shape), num_classes):
            raise _refused(path, wrong)
    return model.train(was_training)


def _wrong_with(model: nn.Module, x_B: Tensor, num_classes: int) -> str:
    shapes = f"x of shape {tuple(x_B.shape)} to finite logits of shape {(len(x_B), num_classes)}"
    expected, given_B = f"a model that maps {shapes}", x_B.clone()
    try:
        with torch.no_grad():
            logits = model(x_B)
    except USERS_CODE as error:
        return f"{expected} ({named(error)})"
    if not isinstance(logits, Tensor):
        return f"{expected}, not a {type(logits).__name__}"
    if logits.shape != (len(x_B), num_classes):
        return f"{expected}, not {tuple(logits.shape)}"
    if not bool(logits.isfinite().all()):
        return f"{expected}, not numbers that aren't finite"
    if not torch.equal(x_B, given_B):
        return "a model that leaves its cases as they are: others still need them"
    return ""


def _check_registered(name: str, case_shape: CaseShape) -> None:
    if name not in REGISTRY:
        near = get_close_matches(name, REGISTRY, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise _refused(name, f"one of {', '.join(REGISTRY)}, or module:Class{hint}")
    if is_text(case_shape) and name not in FOR_TEXTS:
        raise _refused(name, f"text, or features = words: cases are texts, and {name!r} takes numbers")
    if name in FOR_TEXTS and not is_text(case_shape):
        raise _refused(
            name, f"linear or mlp for cases of shape {case_shape}: {name!r} takes texts as they are"
        )
    if name not in FOR_IMAGES:
        return
    if len(case_shape) != 3:
        raise _refused(name, f"linear or mlp for cases of shape {case_shape}: {name!r} takes images")
    if min(case_shape[1:]) < SMALLEST_SIDE:
        raise _refused(name, f"linear or mlp: {name!r} takes images of {SMALLEST_SIDE} pixels a side or more")


def _refused(name: str, expected: str) -> ConfigError:
    return ConfigError("models", "model", name, expected)


# ---- Trunk and head ----------------------------------------------------------------------------------------


def head_of(model: nn.Module) -> nn.Linear:
    """Return what makes logits of features: `model.head`, or the last layer of an `nn.Sequential`.

    Every model of the registry has `.trunk` and `.head`; a user's own model is treated alike if it has them.

    Raises:
        UserError: if the model has no such parts.
    """
    return _split(model)[1]


def trunk_of(model: nn.Module) -> nn.Module:
    """Return what makes features of cases: `model.trunk`, or all but the last layer of an `nn.Sequential`.

    Raises:
        UserError: if the model has no such parts.
    """
    return _split(model)[0]


def has_trunk(model: nn.Module) -> bool:
    """Whether the model has a trunk that learns and a head, so that one can be frozen below the other."""
    try:
        return next(trunk_of(model).parameters(), None) is not None
    except UserError:
        return False


def cut(model: nn.Module, layers: Layers) -> tuple[nn.Module, nn.Module]:
    """Divide a model into what stays frozen and what learns; one after the other they are the model.

    The last block begins with the last part of the trunk that has a matrix of weights: a convolution with
    what follows it, a residual block, a layer of a perceptron.

    Args:
        model: A model with a trunk and a head.
        layers: Which layers learn.

    Raises:
        UserError: if the model has no such parts, or a last block is asked of a trunk that is no
            `nn.Sequential`.
    """
    trunk, head = _split(model)
    if layers == "all":
        return nn.Identity(), model
    if layers == "head":
        return trunk, head
    if not isinstance(trunk, nn.Sequential):
        raise UserError(f"{type(model).__name__} has no last block: its trunk is no nn.Sequential")
    parts = list(trunk.children())
    weighty = [place for place, part in enumerate(parts) if any(w.dim() > 1 for w in part.parameters())]
    last = weighty[-1] if weighty else 0
    return nn.Sequential(*parts[:last]), nn.Sequential(*parts[last:], head)


def _split(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    trunk, head = getattr(model, "trunk", None), getattr(model, "head", None)
    if isinstance(model, nn.Sequential) and len(model) > 1:
        trunk, head = model[:-1], model[-1]
    if not isinstance(trunk, nn.Module) or not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no trunk and head: give it an attribute `trunk` (a module from "
            "cases to features) and an attribute `head` (an nn.Linear from features to logits)"
        )
    return trunk, head


# ---- Private training --------------------------------------------------------------------------------------


def private_ready(model: nn.Module, case_shape: CaseShape) -> nn.Module:
    """Return a copy that may be trained in private, in training mode.

    Batch normalisation becomes group normalisation and forgets its running statistics. Opacus would do that
    too, but it overlooks subclasses and layers without weights of their own, which mix a batch just the
    same. Layers that change their input in place do so no longer. What else mixes cases or remembers them is
    refused, by its layers and then by a trial (`common.fitness`).

    Args:
        model: Any model; it is left as it is.
        case_shape: Shape of what it takes for one case.

    Raises:
        UserError: naming the first layer that is not fit, or what the trial found.
    """
    from opacus.validators import ModuleValidator  # slow to import, and only who trains in private needs it

    fit = copy.deepcopy(model).train()
    for name, layer in _batch_norms(fit):
        channels = layer.num_features
        # A channel of a flat case is one number, and a group of one number is always normalised to zero.
        groups = 1 if isinstance(layer, nn.BatchNorm1d) else math.gcd(32, channels)
        fit = _replaced(fit, name, nn.GroupNorm(groups, channels, affine=layer.affine))
        log.info("layer %s: GroupNorm takes the place of %s for private training", name, type(layer).__name__)
    for part in fit.modules():
        if "inplace" in vars(part):
            vars(part)["inplace"] = False  # it computes the same, and Opacus's hooks refuse changes in place
    for name, layer in fit.named_modules():
        complaints = ModuleValidator.VALIDATORS.get(type(layer), lambda _: [])(layer)
        trained = any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
        if trained and next(layer.buffers(recurse=False), None) is not None:
            complaints = [*complaints, "it keeps numbers beside its weights, which no noise protects"]
        if complaints:
            what = f"layer {name or 'itself'} ({type(layer).__name__})"
            raise UserError(f"{what} can't be trained in private: {complaints[0]}")
    require_cases_apart(fit, case_shape)
    return fit


def _batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)]


def _replaced(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    if not name:
        return layer
    model.set_submodule(name, layer)
    return model


# ---- Models on disk ----------------------------------------------------------------------------------------


class FeatureCard(BaseModel):
    """What it takes to rebuild frozen features around their stored numbers (`common.features`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: str
    raw_width: int
    columns: int


class TrunkCard(BaseModel):
    """What of the model is a frozen trunk below the layers that learn."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layers: Layers
    """Which layers learn."""
    raw_width: int = 0
    columns: int = 0
    """The trunk's principal components that a head sees."""


class ModelCard(BaseModel):
    """What a model file says about its model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str
    """Name in the registry, or the import path that it was built from."""
    case_shape: tuple[int, ...]
    """Shape of one encoded case, before any features."""
    classes: tuple[str, ...]
    """Names of the classes in the order of the logits."""
    features: FeatureCard | None = None
    trunk: TrunkCard | None = None


def model_bytes(model: nn.Module, card: ModelCard) -> bytes:
    """Write a model as the bytes of a safetensors file; equal models give equal bytes."""
    # Cloned, since safetensors refuses weights that share memory.
    layout = torch.contiguous_format
    tensors = {name: tensor.clone(memory_format=layout) for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(tensors, metadata={CARD: card.model_dump_json()})


def save_model(path: Path, model: nn.Module, card: ModelCard) -> None:
    """Write a model file, whole or not at all.

    Raises:
        UserError: if it can't be written.
    """
    write_whole(path, model_bytes(model, card))


def read_card(path: Path) -> ModelCard:
    """Read the card of a model file.

    Raises:
        OSError: if the file can't be read.
        ModelFileError: if it holds none.
    """
    data = path.read_bytes()
    try:
        length = int.from_bytes(data[:8], "little")
        return ModelCard.model_validate_json(json.loads(data[8 : 8 + length])["__metadata__"][CARD])
    except (ValueError, KeyError, TypeError):
        raise ModelFileError(f"{path} is no model file of ours: its header holds no model card") from None


def load_weights(data: bytes, into: nn.Module) -> None:
    """Read the weights of a model file into a model that was built alike.

    Raises:
        ModelFileError: naming the first weight that doesn't fit; the model is then as it was.
    """
    try:
        found = safetensors.torch.load(data)
    except SafetensorError as error:
        raise ModelFileError(f"it is no safetensors file ({error})") from None
    wanted = into.state_dict()
    for complaint in _misfits(wanted, found):
        raise ModelFileError(complaint)
    into.load_state_dict(found)


def _misfits(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    for name in wanted.keys() - found.keys():
        yield f"{name} is missing: it is another architecture's"
    for name in found.keys() - wanted.keys():
        yield f"{name} is not the model's: it is another architecture's"
    for name, tensor in wanted.items():
        if found[name].shape != tensor.shape:
            yield f"{name} has shape {tuple(found[name].shape)}, the model's has {tuple(tensor.shape)}"
        if not bool(found[name].isfinite().all()):
            yield f"{name} is not finite"


def load_model(path: Path, into: nn.Module | None = None) -> tuple[nn.Module, ModelCard]:
    """Read a model from a file.

    Args:
        path: A file that `save_model` wrote.
        into: The model that takes the weights; without it one is built from the registry as the card says.
            (A card that names an import path is not followed: a file must not choose what code runs.)

    Raises:
        OSError: if the file can't be read.
        ModelFileError: if it is broken or doesn't fit.
        ConfigError: if the card's model can't be built.
    """
    card = read_card(path)
    model = build(card.model, card.case_shape, len(card.classes), seed=0) if into is None else into
    try:
        load_weights(path.read_bytes(), model)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    return model, card
