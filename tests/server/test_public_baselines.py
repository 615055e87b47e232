"""The rows that keep a result honest: what public data alone gives."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import RunConfig
from common.datasets import load_public
from server.public_baselines import best_public, public_baselines
from server.teacher import Teacher, choose_cases

CONFIG = RunConfig()


@pytest.fixture(scope="module")
def public():
    return load_public(CONFIG)


def test_all_labels_tell_more_than_some(public):
    some, every = public_baselines(CONFIG, public)
    assert some["auroc"].mean > 0.8
    assert every["auroc"].mean > some["auroc"].mean - 0.02
    assert some != every


def test_choices_are_made_on_validation_and_never_on_test(public):
    """With its labels turned round, the test part changes what is reported, not which model reports it."""
    turned = replace(public, test=replace(public.test, y=1 - public.test.y))
    straight, reverse = (best_public(CONFIG, part, public.proxy.y) for part in (public, turned))
    assert straight["auroc"].mean == pytest.approx(1 - reverse["auroc"].mean)


def test_without_a_label_there_is_no_such_row(public):
    unlabelled = np.full(len(public.proxy), -1)
    assert best_public(CONFIG, public, unlabelled) is None


def test_the_teacher_is_among_the_candidates(public):
    """So no teacher is ahead of the row by more than the choice on validation costs."""
    teacher = Teacher.start(CONFIG, public, choose_cases(CONFIG, len(public.proxy)))
    assert best_public(CONFIG, public, public.proxy.y)["auroc"].mean > teacher.test_scores()["auroc"] - 0.02


def test_a_teacher_that_is_none_is_no_candidate(public):
    config = RunConfig.from_run_config({"teacher.model": "none"})
    assert best_public(config, public, public.proxy.y)["auroc"].mean > 0.8
