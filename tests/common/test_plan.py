"""A plan: the same bytes everywhere, and a price that its rounds together never exceed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.accounting import DiscreteLaplace, GaussianSteps, epsilon
from common.config import RunConfig
from common.errors import UserError
from common.plan import Plan, plan_of


def draw_up(**changes) -> Plan:
    flat = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return plan_of(RunConfig.from_run_config(flat), study="s", proxy_digest=bytes(32), classes=2)


def test_its_canonical_form_reads_back_to_the_same_bytes():
    plan = draw_up(privacy__epsilon=0.1, student__weight_decay=1e-7)
    read = Plan.model_validate_json(plan.canonical())
    assert read == plan and read.canonical() == plan.canonical() and read.digest() == plan.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"num_rounds": 21},
        {"privacy__clipping_norm": 0.25},
        {"privacy__epsilon": 2.0},
        {"privacy__delta": 1e-6},
        {"privacy__step_size": 2.0},
        {"codec": "fp16"},
        {"method": "fedmd"},
        {"seed": 1},
        {"student__epochs": 3},
    ],
)
def test_its_digest_covers_whatever_a_site_would_do_otherwise(changes):
    assert draw_up(**changes).digest() != draw_up().digest()


@pytest.mark.parametrize(
    ("target", "method", "sample_rate"),
    [
        (0.3, "descent", 1.0),
        (8.0, "descent", 1.0),
        (1.0, "fedmd", 1.0),
        (0.3, "oneshot", 1.0),
        (8.0, "oneshot", 1.0),
        (1.0, "descent", 0.2),
        (1.0, "oneshot", 0.5),
    ],
)
def test_the_whole_run_costs_at_most_the_target_and_nearly_all_of_it(target, method, sample_rate):
    plan = draw_up(privacy__epsilon=target, method=method, privacy__sample_rate=sample_rate)
    guarantee = plan.guarantee()
    assert 0.97 * target <= guarantee.epsilon <= target
    expected = "gaussian-exact" if method != "oneshot" and sample_rate == 1 else "pld"
    assert guarantee.accountant == expected
    assert (guarantee.unit, guarantee.adjacency, guarantee.horizon) == ("record", "add-remove", "run")


@given(rounds=st.integers(1, 30), steps=st.integers(1, 5), target=st.floats(0.1, 10))
def test_the_rounds_together_are_the_run(rounds, steps, target):
    plan = draw_up(num_rounds=rounds, privacy__steps_per_round=steps, privacy__epsilon=target)
    taken = [event for number in range(1, rounds + 1) for event in plan.task_events(number)]
    assert sum(event.steps for event in taken) == sum(event.steps for event in plan.events())
    assert epsilon(taken, plan.delta)[0] == pytest.approx(plan.guarantee().epsilon, rel=1e-6)
    spent = [plan.guarantee(number).epsilon for number in range(1, rounds + 1)]
    assert spent == sorted(spent) and spent[-1] == plan.guarantee().epsilon


def test_a_histogram_is_bought_once_out_of_the_same_target():
    plan = draw_up(method="oneshot", privacy__epsilon=2.0, privacy__histogram_share=0.1)
    (bought,) = plan.purchases()
    assert (bought.round, bought.epsilon, bought.size) == (1, pytest.approx(0.2), 2)
    assert plan.task_events(1)[0] == DiscreteLaplace(epsilon=bought.epsilon)
    weighted = draw_up(method="fedmd", aggregation__rule="class-weighted")
    assert isinstance(weighted.task_events(2)[0], GaussianSteps) and len(weighted.task_events(2)) == 1
    assert draw_up(method="oneshot", aggregation__rule="mean").purchases() == ()


def test_a_budget_that_nothing_fits_into_has_no_price():
    with pytest.raises(UserError):
        draw_up(privacy__epsilon=1e-6, privacy__delta=1e-12).noise_multiplier()


@pytest.mark.parametrize("study", ["", "a b", "../x", "x" * 101, "ü"])
def test_a_study_has_a_plain_name(study):
    with pytest.raises(ValidationError):
        plan_of(RunConfig(), study=study, proxy_digest=bytes(32), classes=2)


@given(most_epsilon=st.floats(0.05, 5.0), most_rounds=st.integers(1, 60))
def test_a_plan_within_a_sites_caps_costs_no_more_than_either(most_epsilon, most_rounds):
    asked = draw_up(num_rounds=30)
    own = asked.within(most_epsilon, most_rounds)
    assert own.guarantee().epsilon <= min(most_epsilon, 1.0)
    assert own.rounds == min(30, most_rounds)
    assert (own == asked) == (most_epsilon >= 1.0 and most_rounds >= 30)
    assert Plan.model_validate_json(own.canonical()) == own


def test_the_sites_of_a_simulation_take_their_caps_in_turn():
    privacy = RunConfig.from_run_config({"privacy.site-epsilons": "0.3,5", "privacy.epsilon": 2.0}).privacy
    assert [privacy.most_epsilon(place) for place in range(4)] == [0.3, 2.0, 0.3, 2.0]
    assert RunConfig().privacy.most_epsilon(7) == 1.0
