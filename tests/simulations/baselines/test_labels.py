"""Opinions that travel: FedMD is the product's own of that name, DS-FL sharpens what averaging blurs."""

import pytest

from common.codec import CODECS
from simulations.baselines.labels import ds_fl, fedmd
from simulations.baselines.product import federation
from simulations.settings import run_settings

QUIET = "privacy.epsilon=1000.0 num-rounds=4"


def configured(pairs: str = ""):
    return run_settings("heart", [pairs])


def test_fedmd_is_the_products_own_where_there_is_no_noise(bench):
    config = configured(f'{QUIET} method="fedmd" codec="fp32"')
    ours, products = fedmd(config, bench), federation(config, bench)
    assert ours.scores["accuracy"] == pytest.approx(products.scores["accuracy"], abs=0.02)
    # The product's teacher is another model than the student; both have learned the same consensus.
    assert ours.scores["auroc"] == pytest.approx(products.scores["auroc"], abs=0.02)
    assert ours.rounds == products.rounds and ours.guarantee.epsilon == products.guarantee.epsilon


def test_opinions_travel_in_the_runs_codec(bench):
    cases = len(bench.public.proxy)
    exact = fedmd(configured(f'{QUIET} codec="fp32"'), bench)
    assert exact.bytes_up == exact.bytes_down == 8 * cases
    for method, asked in ((fedmd, cases), (ds_fl, 50)):
        found = method(configured(f"{QUIET} proxy-cases={asked % cases}"), bench)
        for sent in (found.bytes_up, found.bytes_down):
            assert 0.5 * asked < sent <= CODECS["int8"].longest(asked, 2)


def test_a_lower_temperature_makes_a_surer_model(bench):
    """Entropy reduction: where the model is surer, its mistakes cost more log-loss."""
    blurred = ds_fl(configured(f"{QUIET} aggregation.temperature=1.0"), bench).scores
    sharp = ds_fl(configured(f"{QUIET} aggregation.temperature=0.02"), bench).scores
    assert sharp["log_loss"] > 2 * blurred["log_loss"]
    assert sharp["accuracy"] > 0.7


def test_the_same_seed_gives_the_same(bench):
    config = configured("num-rounds=2")
    assert ds_fl(config, bench) == ds_fl(config, bench)
    assert fedmd(config, bench) == fedmd(config, bench)
