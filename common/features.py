"""Frozen public features in front of a head: what buys most accuracy under a privacy budget, for free.

The gradients of a small head are short vectors, so the noise that hides one patient in them hurts little.
All that comes before the head is fixed by public cases alone, the *proxy*: a scattering transform, the trunk
of a network that learned from them (`common.trunks`), the words of a text weighted by how rare they are, and
behind each a PCA fitted on the proxy. It keeps
the directions in which public cases differ most and divides each by the square root of its standard deviation
("half whitening"), so that a gradient step reaches the smaller ones too, and noise in them is not blown up as
by full whitening.

Every party fits its features itself. They depend on the proxy's bytes alone (and on a trunk's weights):
nothing is random in them, the PCA is an eigendecomposition in float64, and the sign of each
direction is fixed. One machine gets the same bits each time; two machines may differ in the last bits of a
float32, which harms nothing: a site tells how its own student moved, and a linear student moves alike
behind any rotation of its features.

Chosen on a part of Fashion-MNIST that no reported number uses (3,000 proxy cases; 12,000 private ones,
pooled, 30 steps at ε = 1 from a head of 300 labels): logarithms of scattering coefficients gain 0.9 points
over standardised coefficients without privacy, and 1.4 for a head of 3,000 labels; without whitening 1.5
points are lost, and with full whitening the head of 300 labels starts 3 points lower; a mean norm of 3 to 6
makes no difference, 1 loses a point; 64, 128, 192 columns give 87.4, 88.9, 89.2 %.

Shapes: N cases, R raw features, K columns kept.
"""

import copy
import hashlib
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor, nn
from torch.nn.functional import normalize

from common import seeds
from common.config import Layers
from common.errors import ConfigError, UserError
from common.memo import Memo
from common.models import (
    CaseShape,
    FeatureCard,
    ModelCard,
    TrunkCard,
    build,
    cut,
    load_model,
    read_card,
)
from common.scattering import scatter
from common.texts import LARGEST_VOCABULARY, PADDING, is_text

Floats = NDArray[np.float32]

ROW_NORM = 3.0
"""Root of the mean squared norm of a proxy case's features: with it a clipping norm of 1 and steps of 2 to
8 work well."""
WHITENING = 0.5
"""Each principal component is divided by its variance to half this power: 0 leaves it, 1 makes variances
equal."""
LOG_UNIT = 0.5
"""Where the logarithm of a scattering coefficient takes over, in mean absolute coefficients."""
LEAST_VARIANCE = 1e-10
"""Directions with less than this share of the largest variance are rounding errors, and are left out."""
FIT_CASES = 4096
"""Proxy cases that the PCA looks at; where there are more, the seed draws them."""
CASES_AT_ONCE = 256


# ---- Maps --------------------------------------------------------------------------------------------------


class Features(nn.Module):
    """A frozen map from encoded cases to what a head sees.

    It has no parameters that train, stays in evaluation mode, and may be shared by several parties in one
    process.

    Attributes:
        kind: One of `KINDS`.
        name: Kind and digest: equal names mean equal features.
        shape: Shape of what a head sees: (K,), or the case's own shape for `none`.
        raw: Maps x (N, *case_shape) to (N, R).
        projection: Maps (N, R) to (N, K).
        trunk: What stands in a model file about a network's frozen layers, where `raw` ends in them.
    """

    def __init__(
        self,
        kind: str,
        raw: nn.Module,
        projection: nn.Module,
        shape: CaseShape,
        digest: str,
        trunk: TrunkCard | None = None,
    ) -> None:
        """Freeze a fitted map."""
        super().__init__()
        self.trunk = trunk
        self.kind, self.shape, self.name = kind, shape, f"{kind}-{digest[:16]}"
        self.raw, self.projection = raw, projection
        self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, whatever the model around does."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map cases (N, *case_shape) to features (N, *shape)."""
        phi: Tensor = self.projection(self.raw(x))
        return phi

    def transform(self, x: Floats | Tensor) -> Tensor:
        """Map any number of cases, a few at a time, without gradients; float32."""
        cases = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float32))
        with torch.no_grad():
            return torch.cat(
                [self(cases[i : i + CASES_AT_ONCE]) for i in range(0, max(len(cases), 1), CASES_AT_ONCE)]
            )

    def transform_public(self, x: Floats) -> Tensor:
        """Do as `transform`, but remember the result by the cases' content.

        Only for public cases, which many parties in one process look at: private ones must leave no copy
        behind.
        """
        return _VIEWS.get(f"{self.name}:{_digest(x)}", lambda: self.transform(x))

    def card(self) -> FeatureCard | None:
        """Describe the map for a model file, up to a trunk if there is one."""
        if self.trunk is not None:
            below = next(self.raw.children())
            return below.card() if isinstance(below, Features) else None
        if not isinstance(self.projection, Projection):
            return None
        raw_width, columns = self.projection.directions.shape
        return FeatureCard(kind=self.kind, raw_width=raw_width, columns=columns)


class Scattering(nn.Module):
    """The logarithms of an image's scattering coefficients (`common.scattering`), flattened.

    Coefficients are sums of moduli, spread over orders of magnitude; their logarithms vary by how *many
    times* an image has more of an edge than another. sign(s)·log(1 + |s|/unit) is linear around 0 and takes
    the negative ones of centred images.
    """

    unit: Tensor

    def __init__(self) -> None:
        """Start with a unit of 1."""
        super().__init__()
        self.register_buffer("unit", torch.ones(()))

    def fit(self, images_NCHW: Tensor) -> None:
        """Set the unit by public images, so that the scale of pixels does not matter."""
        mean = scatter(images_NCHW).double().abs().mean()
        self.unit = (LOG_UNIT * mean).clamp(min=torch.finfo(torch.float32).tiny).float()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Map images to (N, R)."""
        coefficients_NR = scatter(images_NCHW).flatten(1)
        return coefficients_NR.sign() * (coefficients_NR.abs() / self.unit).log1p()


class Words(nn.Module):
    """Which pieces a text has, each weighted by its inverse document frequency, as a vector of length 1.

    With the PCA behind it this is latent semantic analysis (Deerwester et al. 1990, *Indexing by latent
    semantic analysis*, JASIS 41:6): texts come close to one another that share words, or words that others
    share.
    """

    rarity: Tensor

    def __init__(self) -> None:
        """Start with equal weights."""
        super().__init__()
        self.register_buffer("rarity", torch.ones(LARGEST_VOCABULARY))

    def fit(self, ids_N1L: Tensor) -> None:
        """Set the weights by public texts: log((1 + N) / (1 + texts that have the piece)) + 1."""
        with_it_V = sum(_present(piece).sum(dim=0) for piece in ids_N1L.split(CASES_AT_ONCE))
        self.rarity = ((1 + len(ids_N1L)) / (1 + torch.as_tensor(with_it_V))).log() + 1

    def forward(self, ids_N1L: Tensor) -> Tensor:
        """Map texts to (N, R)."""
        return normalize(_present(ids_N1L) * self.rarity, dim=1)


def _present(ids_N1L: Tensor) -> Tensor:
    ids_NL = ids_N1L.flatten(1).long()
    present_NV = torch.zeros(len(ids_NL), LARGEST_VOCABULARY).scatter_(1, ids_NL, 1.0)
    present_NV[:, PADDING] = 0.0
    return present_NV


def piece_vectors(words: "Features", at_most: int) -> Tensor:
    """What each piece adds to the leading components of a text that has it, (V, K), before it is scaled.

    Args:
        words: Features of the kind `words`.
        at_most: Most components.
    """
    if not isinstance(words.raw, Words) or not isinstance(words.projection, Projection):
        raise ValueError(f"features of kind {words.kind} know no pieces")
    return words.raw.rarity[:, None] * words.projection.directions[:, :at_most]


class Projection(nn.Module):
    """Subtract the proxy's mean, project on its principal directions, scaled."""

    mean: Tensor
    directions: Tensor

    def __init__(self, mean_R: Tensor, directions_RK: Tensor) -> None:
        """Keep both as float32 buffers."""
        super().__init__()
        self.register_buffer("mean", mean_R.float())
        self.register_buffer("directions", directions_RK.float())

    @classmethod
    def fit(cls, raw_NR: Tensor, size: int) -> "Projection":
        """Find the principal directions of public cases.

        Args:
            raw_NR: Raw features of the proxy.
            size: Most columns to keep; there are fewer where the cases vary in fewer directions.

        Raises:
            UserError: if the cases are all alike.
        """
        raw_NR = raw_NR.double()
        mean_R = raw_NR.mean(dim=0)
        centred_NR = (raw_NR - mean_R).numpy()
        cases, width = centred_NR.shape
        # Both products have the same eigenvalues, so the smaller will do.
        by_cases = cases < width
        product = centred_NR @ centred_NR.T if by_cases else centred_NR.T @ centred_NR
        order = len(product)
        energy, vectors = eigh(product, subset_by_index=[max(order - size, 0), order - 1])
        if energy[-1] <= LEAST_VARIANCE**2 * float(raw_NR.square().sum()):
            raise UserError(
                "features: the proxy's cases are all alike, so nothing can be learned from their differences"
            )
        kept = np.flatnonzero(energy > LEAST_VARIANCE * energy[-1])[::-1]
        energy_K, vectors = energy[kept], vectors[:, kept]
        directions_RK = centred_NR.T @ vectors / np.sqrt(energy_K) if by_cases else vectors
        largest_K = np.abs(directions_RK).argmax(axis=0)
        directions_RK = directions_RK * np.sign(directions_RK[largest_K, np.arange(len(kept))])
        variance_K = energy_K / cases
        spread = np.sqrt((variance_K ** (1 - WHITENING)).sum())
        scale_K = variance_K ** (-WHITENING / 2) * ROW_NORM / spread
        return cls(mean_R, torch.from_numpy(directions_RK * scale_K))

    @classmethod
    def blank(cls, card: FeatureCard | TrunkCard) -> "Projection":
        """Make one whose numbers are still to be read from a file."""
        return cls(torch.zeros(card.raw_width), torch.zeros(card.raw_width, card.columns))

    def forward(self, raw_NR: Tensor) -> Tensor:
        """Map (N, R) to (N, K)."""
        phi_NK: Tensor = (raw_NR - self.mean) @ self.directions
        return phi_NK


class FeaturedModel(nn.Module):
    """A model with the frozen features that it sees: it takes encoded cases, as any other model does."""

    def __init__(self, features: Features, model: nn.Module) -> None:
        """Put `features` before `model`."""
        super().__init__()
        self.features, self.model = features, model

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, C)."""
        logits_NC: Tensor = self.model(self.features(x))
        return logits_NC


# ---- Fitting -----------------------------------------------------------------------------------------------


RAW: Mapping[str, Callable[[], nn.Module]] = {
    "pca": nn.Flatten,
    "scattering": Scattering,
    "words": Words,
}
"""How each kind makes raw features of a case, before its PCA."""

KINDS = ("none", *RAW)


def fit_features(kind: str, proxy_x: Floats, size: int, seed: int) -> Features:
    """Fit features on the proxy, or return those that this process has fitted before on the same bytes.

    Args:
        kind: One of `KINDS`.
        proxy_x: The proxy's encoded cases, (N, *case_shape).
        size: Most columns to keep; `Features.shape` says how many there are.
        seed: Public seed of the cases that the PCA looks at where the proxy has more than `FIT_CASES`;
            otherwise nothing depends on it.

    Raises:
        ConfigError: if the kind is unknown or isn't for such cases.
        UserError: if the cases are all alike.
    """
    _check_kind(kind, proxy_x.shape[1:])
    if kind == "none":
        return Features(kind, nn.Identity(), nn.Identity(), proxy_x.shape[1:], "as-it-is")
    digest = _digest(proxy_x, about=f"{kind}, {size}, {_drawn_by(seed, proxy_x)}")
    return _FITS.get(digest, lambda: _fit(kind, proxy_x, size, seed, digest))


def above_trunk(
    features: Features, lower: nn.Module, layers: Layers, proxy_x: Floats, size: int, seed: int
) -> Features:
    """Put frozen layers of a network behind features: what learns sits above them.

    Args:
        features: What the network sees.
        lower: Its frozen layers (`common.models.cut`), trained on public cases or not at all; copied.
        layers: Which layers learn. A head alone sees principal components of what comes out of `lower`, since
            a clipped gradient spends itself on directions in which cases hardly differ; a block sees it as it
            is.
        proxy_x: The proxy's encoded cases.
        size: Most components.
        seed: As for `fit_features`.

    Raises:
        UserError: if all the proxy's cases look alike from there.
    """
    weights = [tensor.numpy() for tensor in lower.state_dict().values()]
    about = f"{features.name}, {layers}, {size}, {_drawn_by(seed, proxy_x)}"
    digest = _digest(proxy_x, *weights, about=about)

    def fit() -> Features:
        raw = nn.Sequential(features, copy.deepcopy(lower))
        looked_at = _looked_at(proxy_x, seed) if layers == "head" else proxy_x[:1]
        raw_NR = Features(features.kind, raw, nn.Identity(), (), digest).transform(looked_at)
        if layers != "head":
            shape, card = tuple(raw_NR.shape[1:]), TrunkCard(layers=layers)
            return Features(features.kind, raw, nn.Identity(), shape, digest, card)
        projection = Projection.fit(raw_NR, size)
        width, columns = projection.directions.shape
        card = TrunkCard(layers=layers, raw_width=width, columns=columns)
        return Features(features.kind, raw, projection, (columns,), digest, card)

    return _FITS.get(digest, fit)


def _fit(kind: str, proxy_x: Floats, size: int, seed: int, digest: str) -> Features:
    looked_at, raw = _looked_at(proxy_x, seed), RAW[kind]()
    match raw:
        case Scattering():
            raw.fit(torch.tensor(looked_at[:CASES_AT_ONCE]))
        case Words():
            raw.fit(torch.tensor(looked_at))
    raw_NR = Features(kind, raw, nn.Identity(), (), digest).transform(looked_at)
    projection = Projection.fit(raw_NR, size)
    return Features(kind, raw, projection, tuple(projection.directions.shape[1:]), digest)


def _looked_at(proxy_x: Floats, seed: int) -> Floats:
    if len(proxy_x) <= FIT_CASES:
        return proxy_x
    return proxy_x[np.sort(seeds.generator(seed, "features").choice(len(proxy_x), FIT_CASES, replace=False))]


def _drawn_by(seed: int, proxy_x: Floats) -> int | None:
    return seed if len(proxy_x) > FIT_CASES else None


def _check_kind(kind: str, case_shape: CaseShape) -> None:
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError("features", "features", kind, f"one of {', '.join(KINDS)}{hint}")
    if kind == "scattering" and len(case_shape) != 3:
        wrong = f"none or pca for cases of shape {case_shape}: it takes images"
    elif kind == "words" and not is_text(case_shape):
        wrong = f"none or pca for cases of shape {case_shape}: it takes texts"
    elif kind == "pca" and is_text(case_shape):
        wrong = "words, or model = text with features = none: the numbers of a text's pieces have no order"
    else:
        return
    raise ConfigError("features", "features", kind, wrong)


# ---- On disk -----------------------------------------------------------------------------------------------


def load_featured_model(path: Path) -> tuple[nn.Module, ModelCard]:
    """Read a model file and the features in it, if any: what comes back takes encoded cases.

    Raises:
        OSError: if the file can't be read.
        ModelFileError: if it is broken.
        ConfigError: if what its card names can't be built.
    """
    card = read_card(path)
    if card.features is None and card.trunk is None:
        return load_model(path)
    features = Features("none", nn.Identity(), nn.Identity(), card.case_shape, FROM_A_FILE)
    if card.features is not None:
        _check_kind(card.features.kind, card.case_shape)
        raw, blank = RAW[card.features.kind](), Projection.blank(card.features)
        features = Features(card.features.kind, raw, blank, (card.features.columns,), FROM_A_FILE)
    model = build(card.model, features.shape, len(card.classes), seed=0)
    if card.trunk is not None:
        features, model = _blank_trunk(card.trunk, features, model, len(card.classes))
    return load_model(path, into=FeaturedModel(features, model))


def _blank_trunk(
    card: TrunkCard, features: Features, model: nn.Module, num_classes: int
) -> tuple[Features, nn.Module]:
    lower, learned = cut(model, card.layers)
    raw = nn.Sequential(features, lower)
    if card.layers != "head":
        return Features(features.kind, raw, nn.Identity(), (), FROM_A_FILE), learned
    shape = (card.columns,)
    above = Features(features.kind, raw, Projection.blank(card), shape, FROM_A_FILE)
    return above, build("linear", shape, num_classes, seed=0)


FROM_A_FILE = "from-a-file"


# ---- What this process has computed before -----------------------------------------------------------------


_FITS = Memo[Features](capacity=16)
_VIEWS = Memo[Tensor](capacity=32)


def _digest(*arrays: NDArray[np.generic], about: str = "") -> str:
    sha = hashlib.sha256(about.encode())
    for array in arrays:
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(np.ascontiguousarray(array).data)
    return sha.hexdigest()
