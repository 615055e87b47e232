"""How much say a site has: its declared size, less where its budget makes it noisy.

Site k declares m_k records and trains under its own σ_k. Its movement is g_k + n_k: g_k points down its mean
loss, and n_k is noise of standard deviation s_k ∝ σ_k·C/m_k in every weight. The ensemble Σ w_k·(g_k + n_k),
with weights that add up to 1, has noise of the variance Σ w_k²·s_k². Against w_k ∝ m_k, which one party with
all records would take, other weights pull towards the sites that count more:

| w_k ∝ | noise of site k in the ensemble | pulls towards rich sites |
|---|---|---|
| m_k | ∝ σ_k: the poorest site drowns the others | not at all |
| **m_k / σ_k** | the same from every site | by the ratio of σ |
| m_k / σ_k² | ∝ 1 / σ_k: the least in all, where sites are alike | by its square |

The middle row is in force. It is what one party with all records would do that clips a record of site k to
C/σ_k and adds one noise to the sum (Boenisch et al. 2023, arXiv:2303.17046, "scale"). Equal budgets make all
three rows the same.

Every number here is declared or in the plan; no record count and no noise that was drawn enters.
"""

from collections.abc import Mapping

from server.admission import Member


def weights_of(members: Mapping[str, Member]) -> dict[str, float]:
    """Weigh each site: its declared size times the least σ of all over its own."""
    sigma = {site: member.plan.noise_multiplier() for site, member in members.items()}
    least = min(sigma.values(), default=1.0)
    return {site: member.declared_size * (least / sigma[site]) for site, member in members.items()}
