"""Public trunks: what a deep network knows before it meets a patient.

The lower layers of a network need many cases and, trained in private, much noise. So they are trained on
the proxy instead, free of any budget, and what a site learns in private sits above them. A trunk learns two
things at once:

- *feature matching* (FitNets, Romero et al. 2015, arXiv:1412.6550, equation 3): a linear map of what it makes
  of a case must give that case's principal components, each with variance 1: of its scattering coefficients
  where it is an image, of its words where it is a text, of itself where it is a row of a table. A network
  behind frozen features must give these features back in their own proportions: where it is narrower than
  they are, the leading ones count. This needs no label, and any case will do: so images are shifted and
  mirrored, texts lose words, and rows are mixed with one another;
- the labels, where the proxy has some: cross-entropy through a head that is thrown away.

Everything follows from the proxy and a fixed public seed: every party trains the same trunk, and a process
only once. Two machines may differ in the last bits, and training makes more of it; that harms nothing, since
no site's trunk need be another's.

Shapes: N cases, D features, T matched components.
"""

import hashlib
import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.utils.flop_counter import FlopCounterMode

from common import seeds
from common.features import Features, fit_features, piece_vectors
from common.losses import feature_matching_loss
from common.memo import Memo
from common.models import SMALLEST_SIDE, CaseShape, MeanOfPieces, build, head_of, trunk_of
from common.proxy import Proxy
from common.texts import is_text

log = logging.getLogger(__name__)

MATCHED = 128
"""Principal components that a trunk is trained to give."""
SHARE_OF_LABELS = 0.5
"""Weight of the cross-entropy beside the mean squared error of a component, halved."""
STEPS = 480
STEPS_BEHIND_FEATURES = 3000
"""Of a network that sees frozen features: its steps take next to no time."""
BATCH = 128
MOST_WORK = 4e12
"""Floating-point operations of one training, at most: about a minute on one core. Fewer steps are taken for
networks that would need more."""
STEP_SIZE = 3e-3
"""The largest of AdamW; it rises over the first steps and falls to zero at the end."""
WARM_UP = 0.15
WEIGHT_DECAY = 1e-4
VIEWS = 4
"""Views of each case that are trained on: the case, and with other shifts or other partners."""
SHIFT = 1 / 14
"""Farthest that an image is shifted, as a share of its side."""
LOSS = 0.2
"""Share of a text's pieces that a view of it lacks."""


def public_trunk(name: str, features: Features, proxy: Proxy) -> nn.Module:
    """Train the trunk of an architecture on the proxy, or return the one that this process has trained.

    Args:
        name: Architecture in the registry, with a trunk.
        features: What the network sees of a case.
        proxy: The public cases.

    Returns:
        The trunk, frozen, in evaluation mode; not to be changed, for others hold it too.
    """
    key = hashlib.sha256(f"{name}, {features.name}, {proxy.digest.hex()}".encode()).hexdigest()
    return _TRUNKS.get(key, lambda: _train(name, features, proxy))


_TRUNKS = Memo[nn.Module](capacity=8)


def _train(name: str, features: Features, proxy: Proxy) -> nn.Module:
    log.info("training the trunk of %s on %d public cases", name, len(proxy))
    seed = seeds.torch_seed(0, "public trunk", name)
    drawn, shape = torch.Generator().manual_seed(seed), proxy.x.shape[1:]
    cases_N = torch.from_numpy(np.array(proxy.x))
    views_V = torch.cat([cases_N, *(_view(cases_N, drawn) for _ in range(VIEWS - 1))])
    network = build(name, features.shape, len(proxy.preprocessing.classes), seed)
    trunk, head = trunk_of(network), head_of(network)
    seen_V, deep = features.transform(views_V), trunk
    raw = features.kind == "none"
    target = fit_features(_matched_kind(shape), proxy.x, MATCHED, 0) if raw else features
    matched_VT = target.transform(views_V) if raw else seen_V
    shown_NT = matched_VT[: len(cases_N)]
    matched_VT = matched_VT / (shown_NT.std(dim=0) if raw else shown_NT.var(dim=0).mean().sqrt())
    if isinstance(trunk, nn.Sequential) and isinstance(trunk[0], MeanOfPieces):
        seen_V, deep = _take_over_words(trunk[0], target, seen_V), trunk[1:]
    label_N = torch.from_numpy(np.array(proxy.y))
    labelled_L = torch.nonzero(label_N >= 0).flatten()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        regressor = nn.Linear(head.in_features, matched_VT.shape[1])

    def loss() -> Tensor:
        view_B = torch.randint(len(seen_V), (BATCH,), generator=drawn)
        value = feature_matching_loss(regressor(deep(seen_V[view_B])), matched_VT[view_B])
        value = value / regressor.out_features
        if len(labelled_L):
            case_B = labelled_L[torch.randint(len(labelled_L), (BATCH,), generator=drawn)]
            value = value + SHARE_OF_LABELS * cross_entropy(head(deep(seen_V[case_B])), label_N[case_B])
        return value

    parameters = [*deep.parameters(), *head.parameters(), *regressor.parameters()]
    _minimise(loss, parameters, STEPS if raw else STEPS_BEHIND_FEATURES)
    return trunk.requires_grad_(False).eval()


def _take_over_words(pieces: MeanOfPieces, words: Features, ids_N1L: Tensor) -> Tensor:
    """Give each piece of a text its vector in closed form: so many would learn little in few steps.

    A piece's vector is its share in the leading components of public texts, so that the mean over a text is
    its latent semantic analysis. Shifted and scaled, these means have mean 0 and variance 1.

    Returns:
        What the layers above see of the texts, (N, D).
    """
    with torch.no_grad():
        weight_VD = pieces.embedding.weight
        vectors_VK = piece_vectors(words, at_most=weight_VD.shape[1])
        weight_VD[:, : vectors_VK.shape[1]] = vectors_VK
        mean_ND = torch.cat([pieces(some) for some in ids_N1L.split(BATCH)])
        deviation_D = mean_ND.std(dim=0).clamp(min=1e-6)
        weight_VD.sub_(mean_ND.mean(dim=0)).div_(deviation_D)
        return (mean_ND - mean_ND.mean(dim=0)) / deviation_D


def _matched_kind(case_shape: CaseShape) -> str:
    """Name the features whose components a trunk must give."""
    if is_text(case_shape):
        return "words"
    return "scattering" if len(case_shape) == 3 and min(case_shape[1:]) >= SMALLEST_SIDE else "pca"


def _view(x_N: Tensor, drawn: torch.Generator) -> Tensor:
    """Look at public cases another way: images shifted and mirrored, texts less a few words, rows mixed."""
    if is_text(x_N.shape[1:]):
        return x_N * (torch.rand(x_N.shape, generator=drawn) >= LOSS)
    if x_N.dim() != 4:
        share_N1 = torch.rand((len(x_N), 1), generator=drawn)
        return share_N1 * x_N + (1 - share_N1) * x_N[torch.randperm(len(x_N), generator=drawn)]
    height, width = x_N.shape[2:]
    down, across = round(SHIFT * height), round(SHIFT * width)
    mirrored = torch.rand((len(x_N), 1, 1, 1), generator=drawn) < 0.5
    framed_N = pad(torch.where(mirrored, x_N.flip(-1), x_N), (across, across, down, down), mode="replicate")
    top_N = torch.randint(2 * down + 1, (len(x_N),), generator=drawn).tolist()
    left_N = torch.randint(2 * across + 1, (len(x_N),), generator=drawn).tolist()
    corners = zip(framed_N, top_N, left_N, strict=True)
    return torch.stack([case[:, top : top + height, left : left + width] for case, top, left in corners])


def _minimise(loss: Callable[[], Tensor], parameters: list[nn.Parameter], most_steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        loss().backward()
    steps = min(most_steps, max(1, int(MOST_WORK / max(counter.get_total_flops(), 1))))
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY, fused=True)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, STEP_SIZE, total_steps=steps, pct_start=WARM_UP)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()
        pace.step()
