"""Opinions in one sentence: does the writer of a review like what it is about?

14,166 sentences from film reviews (Pang, Lee 2004) and customers' reviews of products (Hu, Liu 2004), each
rated by some twenty readers (Hutto, Gilbert 2014, *VADER*, ICWSM; MIT). The target is whether their mean
rating is above or below zero. The README beside this file says more. It stands in for notes that hospitals
can't publish.

The sentences of the test are the same in every run, drawn once, so that none of them is ever trained on or
chosen by. Proxy, validation and sites are drawn from the others by the run's seed; sites are dealt by
`data.partition`.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.config import RunConfig
from common.datasets import pooled
from common.datasets.scenario import PublicData, Scenario, SiteInfo, Sizes
from common.datasets.table import read_table
from common.errors import ConfigError
from common.preprocessing import Text
from common.records import Records
from common.seeds import generator

CLASSES = ("unfavourable", "favourable")

FEATURES = (Text(name="text", length=384),)

NUM_TEST = 2_500

SIZES = Sizes(test=0, validation=300, proxy=3_000, proxy_labels=300)
"""What is drawn from the sentences that aren't tested on."""


def sites(config: RunConfig) -> tuple[SiteInfo, ...]:
    """Return site-1, site-2, …, each of which declares an even share."""
    return pooled.sites(_rest(), _untested(config))


def load_public(config: RunConfig) -> PublicData:
    """Return proxy and validation from the sentences that aren't tested on, and the test."""
    public, tested = pooled.load_public(_rest(), _untested(config)), _read()[1]
    size = config.data.test_size or NUM_TEST
    if size < NUM_TEST:
        tested = tested.take(np.sort(generator(config.seed, "split", "test").permutation(NUM_TEST)[:size]))
    return replace(public, test=public.proxy.preprocessing.encode(tested))


def load_private(config: RunConfig, site: str) -> Records:
    """Return one site's sentences."""
    return pooled.load_private(_rest(), _untested(config), site)


SCENARIO = Scenario(sites, load_public, load_private)


def _untested(config: RunConfig) -> RunConfig:
    """Have the pool draw no test, since that is set apart already."""
    if config.data.test_size > NUM_TEST:
        raise ConfigError("run config", "data.test-size", config.data.test_size, f"at most {NUM_TEST}")
    return config.model_copy(update={"data": config.data.model_copy(update={"test_size": 0})})


@lru_cache(maxsize=1)
def _rest() -> pooled.Pool:
    return pooled.Pool(
        records=_read()[0], site_names=None, declared={}, features=FEATURES, classes=CLASSES, sizes=SIZES
    )


@lru_cache(maxsize=1)
def _read() -> tuple[Records, Records]:
    """Return the sentences that are drawn from, and those of the test."""
    columns = read_table(Path(__file__).with_name("reviews.json"))
    records = Records(
        columns={"text": columns["text"]},
        target=columns["opinion"],
        patients=None,
        groups={"source": columns["source"]},
    )
    order = generator(0, "reviews", "test").permutation(len(records))
    return records.take(np.sort(order[NUM_TEST:])), records.take(np.sort(order[:NUM_TEST]))
