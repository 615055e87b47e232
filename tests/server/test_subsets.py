"""Subsets of the proxy: every case gets its turn, and what is said of some carries over to the rest."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig
from common.datasets import load_public
from server.subsets import rows_of_round, spread
from server.teacher import Teacher, choose_cases


def configured(**flat) -> RunConfig:
    return RunConfig.from_run_config({k.replace("__", ".").replace("_", "-"): v for k, v in flat.items()})


@given(kept=st.integers(1, 60), share=st.floats(0.05, 1.0), seed=st.integers(0, 5))
def test_all_cases_are_asked_about_before_one_is_again(kept, share, seed):
    count = max(1, int(share * kept))
    config = configured(proxy_subsets="per-round", proxy_cases=count, seed=seed)
    turns = -(-kept // count)
    asked = [rows_of_round(config, kept, number) for number in range(1, turns + 1)]
    assert all(len(rows) == count and (np.diff(rows) > 0).all() for rows in asked)
    whole = np.concatenate(asked[: kept // count])
    assert len(set(whole)) == len(whole)
    assert set(np.concatenate(asked)) == set(range(kept))


def test_a_fixed_subset_is_the_same_in_every_round():
    config = configured(proxy_cases=4)
    for number in (1, 2, 9):
        assert (rows_of_round(config, 4, number) == np.arange(4)).all()


@pytest.fixture(scope="module")
def twin() -> Teacher:
    config = configured(proxy_subsets="per-round", proxy_cases=60)
    public = load_public(config)
    return Teacher.open(config, public, choose_cases(config, len(public.proxy)), config.student)


def linear_logits(twin: Teacher, seed: int) -> np.ndarray:
    phi_PD = twin.phi_P.flatten(1).double().numpy()
    logits_PC = phi_PD @ np.random.default_rng(seed).normal(size=(phi_PD.shape[1], 2))
    return logits_PC - logits_PC.mean(axis=1, keepdims=True)


def test_a_linear_movement_is_carried_over_exactly_whatever_z_is(twin, monkeypatch):
    monkeypatch.setattr("common.distillation.RIDGE", 1e-9)
    z_PC, movement_PC = np.random.default_rng(0).normal(size=(184, 2)) * 3, linear_logits(twin, 1)
    rows_R = np.arange(0, 184, 3)
    found_PC = spread(twin, z_PC, rows_R, movement_PC[rows_R], movement=True)
    np.testing.assert_allclose(found_PC, movement_PC, atol=1e-3)
    # z isn't linear here: what the twin can't fit of it is not taken for movement.
    assert (found_PC[rows_R] == movement_PC[rows_R]).all()


def test_logits_are_carried_over_without_regard_to_z(twin, monkeypatch):
    monkeypatch.setattr("common.distillation.RIDGE", 1e-9)
    logits_PC, rows_R = linear_logits(twin, 2), np.arange(90)
    before = twin.learner.state()
    found = [
        spread(twin, z * np.ones((184, 2)), rows_R, logits_PC[rows_R], movement=False) for z in (0.0, 7.0)
    ]
    np.testing.assert_allclose(found[0], logits_PC, atol=1e-3)
    assert (found[0] == found[1]).all()
    assert twin.learner.state() == before


def test_what_was_said_of_all_cases_needs_no_twin(twin):
    ensemble_PC = np.random.default_rng(3).normal(size=(184, 2))
    assert spread(twin, np.zeros((184, 2)), np.arange(184), ensemble_PC, movement=True) is ensemble_PC
