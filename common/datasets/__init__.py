"""Scenarios: where the cases come from, what of them is public, and which sites there are.

Three questions to one table. `sites` and `load_public` are for everybody. `load_private` opens a site's
records and is for `client.private_data` alone.
"""

from collections.abc import Mapping

from common.config import RunConfig
from common.datasets import fashion, heart, own, reviews, thyroid
from common.datasets.scenario import PublicData, Scenario, SiteInfo
from common.records import Records

__all__ = ["SCENARIOS", "PublicData", "Scenario", "SiteInfo", "load_private", "load_public", "sites"]

SCENARIOS: Mapping[str, Scenario] = {
    "heart": heart.SCENARIO,
    "thyroid": thyroid.SCENARIO,
    "fashion": fashion.SCENARIO,
    "reviews": reviews.SCENARIO,
    "own": own.SCENARIO,
}


def sites(config: RunConfig) -> tuple[SiteInfo, ...]:
    """Return the sites in their order, with the size that each declares: public facts only.

    Raises:
        UserError: if the run config asks for more cases or other sites than the scenario has.
    """
    return SCENARIOS[config.scenario].sites(config)


def load_public(config: RunConfig) -> PublicData:
    """Return proxy, validation and test, which the run's seed draws.

    Raises:
        UserError: if files are missing or unreadable, or hold fewer cases than the run config asks for.
    """
    return SCENARIOS[config.scenario].load_public(config)


def load_private(config: RunConfig, site: str) -> Records:
    """Return what one site of a simulation holds in private, none of which is public.

    Only `client.private_data` may call this.

    Raises:
        UserError: if there is no such site, or as for `load_public`.
    """
    return SCENARIOS[config.scenario].load_private(config, site)
