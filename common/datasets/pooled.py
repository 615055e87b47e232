"""One pooled table as a scenario: drawn apart into public parts and sites by the run's seed.

The sites are those that the table names (`data.partition = "natural"`), or the private rows are dealt anew
(`iid`, `dirichlet`, with `data.num-sites` and `data.alpha`), in which case the sites are called site-1,
site-2, ….
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from common.config import RunConfig
from common.datasets.scenario import PublicData, Scenario, SiteInfo, Sizes, chosen_sizes, public_data
from common.errors import ConfigError, UserError
from common.partition import Deal, by_column, dirichlet, iid, num_units, random_parts, whole_patients
from common.preprocessing import FeatureSpec
from common.records import AnyArray, Index, Records
from common.seeds import generator

SMALLEST_SITE = 1 / 3
"""A Dirichlet deal leaves each site at least this share of what an even deal would."""


@dataclass(frozen=True)
class Pool:
    """A pooled table and what is declared about it.

    Attributes:
        records: All labelled records.
        site_names: (N,) the site of each record, or None where the table doesn't say.
        declared: Site → declared size when the run draws the default sizes; in the order of the sites.
        features: The features, in order.
        classes: The labels, in the order of the logits.
        sizes: Default sizes of the public parts.
    """

    records: Records
    site_names: AnyArray | None
    declared: Mapping[str, int]
    features: Sequence[FeatureSpec]
    classes: Sequence[str]
    sizes: Sizes


def scenario(pool: Callable[[], Pool]) -> Scenario:
    """Make a scenario of a pooled table, which is read with the first question."""
    return Scenario(
        sites=lambda config: sites(pool(), config),
        load_public=lambda config: load_public(pool(), config),
        load_private=lambda config, site: load_private(pool(), config, site),
    )


def sites(pool: Pool, config: RunConfig) -> tuple[SiteInfo, ...]:
    """Return the sites and their declared sizes.

    A run that draws other sizes than the default ones scales the declared sizes in proportion.
    """
    sizes, units = _sizes(pool, config), num_units(pool.records.target, pool.records.patients)
    private = sizes.private or 0
    if config.data.partition != "natural":
        names = dealt_names(config)
        if len(names) > private:
            raise ConfigError(
                "run config", "data.num-sites", len(names), f"at most {private}, the private cases"
            )
        return tuple(SiteInfo(name, round(private / len(names))) for name in names)
    if pool.site_names is None:
        raise ConfigError(
            "run config", "data.partition", "natural", "iid or dirichlet: the data name no sites"
        )
    if config.data.num_sites not in (0, len(pool.declared)):
        expected = f"{len(pool.declared)} (or 0), or data.partition = iid or dirichlet"
        raise ConfigError("run config", "data.num-sites", config.data.num_sites, expected)
    usual = units - pool.sizes.test - pool.sizes.validation - pool.sizes.proxy
    share = private / max(usual, 1)
    return tuple(SiteInfo(name, max(1, round(size * share))) for name, size in pool.declared.items())


def load_public(pool: Pool, config: RunConfig) -> PublicData:
    """Return the public parts."""
    test, validation, proxy, _, _ = _cut(pool, config)
    return public_data(
        proxy=pool.records.take(proxy),
        validation=pool.records.take(validation),
        test=pool.records.take(test),
        specs=pool.features,
        classes=pool.classes,
        num_labels=_sizes(pool, config).proxy_labels,
        seed=config.seed,
    )


def load_private(pool: Pool, config: RunConfig, site: str) -> Records:
    """Return one site's private records: never one that is public."""
    names = [info.name for info in sites(pool, config)]
    private = _cut(pool, config)[3]
    site_names = None if pool.site_names is None else pool.site_names[private]
    return site_records(pool.records.take(private), site_names, names, config, site)


def site_records(
    records: Records, site_names: AnyArray | None, names: Sequence[str], config: RunConfig, site: str
) -> Records:
    """Return one site's share of pooled private records.

    Args:
        records: The private records of all sites.
        site_names: (N,) the site of each, for `data.partition = "natural"`.
        names: All sites.
        config: Says how records are dealt.
        site: One of the names.

    Raises:
        UserError: if it isn't one.
    """
    if site not in names:
        raise UserError(f"there is no site {site!r}; the sites are {', '.join(names)}")
    if config.data.partition == "natural" and site_names is not None:
        parts = by_column(site_names, names)
    else:
        parts = whole_patients(deal_of(config, len(names)), records.target, records.patients)
    return records.take(parts[list(names).index(site)])


def deal_of(config: RunConfig, num_sites: int) -> Deal:
    """Return what deals private units to numbered sites."""
    stream = generator(config.seed, "partition")
    if config.data.partition == "iid":
        return iid(num_sites, stream)
    return dirichlet(num_sites, config.data.alpha, SMALLEST_SITE, stream)


def dealt_names(config: RunConfig) -> list[str]:
    """Name the sites that pooled rows are dealt to.

    Raises:
        ConfigError: if the run config doesn't say how many.
    """
    if config.data.num_sites == 0:
        raise ConfigError("run config", "data.num-sites", 0, "the number of sites to deal to, at least 1")
    return numbered(config.data.num_sites)


def numbered(num_sites: int) -> list[str]:
    """Name sites that have no names of their own."""
    return [f"site-{number}" for number in range(1, num_sites + 1)]


def _sizes(pool: Pool, config: RunConfig) -> Sizes:
    units = num_units(pool.records.target, pool.records.patients)
    return chosen_sizes(config.data, pool.sizes, units)


def _cut(pool: Pool, config: RunConfig) -> list[Index]:
    """Return test, validation, proxy, private, and what is left over."""
    sizes = _sizes(pool, config)
    parts = [sizes.test, sizes.validation, sizes.proxy, sizes.private or 0]
    deal = random_parts(parts, generator(config.seed, "split"))
    return whole_patients(deal, pool.records.target, pool.records.patients)
