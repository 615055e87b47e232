"""A lesson: what the student says owes to patients what its private steps gave, and nothing else."""

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import nn

from client.noise import PrivateRandomness
from client.private_data import Nobody, PrivateRecords
from client.student import Student
from common.architectures import Architecture
from common.codec import CODECS
from common.config import RunConfig
from common.errors import UserError
from common.losses import log_soft_labels
from common.messages import Task
from common.models import REGISTRY
from common.plan import HOLD_OUT_ACCURACY, LABEL_HISTOGRAM, Plan, plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records

CASES = 40


def patients(count: int, seed: int, ill: float = 0.5) -> Records:
    rng = np.random.default_rng(seed)
    target = np.where(rng.random(count) < ill, "yes", "no")
    shift = np.where(target == "yes", 1.0, -1.0)
    return Records({"a": rng.normal(size=count) + shift, "b": rng.normal(size=count)}, target, None, {})


def make_proxy() -> Proxy:
    public = patients(CASES, 0)
    preprocessing = Preprocessing.fit(public, [NumericSpec(name="a"), NumericSpec(name="b")], ("no", "yes"))
    cases = preprocessing.encode(public)
    return Proxy(preprocessing, cases.x, cases.y)


PROXY = make_proxy()
ARCHITECTURES = [
    Architecture("linear"),
    Architecture("mlp", layers="all"),
    Architecture("linear", "pca", 2),
    Architecture("mlp", "pca", 2, "head"),
    Architecture("mlp", layers="last-block"),
]


class Silent(PrivateRandomness):
    """Noise of variance zero."""

    def noised(self, sum_P, deviation):
        return sum_P

    def discrete_laplace(self, size, epsilon):
        return np.zeros(size, dtype=np.int64)


def make_plan(**flat) -> Plan:
    config = RunConfig.from_run_config({k.replace("__", ".").replace("_", "-"): v for k, v in flat.items()})
    return plan_of(config, study="s", proxy_digest=PROXY.digest, classes=2)


def task(plan: Plan, number: int = 1, seed: int = 0, scale: float = 1.0) -> Task:
    z_PC = (scale * np.random.default_rng(seed).normal(size=(CASES, 2))).astype(np.float32)
    soft_PC = log_soft_labels(z_PC, plan.student.temperature).astype(np.float16)
    return Task(plan, number, np.arange(CASES, dtype=np.int32), soft_PC)


def enrol(plan: Plan, architecture: Architecture = ARCHITECTURES[0], site: str = "north") -> Student:
    return Student.enrol(plan, PROXY, architecture, site)


def lesson(student: Student, asked: Task, records=None, declared: int = 60, randomness=None):
    records = records or PrivateRecords(lambda _: patients(60, 1))
    return student.private_lesson(asked, records, declared, randomness or Silent())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_without_patients_and_noise_no_student_moves(architecture):
    """However badly it fits the soft labels: its error of fit isn't mistaken for learning."""
    asked = task(make_plan(), scale=5.0)
    opinion = lesson(enrol(asked.plan, architecture), asked, Nobody())
    assert np.abs(opinion.logits_PC).max() < 1e-5


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_with_patients_every_student_moves_to_where_they_point(architecture):
    asked = task(make_plan(privacy__clipping_norm=1.0, privacy__steps_per_round=30), scale=0.0)
    moved_PC = lesson(enrol(asked.plan, architecture), asked).logits_PC
    assert moved_PC.shape == (CASES, 2) and np.abs(moved_PC.sum(axis=1)).max() < 1e-5
    ill = PROXY.y == 1
    assert moved_PC[ill, 1].mean() > moved_PC[~ill, 1].mean() + 0.2


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_a_public_lesson_owes_nothing_to_patients(architecture):
    for method, still in (("descent", True), ("fedmd", False)):
        asked = task(make_plan(method=method))
        student = enrol(asked.plan, architecture)
        opinion = student.public_lesson(asked)
        assert (np.abs(opinion.logits_PC).max() == 0) == still
        assert opinion.bought == {}
        again = enrol(asked.plan, architecture)
        again.study_soft_labels(asked)
        assert opinion.state == again.state()


def test_the_declared_size_is_the_denominator_whatever_the_true_one_is():
    asked = task(make_plan())
    small, large = (lesson(enrol(asked.plan), asked, declared=size).logits_PC for size in (30, 300))
    np.testing.assert_allclose(small, 10 * large, atol=1e-4)


def test_the_same_task_from_the_same_state_gives_the_same_bits():
    asked = task(make_plan(), scale=2.0)
    student = enrol(asked.plan, Architecture("mlp", layers="all"))
    said = []
    for disturbance in range(3):
        student.restart(None)
        torch.manual_seed(disturbance)
        opinion = lesson(student, asked, randomness=PrivateRandomness.seeded("a task"))
        said.append((opinion.logits_PC.tobytes(), opinion.state))
    assert said[0] == said[1] == said[2]


def test_a_student_goes_on_from_its_last_committed_state():
    plan = make_plan(student__epochs=2)
    student = enrol(plan, Architecture("mlp", layers="all"))
    first = lesson(student, task(plan, 1))
    straight = lesson(student, task(plan, 2))
    lesson(student, task(plan, 3))  # never committed
    student.restart(first.state)
    assert lesson(student, task(plan, 2)).state == straight.state
    student.restart(None)
    assert lesson(student, task(plan, 2)).state != straight.state


def heard(opinion, plan):
    codec = CODECS[plan.codec]
    scale, payload = codec.encode(opinion.logits_PC)
    return codec.decode(payload, scale, *opinion.logits_PC.shape)


@pytest.mark.parametrize("codec", ["int4", "int2", "int1"])
def test_what_was_cut_off_is_said_later_and_counts_from_the_last_committed_state(codec):
    plan = make_plan(codec=codec)
    plain = make_plan(codec="fp32")
    student, exact = enrol(plan), enrol(plain)
    said_PC = meant_PC = np.zeros((CASES, 2))
    states = []
    for number in range(1, 6):
        opinion = lesson(student, task(plan, number, seed=number))
        moved_PC = lesson(exact, task(plain, number, seed=number)).logits_PC
        said_PC, meant_PC = said_PC + heard(opinion, plan), meant_PC + moved_PC
        # All that was ever meant is what was said and what the last message cut off.
        left_PC = opinion.logits_PC - heard(opinion, plan)
        np.testing.assert_allclose(said_PC + left_PC, meant_PC, atol=1e-4)
        states.append(opinion.state)
    assert np.abs(left_PC).max() > 1e-4
    again = enrol(plan)
    lesson(again, task(plan, 1, seed=9))  # never committed
    again.restart(states[3])
    assert lesson(again, task(plan, 5, seed=5)).state == states[4]
    again.restart(None)
    assert lesson(again, task(plan, 1, seed=1)).state == states[0]


@pytest.mark.parametrize("changes", [{"codec": "int8"}, {"codec": "int1", "method": "fedmd"}])
def test_fine_codecs_and_logits_leave_nothing_unsaid(changes):
    plan = make_plan(**changes)
    student = enrol(plan)
    first, again = (lesson(student, task(plan, 1)) for _ in range(2) if student.restart(None) is None)
    assert (first.logits_PC == again.logits_PC).all() and not load(first.state)["cases"].numel()


def test_a_public_lesson_keeps_what_is_unsaid_to_itself():
    plan = make_plan(codec="int1")
    student = enrol(plan)
    lesson(student, task(plan, 1))
    before = load(student.state())
    assert before["unsaid"].any()
    opinion = student.public_lesson(task(plan, 2))
    assert not opinion.logits_PC.any()
    assert (load(opinion.state)["unsaid"] == before["unsaid"]).all()


def test_students_of_one_architecture_differ_by_site_only_in_public_seeds():
    plan = make_plan()
    north, again, south = (
        enrol(plan, Architecture("mlp", layers="all"), site) for site in ("north", "north", "south")
    )
    assert north.learner.state() == again.learner.state() != south.learner.state()


def test_a_histogram_is_bought_in_the_first_round_and_balances_the_loss():
    plan = make_plan(method="oneshot", num_rounds=200, privacy__clipping_norm=5.0)
    uneven = PrivateRecords(lambda _: patients(60, 1, ill=0.9))
    balanced = lesson(enrol(plan), task(plan, scale=0.0), uneven)
    (counts,) = balanced.bought.values()
    assert set(balanced.bought) == {LABEL_HISTOGRAM} and sum(counts) == 60 and counts[1] > 45
    plain = make_plan(method="fedmd", num_rounds=1, privacy__steps_per_round=200, privacy__clipping_norm=5.0)
    biased = lesson(enrol(plain), task(plain, scale=0.0), uneven)
    assert biased.bought == {}
    # A site that has hardly seen the other class says "ill" of nearly everybody, unless its loss is balanced.
    share = [(one.logits_PC[:, 1] > one.logits_PC[:, 0]).mean() for one in (biased, balanced)]
    assert share[0] > share[1] + 0.1 and 0.3 < share[1] < 0.7


def test_accuracy_on_those_held_out_is_bought_in_the_last_round():
    plan = make_plan(num_rounds=3, privacy__hold_out_share=0.1)
    student = enrol(plan)
    bought = [lesson(student, task(plan, number)).bought for number in (1, 2, 3)]
    assert [set(one) for one in bought] == [set(), set(), {HOLD_OUT_ACCURACY}]


def test_a_student_that_can_not_be_trained_in_private_is_refused(monkeypatch):
    def mixing(case_shape, num_classes):
        return nn.Sequential(nn.Linear(case_shape[0], 4), nn.InstanceNorm1d(4, track_running_stats=True))

    monkeypatch.setitem(REGISTRY, "mixing", mixing)
    with pytest.raises(UserError, match="can't be trained in private"):
        enrol(make_plan(), Architecture("mixing"))


def test_a_lesson_that_ends_in_nonsense_is_still_an_opinion_of_the_right_shape():
    asked = task(make_plan(privacy__step_size=1e6, privacy__clipping_norm=1e6))
    opinion = lesson(
        enrol(asked.plan, Architecture("mlp", layers="all")), asked, randomness=PrivateRandomness.seeded("x")
    )
    assert opinion.logits_PC.shape == (CASES, 2)
