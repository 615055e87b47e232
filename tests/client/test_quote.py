"""Quotes and approvals: a hospital reads what a run costs before any record is touched, and says yes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from client.policy import read_policy
from client.quote import plan_from_run_config, quote
from client.served import asked_plans
from common.accounting import lifetime_epsilon
from common.messages import Refusal, Release, Rule, decode_answer

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
RUN = """\
method = "descent"
num-rounds = 5
run-id = "heart-2026"

[privacy]
unit = "patient"
epsilon = 0.5
"""


@pytest.fixture
def run_config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return str(path)


def test_it_says_what_a_run_costs_what_is_left_and_how_many_more_fit(hospital):
    with hospital.open() as site:
        priced = quote(site.policy, site.ledger, hospital.plan())
        assert priced.refused_by is None
        assert priced.price.run == hospital.plan().guarantee()
        assert priced.price.left == pytest.approx(3.0 - priced.price.lifetime.epsilon)
        assert [entry.kind for entry in site.ledger.entries()] == ["begin"]


def test_as_many_runs_fit_as_it_says(hospital):
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        more = None
        for number in range(20):
            plan = hospital.plan(study=f"s{number}")
            priced = quote(site.policy, site.ledger, plan)
            if priced.refused_by is not None:
                break
            assert more is None or priced.price.more == more - 1
            more = priced.price.more
            assert decode_answer(site.custodian.learn(hospital.task(1, plan).encode())).steps == 1
        assert priced.refused_by is Rule.BUDGET and more == 0
        assert lifetime_epsilon(site.ledger.events(), 1e-5)[0] <= 3.0


@pytest.mark.parametrize(
    ("changes", "rule", "reason"),
    [
        ({"epsilon": 2.0}, Rule.NOT_ALLOWED, "budget.run-epsilon"),
        ({"clipping_norm": 1e3}, Rule.NOT_ALLOWED, "allow.clipping-norm"),
        ({"histogram_share": 0.1}, Rule.NOT_ALLOWED, "allow.purchases"),
    ],
)
def test_it_says_which_rule_would_refuse_and_why(hospital, changes, rule, reason):
    with hospital.open() as site:
        priced = quote(site.policy, site.ledger, hospital.plan(**changes))
        assert priced.refused_by is rule and reason in priced.reason
        assert rule.label in str(priced)


def test_a_study_with_another_plan_is_a_conflict(hospital):
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        site.custodian.learn(hospital.task().encode())
        assert quote(site.policy, site.ledger, hospital.plan(rounds=9)).refused_by is Rule.PLAN_CONFLICT
        again = quote(site.policy, site.ledger, hospital.plan())
        assert again.refused_by is None


def test_a_plan_is_drawn_up_from_a_run_config(hospital, run_config):
    plan = plan_from_run_config(read_policy(hospital.policy_path), [run_config, "num-rounds=7"], "")
    assert (plan.study, plan.rounds, plan.epsilon, plan.returns) == ("heart-2026", 7, 0.5, "movement")
    # A coordinator that asks for more draws up a plan within the site's caps.
    more = ["num-rounds=500 privacy.epsilon=9.0"]
    plan = plan_from_run_config(read_policy(hospital.policy_path), [run_config, *more], "")
    assert (plan.rounds, plan.epsilon) == (200, 1.0)
    bought = plan_from_run_config(read_policy(hospital.policy_path), [run_config, 'method="oneshot"'], "")
    assert bought.histogram_share > 0 and bought.returns == "logits"


# ---- The commands ----


def test_the_command_tells_programs_and_people(hospital, run_config):
    spoken = hospital.run("quote", "--run-config", run_config)
    assert spoken.returncode == 0, spoken.stderr
    for part in (
        "ε = 0.",
        "one patient added or removed",
        "this run",
        "lifetime",
        "more such runs there fit",
        "No rule refuses it",
    ):
        assert part in spoken.stdout
    told = json.loads(hospital.run("quote", "--run-config", run_config, "--json").stdout)
    assert 0 < told["run"]["epsilon"] <= 0.5
    assert told["run"]["unit"] == "patient" and told["run"]["adjacency"] == "add-remove"
    assert told["refused_by"] is None and told["more_such_runs"] >= 1
    assert told["lifetime_epsilon_left"] < 3.0


def test_a_run_config_that_is_not_right_is_named(hospital, run_config):
    refused = hospital.run("quote", "--run-config", run_config, "--run-config", "privacy.epsilon=-1.0")
    assert refused.returncode == 2 and "privacy.epsilon" in refused.stderr


def test_a_person_approves_what_a_courier_brought(hospital, tmp_path):
    hospital.amend({"approval = false": "approval = true"})
    plan = hospital.plan()
    asked_plans(read_policy(hospital.policy_path)).keep(plan)
    digest = plan.digest().hex()
    assert digest in hospital.run("approve").stdout
    unknown = hospital.run("approve", "--yes", "0000")
    assert unknown.returncode == 2 and "0000: no such file, and no plan that was asked for" in unknown.stderr
    approved = hospital.run("approve", digest[:8], "--yes", "--who", "Dr. Who")
    assert approved.returncode == 0, approved.stderr
    assert "This run costs" in approved.stdout and digest in approved.stdout
    assert digest not in hospital.run("approve").stdout
    (tmp_path / "plan.json").write_bytes(plan.canonical())
    again = hospital.run("approve", str(tmp_path / "plan.json"), "--who", "Dr. No")
    assert again.returncode == 0 and "approved before, by Dr. Who" in again.stdout
    with hospital.open() as site:
        assert [entry.kind for entry in site.ledger.entries()].count("approve") == 1
        bound = site.ledger.approved("study-1", plan.digest())
        assert bound.who == "Dr. Who" and json.loads(bound.quote)["plan"] == digest
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert isinstance(decode_answer(site.custodian.learn(hospital.task().encode())), Release)
        other = decode_answer(site.custodian.learn(hospital.task(1, hospital.plan(rounds=2)).encode()))
        assert isinstance(other, Refusal) and other.rule is Rule.NOT_APPROVED


def test_a_program_can_list_and_approve_plans(hospital):
    hospital.amend({"approval = false": "approval = true"})
    assert json.loads(hospital.run("approve", "--json").stdout) == []
    asked_plans(read_policy(hospital.policy_path)).keep(hospital.plan())
    (waiting,) = json.loads(hospital.run("approve", "--json").stdout)
    assert waiting["study"] == "study-1" and waiting["epsilon"] == hospital.plan().epsilon
    asked = hospital.run("approve", waiting["plan"], "--json")
    assert asked.returncode == 2 and "give --yes" in asked.stderr and not asked.stdout
    approved = json.loads(
        hospital.run("approve", waiting["plan"], "--yes", "--json", "--who", "a robot").stdout
    )
    assert approved["plan"] == waiting["plan"] and approved["approved_by"] == "a robot"
    assert approved["refused_by"] is None
    assert f"plan {waiting['plan'][:8]}, by a robot" in hospital.run("ledger").stdout
    assert json.loads(hospital.run("approve", "--json").stdout) == []


def test_a_plan_that_would_be_refused_is_not_approved(hospital):
    hospital.amend({"approval = false": "approval = true"})
    plan = hospital.plan(epsilon=5.0)
    asked_plans(read_policy(hospital.policy_path)).keep(plan)
    refused = hospital.run("approve", plan.digest().hex(), "--yes")
    assert refused.returncode == 2 and "not approved, since it would be refused" in refused.stderr
    assert "ε = 5 is above budget.run-epsilon" in refused.stderr
    with hospital.open() as site:
        assert site.ledger.approved("study-1", plan.digest()) is None


def test_where_the_budget_is_spent_a_plan_can_be_approved_and_is_answered_without_private_steps(hospital):
    hospital.amend({"approval = false": "approval = true", "study-epsilon = 1.0": "study-epsilon = 0.9"})
    plan = hospital.plan()
    asked_plans(read_policy(hospital.policy_path)).keep(plan)
    approved = hospital.run("approve", plan.digest().hex(), "--yes")
    assert approved.returncode == 0, approved.stderr
    assert "public work alone is left" in approved.stdout
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert isinstance(decode_answer(site.custodian.learn(hospital.task().encode())), Release)
        assert site.ledger.events() == ()


def test_the_books_can_be_read_and_verified(hospital):
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        release = site.custodian.learn(hospital.task().encode())
        site.releases.note("study-1", 1, release)
    shown = json.loads(hospital.run("ledger", "--json").stdout)
    assert [entry["kind"] for entry in shown["entries"]] == ["begin", "reserve", "charge", "commit"]
    assert shown["unit"] == "patient" and 0 < shown["lifetime"]["epsilon"] <= 1.0
    assert "study-1" in hospital.run("ledger").stdout
    sound = hospital.run("verify")
    assert sound.returncode == 0, sound.stdout
    told = json.loads(hospital.run("verify", "--json").stdout)
    assert told == {"findings": [], "guarantee": " ".join(sound.stdout.split())}
    assert "Releases in the ledger: 1; sent, by the log of releases: 1." in sound.stdout
    with hospital.open() as site:
        site.releases.note("study-1", 2, b"something else")
    forged = hospital.run("verify")
    assert forged.returncode == 1 and "that the ledger doesn't hold" in forged.stdout
    told = hospital.run("verify", "--json")
    assert told.returncode == 1 and "that the ledger doesn't hold" in json.loads(told.stdout)["findings"][0]


def test_what_waits_for_a_person_is_not_called_refused(hospital):
    hospital.amend({"approval = false": "approval = true"})
    assert "no plan waits for approval" in hospital.run("approve").stdout
    asked_plans(read_policy(hospital.policy_path)).keep(hospital.plan())
    digest = hospital.plan().digest().hex()
    shown = hospital.run("approve", digest)
    assert shown.returncode == 2 and "--yes" in shown.stderr and "Traceback" not in shown.stderr
    assert "No rule refuses it once a person has approved it" in shown.stdout
    assert "Refused" not in shown.stdout
    declined = hospital.run("approve", digest, answer="n\n")
    assert declined.returncode == 1 and "not approved" in declined.stdout
    with hospital.open() as site:
        assert site.ledger.approved("study-1", hospital.plan().digest()) is None


def test_of_a_run_above_a_cap_none_fit(hospital):
    with hospital.open() as site:
        assert quote(site.policy, site.ledger, hospital.plan()).price.more > 0
    hospital.amend({"study-epsilon = 1.0": "study-epsilon = 0.9"})
    with hospital.open() as site:
        priced = quote(site.policy, site.ledger, hospital.plan())
    assert priced.refused_by is Rule.BUDGET and priced.price.more == 0


def test_a_log_of_releases_that_was_tampered_with_fails_the_check(hospital):
    (hospital.folder / "state" / "releases.jsonl").write_text('{"round": 1}\n')
    forged = hospital.run("verify")
    assert forged.returncode == 1 and "is not a line of this log" in forged.stdout


# ---- Founding a site ----

DESCRIBED = """\
target = "ill"
classes = ["no", "yes"]

[[features]]
name = "age"
kind = "numeric"

[sites.north]
declared-size = 100
file = "patients.csv"
"""
ANSWERS = {
    "--name": "north",
    "--data": "data.toml",
    "--unit": "record",
    "--declared-size": "100",
    "--lifetime-epsilon": "3",
    "--run-epsilon": "1",
    "--study": "a",
}


def init(folder, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """Found a site in `folder`/site, with no one to ask."""
    answers = ANSWERS | {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    given = [part for flag, value in answers.items() if value is not None for part in (flag, value)]
    command = [sys.executable, "-m", "grandrounds", "site", "init", "site", *given]
    return subprocess.run(
        command, capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=folder, env=ENVIRONMENT
    )


@pytest.fixture
def described(tmp_path):
    (tmp_path / "data.toml").write_text(DESCRIBED)
    return tmp_path


@pytest.mark.parametrize("missing", ["name", "declared_size"])
def test_init_asks_what_it_cannot_know_and_never_counts_records(described, missing):
    alone = init(described, **{missing: None})
    assert alone.returncode == 2 and f"--{missing.replace('_', '-')} is missing" in alone.stderr
    assert not (described / "site").exists()


def test_init_founds_a_site_that_can_be_moved(described):
    done = init(described)
    assert done.returncode == 0, done.stderr
    text = (described / "site" / "site.toml").read_text()
    assert 'description = "../data.toml"' in text and 'listen = "unix:custodian.sock"' in text
    assert str(described) not in text
    moved = described / "elsewhere"
    moved.mkdir()
    for name in ("site", "data.toml"):
        (described / name).rename(moved / name)
    policy = read_policy(moved / "site" / "site.toml")
    assert policy.allow.studies == ("a",) and policy.approval
    assert policy.service.listen == f"unix:{moved}/site/custodian.sock"
    assert (moved / "site" / "site.key").stat().st_mode & 0o777 == 0o600
    twice = init(moved)
    assert twice.returncode == 2 and "is there already" in twice.stderr


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"declared_size": "-5"}, "data.declared-size = -5"),
        ({"declared_size": "0"}, "data.declared-size = 0"),
        ({"name": "St. Mary's"}, "site = "),
        ({"name": 'north"\n'}, "site = "),
        ({"data": "nowhere.toml"}, "nowhere.toml can't be read"),
        ({"unit": "patient"}, "no column is named as `patient`"),
        (
            {"run_epsilon": "4"},
            "budget.run-epsilon = 4.0 is refused: expected at most lifetime-eps",
        ),
        ({"lifetime_epsilon": "-1"}, "budget.lifetime-epsilon = -1.0"),
        ({"run_epsilon": "nan"}, "budget.study-epsilon = nan"),
        ({"delta": "0.2"}, "budget.delta = 0.2"),
        ({"listen": "tcp:0.0.0.0:1"}, "service.listen"),
    ],
)
def test_init_refuses_what_no_site_can_be_in_one_line_and_writes_nothing(described, changes, named):
    refused = init(described, **changes)
    assert refused.returncode == 2 and named in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (described / "site").exists()


def test_no_command_of_a_site_waits_for_torch():
    program = "import sys, grandrounds; print('torch' in sys.modules, 'flwr' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["False", "False"]
