"""Which proxy cases a round speaks about, and what its answers mean for the others.

With `proxy-subsets = "per-round"` z is kept on every proxy case, but a round asks about `proxy-cases` of
them: the next ones in an order drawn by the seed, so that all have been asked about before one is again. A
message is as short as with a fixed subset, while the models learn from the whole proxy.

The ensemble of a round then knows the movement of z on that round's cases only. On the others the server
imputes it with a student of its own, the *twin*, as a site would: fitted to z on the round's cases, the twin
has the logits b on all cases; fitted to z plus the ensemble, a. The movement elsewhere is a − b, and the
twin's error of fit cancels. With a linear student this is exact. A method whose sites return logits gets the
twin's logits themselves.
"""

import numpy as np
from numpy.typing import NDArray

from common import seeds
from common.config import RunConfig
from server.teacher import Teacher

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


def rows_of_round(config: RunConfig, kept: int, round_number: int) -> Rows:
    """Rows of z, ascending, that a round asks about.

    Args:
        config: The run.
        kept: Number of cases that z is kept on (`server.teacher.choose_cases`).
        round_number: From 1.
    """
    if config.proxy_subsets == "fixed":
        return np.arange(kept)
    order = seeds.generator(config.seed, "order of proxy cases").permutation(kept)
    count = config.proxy_cases or kept
    first = (round_number - 1) * count
    return np.sort(np.take(order, np.arange(first, first + count), mode="wrap"))


def spread(twin: Teacher, z_PC: Floats, rows_R: Rows, ensemble_RC: Floats, *, movement: bool) -> Floats:
    """Carry a round's ensemble over to all cases; on the round's own it stays as it is.

    Args:
        twin: A learner with the student's settings. It starts untaught each time, so that a run that goes on
            after a break imputes the same.
        z_PC: The state on all cases.
        rows_R: The round's rows.
        ensemble_RC: What the sites said together.
        movement: Whether that is a movement of z, or logits.
    """
    if len(rows_R) == len(z_PC):
        return ensemble_RC
    untaught = twin.learner.state()
    before_PC = np.zeros_like(z_PC)
    if movement:
        twin.learn(z_PC[rows_R], rows_R)
        before_PC = _centred(twin)
    twin.learn((z_PC[rows_R] if movement else 0.0) + ensemble_RC, rows_R)
    spread_PC = _centred(twin) - before_PC
    spread_PC[rows_R] = ensemble_RC
    twin.learner.restore(untaught)
    return spread_PC


def _centred(twin: Teacher) -> Floats:
    logits_PC = twin.learner.logits(twin.phi_P).astype(np.float64)
    centred_PC: Floats = logits_PC - logits_PC.mean(axis=1, keepdims=True)
    return centred_PC
