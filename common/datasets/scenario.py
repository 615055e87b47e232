"""What every scenario provides, and how its public part is cut.

A scenario answers three questions for a run config: which sites there are (public facts only), what is public
(proxy, validation, test), and what one site holds in private. The third answer is for the custodian's
`client.private_data` and for nobody else.

In a simulation the public part is drawn from the same patients as the private one: "public by assumption".
How many cases that is stands in the run config (`data.*-size`; 0 means the scenario's own number) and in
every report.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common.config import Data, RunConfig
from common.errors import ConfigError
from common.preprocessing import FeatureSpec, Preprocessing
from common.proxy import Proxy
from common.records import Cases, Ints, Records
from common.seeds import generator


@dataclass(frozen=True)
class SiteInfo:
    """What is public about a site.

    Attributes:
        name: Kebab-case name.
        declared_size: The number that the site declares as its size: its denominator and its weight. It isn't
            its record count, which is nobody's business.
    """

    name: str
    declared_size: int


@dataclass(frozen=True)
class PublicData:
    """Everything that is public in a run.

    Attributes:
        proxy: The cases that sites are asked about, with the labels that count as public.
        proxy_labels: (N,) int64 labels of *all* proxy cases, for the comparison "had every proxy case been
            labelled"; None where they aren't known.
        validation: Labelled cases for choices.
        test: Labelled cases for the report.
        by_assumption: Whether these cases are part of the same patients that the scenario takes to be public,
            rather than public in fact.
    """

    proxy: Proxy
    proxy_labels: Ints | None
    validation: Cases
    test: Cases
    by_assumption: bool = True


@dataclass(frozen=True)
class Scenario:
    """One entry of the table of scenarios."""

    sites: Callable[[RunConfig], tuple[SiteInfo, ...]]
    load_public: Callable[[RunConfig], PublicData]
    load_private: Callable[[RunConfig, str], Records]


@dataclass(frozen=True)
class Sizes:
    """How many units (patients where records name theirs) go where; `private` None takes the rest."""

    test: int
    validation: int
    proxy: int
    proxy_labels: int
    private: int | None = None


def chosen_sizes(data: Data, defaults: Sizes, available: int) -> Sizes:
    """Fill the run config's zeros with the scenario's defaults; refuse what there aren't enough cases for.

    Args:
        data: The run config's section.
        defaults: The scenario's numbers.
        available: Units to be dealt to proxy, validation, test and sites together.

    Returns:
        Sizes whose `private` is a number.

    Raises:
        ConfigError: naming the first key that asks for too much.
    """
    asked = {
        "data.proxy-size": data.proxy_size,
        "data.private-size": data.private_size,
        "data.test-size": data.test_size,
        "data.validation-size": data.validation_size,
    }
    usual = (defaults.proxy, defaults.private or 1, defaults.test, defaults.validation)
    wanted = {key: size or default for (key, size), default in zip(asked.items(), usual, strict=True)}
    excess = sum(wanted.values()) - available
    if excess > 0:
        key = max(asked, key=lambda name: asked[name])  # the first, if the user has set none
        others = ", ".join(f"{size} for {other}" for other, size in wanted.items() if other != key)
        most = max(wanted[key] - excess, 0)
        expected = f"at most {most}: of {available} cases in all, {others} go elsewhere"
        raise ConfigError("run config", key, wanted[key], expected)
    proxy = wanted["data.proxy-size"]
    if data.proxy_labels > proxy:
        raise ConfigError(
            "run config", "data.proxy-labels", data.proxy_labels, f"at most data.proxy-size, {proxy}"
        )
    rest = available - sum(wanted.values()) + wanted["data.private-size"]
    return Sizes(
        test=wanted["data.test-size"],
        validation=wanted["data.validation-size"],
        proxy=proxy,
        proxy_labels=min(defaults.proxy_labels, proxy) if data.proxy_labels < 0 else data.proxy_labels,
        private=data.private_size or defaults.private or rest,
    )


def public_data(
    proxy: Records,
    validation: Records,
    test: Records,
    specs: Sequence[FeatureSpec],
    classes: Sequence[str],
    num_labels: int | None,
    seed: int,
) -> PublicData:
    """Fit the preprocessing on the proxy's records, encode all public parts, hide what isn't a public label.

    Args:
        proxy: Records of the proxy; unlabelled ones have the label "".
        validation: For choices.
        test: For the report.
        specs: The features.
        classes: The labels, in the order of the logits.
        num_labels: How many proxy cases keep their label, drawn by the seed; None keeps all.
        seed: The run's seed.
    """
    preprocessing = Preprocessing.fit(proxy, specs, classes)
    cases = preprocessing.encode(proxy)
    labelled = np.flatnonzero(cases.y >= 0)
    keep = len(labelled) if num_labels is None else min(num_labels, len(labelled))
    kept = generator(seed, "proxy-labels").choice(labelled, size=keep, replace=False)
    y = np.full(len(cases), -1, dtype=np.int64)
    y[kept] = cases.y[kept]
    return PublicData(
        proxy=Proxy(preprocessing, x=cases.x, y=y),
        proxy_labels=cases.y if len(labelled) == len(cases) else None,
        validation=preprocessing.encode(validation),
        test=preprocessing.encode(test),
    )
