"""Rules that a minority of hostile sites can't carry away, whatever values it sends.

All go by the sites' weights (`server.weights`): "half" means half of all weight. They hold every release of
the round at 4 bytes a value, and work through its cases in pieces.

| rule | result | hostile sites hold at most |
|---|---|---|
| `median` | of each value, then centred again | less than half of all weight |
| `trimmed-mean` | mean of each value without the share `trim` at either end | `aggregation.trim` |
| `geometric-median` | the point with the least sum of distances to the sites' | less than half |
| `outlier-weights` | mean, by weights that `outlier_scores` take away from round to round | less than half |

What they withstand is *loud* sites. Under differential privacy honest movements are mostly noise, and a site
that pushes quietly within that noise stands out in no value; labels can show it (`server.stacking`).
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PIECE_BYTES = 16 << 20
"""Memory that the values of a piece of the cases take, over all sites."""
WEISZFELD_STEPS = 2000
CLOSE = 1e-9
"""Weiszfeld's steps end where no weight changes by more."""
USUAL = 2.0
"""Distances, in those of the middle site, that make nobody an outlier: uneven labels alone make 1.8."""
MOST_OUTLYING = 50.0
"""Score of one round, at most; a weight is gone long before."""


def median(logits_KPC: Sequence[NDArray[np.float32]], weight_K: Floats) -> Floats:
    """Weighted median of each value, rows centred again (Yin et al. 2018, arXiv:1803.01498, def. 1)."""
    middle_PC = _by_value(logits_KPC, weight_K, _median)
    centred_PC: Floats = middle_PC - middle_PC.mean(axis=1, keepdims=True)
    return centred_PC


def trimmed_mean(logits_KPC: Sequence[NDArray[np.float32]], weight_K: Floats, trim: float) -> Floats:
    """Weighted mean of each value over sites that lie wholly between the trimmed shares, else the median.

    Yin et al. 2018, arXiv:1803.01498, definition 2. A site is cut whole: part of a hostile value would carry
    the mean as far as it likes.
    """

    def trimmed(values_KN: Floats, weight_KN: Floats) -> Floats:
        above_KN = np.cumsum(weight_KN, axis=0)
        total = weight_K.sum()
        slack = 1e-9 * total
        starts_late_KN = above_KN - weight_KN >= trim * total - slack
        kept_KN = weight_KN * (starts_late_KN & (above_KN <= (1 - trim) * total + slack))
        kept_N = kept_KN.sum(axis=0)
        mean_N = (kept_KN * values_KN).sum(axis=0) / np.maximum(kept_N, np.finfo(float).tiny)
        return np.where(kept_N > 0, mean_N, _median(values_KN, weight_KN))

    return _by_value(logits_KPC, weight_K, trimmed)


def geometric_median(logits_KPC: Sequence[NDArray[np.float32]], weight_K: Floats) -> Floats:
    """Weiszfeld's algorithm, smoothed (Pillutla, Kakade, Harchaoui 2022, arXiv:1912.13445, algorithm 2).

    The point is Σ v_k·x_k with weights v_k ∝ w_k / ‖x_k − point‖, and distances between such points and the
    x_k follow from the inner products of the x_k alone. So the values are read twice, not once a step.
    """
    gram_KK = _inner_products(logits_KPC)
    share_K = _nearest_site(gram_KK, weight_K)
    if share_K is None:
        share_K = _weiszfeld(gram_KK, weight_K)
    total_PC = np.zeros(logits_KPC[0].shape)
    for share, logits_PC in zip(share_K, logits_KPC, strict=True):
        total_PC += share * logits_PC.astype(np.float64)
    return total_PC


def outlier_scores(logits_KPC: Sequence[NDArray[np.float32]], weight_K: Floats) -> Floats:
    """How far out each site is in one round, for weights that fall by exp(−score).

    Such weights over rounds are from Roux, Zimmer, Pokutta 2024, arXiv:2402.12265 (ExpGuard). What is added:
    a distance is the mean over cases to the geometric median, relative to the middle site's, so that no
    scale matters; a site whose weight says that it is noisier than the middle one may be as much farther
    out; and who is within `USUAL` distances loses nothing, since honest sites differ, too.

    Returns:
        Scores (K,) from 0 to `MOST_OUTLYING`.
    """
    centre_PC = geometric_median(logits_KPC, weight_K)
    distance_K = np.array([np.linalg.norm(one - centre_PC, axis=1).mean() for one in logits_KPC])
    apart_K = (
        distance_K > 0
    )  # a site that outweighs the others is the centre, and tells nothing of what is far
    if not apart_K.any():
        return np.zeros(len(distance_K))
    middle = weighted_median(distance_K[apart_K], weight_K[apart_K])
    noisier_K = np.maximum(weighted_median(weight_K, weight_K) / weight_K, 1.0)
    scores_K: Floats = np.clip(distance_K / (middle * noisier_K) - USUAL, 0.0, MOST_OUTLYING)
    return scores_K


def weighted_median(value_K: Floats, weight_K: Floats) -> float:
    """The least value that sites with half of all weight don't exceed."""
    order_K = np.argsort(value_K, kind="stable")
    reached_K = np.cumsum(weight_K[order_K])
    return float(value_K[order_K][np.argmax(reached_K >= reached_K[-1] / 2)])


def _nearest_site(gram_KK: Floats, weight_K: Floats) -> Floats | None:
    """All weight for the site that is the geometric median itself, where one is: Weiszfeld would creep to it.

    It is one if the others pull less than it weighs (Vardi and Zhang 2000, doi:10.1073/pnas.97.4.1423).
    """
    square_K = gram_KK.diagonal()
    least = _least_distance(gram_KK)
    distance_KK = np.sqrt(np.maximum(square_K[:, None] + square_K - 2 * gram_KK, 0.0))
    k = int(np.argmin(distance_KK @ weight_K))
    apart_K = distance_KK[k] > least
    pull_K = np.where(apart_K, weight_K / np.maximum(distance_KK[k], least), 0.0)
    from_k_KK = gram_KK - gram_KK[k] - gram_KK[:, k, None] + gram_KK[k, k]
    if np.sqrt(max(pull_K @ from_k_KK @ pull_K, 0.0)) > weight_K[~apart_K].sum():
        return None
    share_K = np.zeros(len(weight_K))
    share_K[k] = 1.0
    return share_K


def _weiszfeld(gram_KK: Floats, weight_K: Floats) -> Floats:
    square_K, least = gram_KK.diagonal(), _least_distance(gram_KK)
    share_K: Floats = weight_K / weight_K.sum()
    for _ in range(WEISZFELD_STEPS):
        point_square = share_K @ gram_KK @ share_K
        distance_K = np.sqrt(np.maximum(square_K - 2 * gram_KK @ share_K + point_square, 0.0))
        drawn_K = weight_K / np.maximum(distance_K, least)
        drawn_K /= drawn_K.sum()
        moved, share_K = np.abs(drawn_K - share_K).max(), drawn_K
        if moved < CLOSE:
            break
    return share_K


def _least_distance(gram_KK: Floats) -> float:
    """Distances below this count as none. The median, since a hostile norm must not blur the honest ones."""
    return float(1e-6 * np.sqrt(np.median(gram_KK.diagonal()))) or 1.0


def _median(values_KN: Floats, weight_KN: Floats) -> Floats:
    """Midway between the lower and the upper weighted median of each column of sorted values."""
    reached_KN = np.cumsum(weight_KN, axis=0)
    half_N = reached_KN[-1] / 2
    lower_N = np.take_along_axis(values_KN, np.argmax(reached_KN >= half_N, axis=0)[None], axis=0)[0]
    upper_N = np.take_along_axis(values_KN, np.argmax(reached_KN > half_N, axis=0)[None], axis=0)[0]
    middle_N: Floats = (lower_N + upper_N) / 2
    return middle_N


def _by_value(
    logits_KPC: Sequence[NDArray[np.float32]], weight_K: Floats, rule: Callable[[Floats, Floats], Floats]
) -> Floats:
    """Apply a rule to each value's column over the sites, sorted with its weights."""
    combined_PC = np.empty(logits_KPC[0].shape)
    for piece in _pieces(logits_KPC):
        values_KN = np.stack([one[piece].reshape(-1) for one in logits_KPC]).astype(np.float64)
        order_KN = np.argsort(values_KN, axis=0, kind="stable")
        sorted_KN = np.take_along_axis(values_KN, order_KN, axis=0)
        combined_PC[piece] = rule(sorted_KN, weight_K[order_KN]).reshape(combined_PC[piece].shape)
    return combined_PC


def _inner_products(logits_KPC: Sequence[NDArray[np.float32]]) -> Floats:
    gram_KK = np.zeros((len(logits_KPC), len(logits_KPC)))
    for piece in _pieces(logits_KPC):
        values_KN = np.stack([one[piece].reshape(-1) for one in logits_KPC]).astype(np.float64)
        gram_KK += values_KN @ values_KN.T
    return gram_KK


def _pieces(logits_KPC: Sequence[NDArray[np.float32]]) -> Iterator[slice]:
    cases, classes = logits_KPC[0].shape
    rows = max(PIECE_BYTES // (8 * classes * len(logits_KPC)), 1)
    for start in range(0, cases, rows):
        yield slice(start, start + rows)
