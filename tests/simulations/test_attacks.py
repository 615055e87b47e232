"""Hostile sites: their releases are right in every field, and what they do to each rule."""

import numpy as np
import pytest

from client.app import app as real_app
from common.envelope import LEARN, unseal
from common.messages import Release, decode_answer
from simulations.attacks import ATTACKS, InfiltratedApp

HUNGARY = 1


def said(outcome, place: int) -> list[Release]:
    """What one site sent in each round."""
    learned = [reply for reply, _ in outcome.replies if reply.metadata.message_type == LEARN]
    at_place = sorted({reply.metadata.src_node_id for reply in learned})[place]
    return [decode_answer(unseal(one.content)) for one in learned if one.metadata.src_node_id == at_place]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_release_is_admitted_and_is_another_one(run_app, attack):
    honest = run_app({"num-rounds": 1})
    attacked = run_app({"num-rounds": 1}, InfiltratedApp(real_app, ATTACKS[attack], {HUNGARY}))
    assert not attacked.left_out(1)
    for place in range(4):
        (before,), (after,) = said(honest, place), said(attacked, place)
        # Study names differ between runs, and with them the task and the noise; the sizes of values don't.
        assert (before.cases, before.classes, before.codec) == (after.cases, after.classes, after.codec)
    quiet = attack in ("flip", "collude", "late")
    honest_size, size = (np.abs(said(one, HUNGARY)[0].logits()).max() for one in (honest, attacked))
    assert (size < 20 * honest_size) == quiet


@pytest.mark.parametrize(
    "rule", ["mean", "trimmed-mean", "median", "geometric-median", "outlier-weights", "stacking"]
)
def test_a_loud_site_ruins_the_mean_and_no_robust_rule(run_app, rule):
    app = InfiltratedApp(real_app, ATTACKS["flip-loud"], {HUNGARY})
    outcome = run_app({"aggregation.rule": rule, "num-rounds": 5}, app)
    assert (outcome.auroc > 0.75) == (rule != "mean")


def test_stacking_goes_on_learning_beside_a_hostile_site(run_app):
    app = InfiltratedApp(real_app, ATTACKS["flip"], {HUNGARY})
    outcome = run_app({"aggregation.rule": "stacking", "num-rounds": 20}, app)
    assert outcome.auroc > outcome.summary.results.teacher_alone["auroc"].mean - 0.01


def test_validation_stays_where_the_teacher_was_if_all_sites_are_hostile_and_loud(run_app):
    app = InfiltratedApp(real_app, ATTACKS["flip-loud"], range(4))
    unseen = run_app({"num-rounds": 3}, app)
    validated = run_app({"num-rounds": 3, "aggregation.validated": True}, app)
    before = validated.summary.results.teacher_alone["auroc"].mean
    assert abs(validated.auroc - before) < 0.01
    assert unseen.auroc < before - 0.1
