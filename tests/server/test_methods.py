"""Methods: descent by logits takes the steps of DP-FedSGD, and every method moves z as its table says."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.noise import PrivateRandomness
from client.private_data import PrivateRecords
from client.student import Student
from common.architectures import Architecture
from common.codec import centred
from common.config import RunConfig
from common.errors import ConfigError
from common.losses import log_soft_labels
from common.messages import Task
from common.plan import plan_of
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records
from server.aggregation import Contribution, Moment, aggregate
from server.methods import METHODS, State, method_of, stalled

FEATURES = ("a", "b", "c")


def patients(count: int, seed: int) -> Records:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, len(FEATURES)))
    target = np.where(values @ [1.0, -2.0, 0.5] + rng.normal(size=count) > 0, "yes", "no")
    return Records(dict(zip(FEATURES, values.T, strict=True)), target, None, {})


class Silent(PrivateRandomness):
    """Noise of variance zero."""

    def noised(self, sum_P, deviation):
        return sum_P


def configured(**flat) -> RunConfig:
    return RunConfig.from_run_config({k.replace("__", ".").replace("_", "-"): v for k, v in flat.items()})


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [1, 3])
def test_descent_with_linear_students_is_federated_sgd_in_the_space_of_weights(monkeypatch, momentum, steps):
    """Without noise and quantisation: FedSGD with one step a round, FedAvg with several."""
    # Its only use is to keep the least squares solvable; here they are, and it would blur the comparison.
    monkeypatch.setattr("common.distillation.RIDGE", 1e-9)
    config = configured(
        num_rounds=6,
        aggregation__momentum=momentum,
        privacy__steps_per_round=steps,
        privacy__clipping_norm=0.3,
    )
    public = patients(40, 0)
    preprocessing = Preprocessing.fit(public, [NumericSpec(name=name) for name in FEATURES], ("no", "yes"))
    cases = preprocessing.encode(public)
    proxy = Proxy(preprocessing, cases.x, cases.y)
    plan = plan_of(config, study="s", proxy_digest=proxy.digest, classes=2)
    sizes = {"a": 20, "b": 70, "c": 45}
    records = {site: patients(count, seed) for seed, (site, count) in enumerate(sizes.items(), start=1)}
    declared = {"a": 30, "b": 60, "c": 45}

    # In logits, by way of students.
    students = {site: Student.enrol(plan, proxy, Architecture("linear"), site) for site in sizes}
    state = State.start(np.zeros((40, 2)))
    for number in range(1, plan.rounds + 1):
        soft_PC = log_soft_labels(state.z_PC, plan.student.temperature)
        task = Task(plan, number, np.arange(40, dtype=np.int32), soft_PC)
        said = []
        for site, student in students.items():
            opinion = student.private_lesson(
                task, PrivateRecords(lambda _, site=site: records[site]), declared[site], Silent()
            )
            said.append(Contribution(site, opinion.logits_PC, declared[site]))
        state = METHODS["descent"].advance(
            state,
            aggregate("mean", said, Moment(config.aggregation, sum(declared.values()))).logits_PC,
            number,
            config,
        )

    # In weights, naively.
    weights, velocity = np.zeros((2, 4)), np.zeros((2, 4))
    encoded = {site: preprocessing.encode(found) for site, found in records.items()}
    for _ in range(plan.rounds):
        moved = np.zeros((2, 4))
        for site, found in encoded.items():
            local = weights.copy()
            for _ in range(steps):
                local -= plan.step_size * clipped_sum(local, found.x, found.y, 0.3) / declared[site]
            moved += declared[site] * (local - weights)
        velocity = momentum * velocity + moved / sum(declared.values())
        weights = weights + velocity
    naive_PC = np.column_stack([cases.x, np.ones(40)]) @ weights.T
    np.testing.assert_allclose(state.z_PC, naive_PC - naive_PC.mean(axis=1, keepdims=True), atol=2e-4)
    assert np.abs(state.z_PC).max() > 0.1


def clipped_sum(weights_CD, x_ND, y_N, clipping_norm: float):
    total_CD = np.zeros_like(weights_CD)
    for x, y in zip(np.column_stack([x_ND, np.ones(len(x_ND))]), y_N, strict=True):
        logits = weights_CD @ x
        probability = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        gradient = np.outer(probability - np.eye(2)[y], x)
        total_CD += gradient * min(1.0, clipping_norm / np.linalg.norm(gradient))
    return total_CD


# ---- One advance ----

LOGITS = np.random.default_rng(0).normal(size=(5, 3))


@given(momentum=st.floats(0, 0.99), rounds=st.integers(1, 6))
def test_velocity_gathers_movements(momentum, rounds):
    config = configured(aggregation__momentum=momentum, num_rounds=rounds)
    state = State.start(LOGITS)
    for number in range(1, rounds + 1):
        state = METHODS["descent"].advance(state, LOGITS, number, config)
    travelled = sum(momentum**age for start in range(rounds) for age in range(rounds - start))
    np.testing.assert_allclose(state.z_PC, LOGITS * (1 + travelled), rtol=1e-9)
    assert state.taught_PC(config.aggregation) is state.z_PC
    assert [one is state.z_PC for one in state.outcomes(config.aggregation)] == [True]


def test_the_average_begins_in_the_second_half():
    config = configured(aggregation__averaging=0.5, num_rounds=4)
    state = State.start(np.zeros((5, 3)))
    for number in range(1, 5):
        state = METHODS["descent"].advance(state, LOGITS, number, config)
        assert (state.average_PC is None) == (number <= 2)
    np.testing.assert_allclose(state.taught_PC(config.aggregation), LOGITS * (0.5 * 3 + 0.5 * 4))


@pytest.mark.parametrize("method", ["oneshot", "fedmd"])
def test_the_other_methods_adopt_the_ensemble(method):
    config = configured(method=method, aggregation__validated=True)
    (state,) = METHODS[method].candidates(State.start(np.zeros((5, 3))), LOGITS, 1, config)
    assert (state.taught_PC(config.aggregation) == LOGITS).all()


def test_validation_may_choose_three_lengths_of_step_or_none_and_at_the_end_z_or_its_average():
    config = configured(aggregation__validated=True, aggregation__momentum=0.5, num_rounds=2)
    state = State.start(np.zeros((5, 3)))
    for share in (1.0, 0.5, 0.25, 0.0):
        whole, *shorter = METHODS["descent"].candidates(state, LOGITS, 1, config)
        of_share = [one for one in (whole, *shorter) if np.allclose(one.z_PC, share * LOGITS)]
        assert len(of_share) == 1 and np.allclose(of_share[0].velocity_PC, share * LOGITS)
    second = METHODS["descent"].candidates(whole, LOGITS, 2, config)[2]
    np.testing.assert_allclose(second.z_PC, LOGITS + 0.25 * 1.5 * LOGITS)
    assert second.taught_PC(config.aggregation) is second.z_PC
    assert len(second.outcomes(config.aggregation)) == 2


@pytest.mark.parametrize(
    ("losses", "patience", "over"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.4], 1, False),
        ([0.5, 0.6, 0.4], 2, False),
        ([0.4, 0.6, 0.5], 2, True),
        ([0.4, 0.6, 0.5], 3, False),
        ([0.4, 0.6, 0.5], 0, False),
    ],
)
def test_a_run_has_stalled_when_its_last_rounds_brought_nothing_better(losses, patience, over):
    assert stalled(losses, patience) == over


# ---- What fits together ----


def test_class_weights_are_for_logits_not_for_movements():
    with pytest.raises(ConfigError, match=r"aggregation.rule = 'class-weighted' is refused.*movements"):
        method_of(configured(method="descent", aggregation__rule="class-weighted"))
    for method in ("oneshot", "fedmd"):
        assert method_of(configured(method=method, aggregation__rule="class-weighted"))


def test_one_round_takes_only_so_many_steps():
    many = {"num_rounds": 200, "privacy__steps_per_round": 100}
    assert method_of(configured(**many))
    with pytest.raises(ConfigError, match=r"num-rounds = 200 is refused: expected at most 100"):
        method_of(configured(method="oneshot", **many))


def test_a_student_that_speaks_of_itself_and_one_that_speaks_of_its_movement():
    """`logits` are the movement and what stood before."""
    public = patients(40, 0)
    preprocessing = Preprocessing.fit(public, [NumericSpec(name=name) for name in FEATURES], ("no", "yes"))
    cases = preprocessing.encode(public)
    proxy = Proxy(preprocessing, cases.x, cases.y)
    said = {}
    for method in ("descent", "fedmd"):
        plan = plan_of(configured(method=method), study="s", proxy_digest=proxy.digest, classes=2)
        student = Student.enrol(plan, proxy, Architecture("linear"), "site")
        task = Task(plan, 1, np.arange(40, dtype=np.int32), log_soft_labels(cases.x[:, :2], 2.0))
        before_PC = student.study_soft_labels(task)
        opinion = student.private_lesson(task, PrivateRecords(lambda _: patients(50, 1)), 50, Silent())
        said[method] = opinion.logits_PC
    np.testing.assert_allclose(said["fedmd"], said["descent"] + centred(before_PC), atol=1e-5)
