"""The custodian, in process: what a task goes through, what it costs, and what faults show to the outside."""

import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.approval import approve
from client.ledger import LedgerError
from client.private_data import NOBODY_HELD_OUT, HoldOut, PrivateRecords
from client.quote import quote
from common.accounting import DiscreteLaplace, epsilon
from common.errors import UserError
from common.messages import Greeting, Offer, Receipt, Refusal, Release, Rule, decode_answer
from common.preprocessing import NumericSpec, Preprocessing
from common.proxy import Proxy
from common.records import Records, concatenate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(hospital):
    with hospital.open() as opened:
        opened.custodian.accept_proxy(hospital.proxy.to_bytes())
        yield opened


def ask(site, task) -> Release | Refusal:
    return decode_answer(site.custodian.learn(task.encode()))


def charges(site) -> int:
    return sum(entry.kind == "charge" for entry in site.ledger.entries())


# ---- Acquaintance ----


def test_it_introduces_itself_and_takes_the_proxy_once(hospital):
    with hospital.open() as site:
        offer = Offer(hospital.proxy.digest).encode()
        assert decode_answer(site.custodian.offer(offer)) == Greeting(
            "north", 50, 1.0, 200, knows_proxy=False
        )
        assert decode_answer(site.custodian.accept_proxy(hospital.proxy.to_bytes())) == Receipt(
            hospital.proxy.digest
        )
        assert decode_answer(site.custodian.offer(offer)) == Greeting("north", 50, 1.0, 200, knows_proxy=True)
    with hospital.open() as site:
        assert decode_answer(site.custodian.offer(offer)) == Greeting("north", 50, 1.0, 200, knows_proxy=True)


def test_a_proxy_that_was_damaged_on_disk_is_asked_for_again(hospital, site, caplog):
    (path,) = (hospital.folder / "state" / "proxies").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with hospital.open_beside() as reopened:
        offer = Offer(hospital.proxy.digest).encode()
        assert not decode_answer(reopened.custodian.offer(offer)).knows_proxy
        reopened.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert decode_answer(reopened.custodian.offer(offer)).knows_proxy


# ---- A task ----


def test_a_task_is_reserved_charged_and_committed_and_asked_again_costs_nothing(hospital, site):
    task = hospital.task()
    release = site.custodian.learn(task.encode())
    assert isinstance(decode_answer(release), Release)
    kinds = [entry.kind for entry in site.ledger.entries()]
    assert kinds == ["begin", "reserve", "charge", "commit"]
    assert site.custodian.learn(task.encode()) == release
    assert [entry.kind for entry in site.ledger.entries()] == kinds


def test_a_run_costs_what_its_plan_says(hospital, site):
    plan = hospital.plan()
    for round_number in range(1, plan.rounds + 1):
        answer = ask(site, hospital.task(round_number))
        assert answer.steps == plan.steps_per_round
    assert epsilon(site.ledger.events(), plan.delta)[0] == pytest.approx(plan.guarantee().epsilon)
    assert plan.guarantee().epsilon <= 1.0


def test_the_noise_is_fresh_for_every_site_and_every_attempt(hospital, found_at, tmp_path, site):
    other = found_at(tmp_path / "twin")
    task = hospital.task()
    with other.open() as twin:
        twin.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert ask(site, task).payload != ask(twin, task).payload


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda h: h.task(1, seed=1), Rule.ROUND_CONFLICT),
        (lambda h: h.task(2, h.plan(rounds=4)), Rule.PLAN_CONFLICT),
        (lambda h: h.task(2, h.plan(epsilon=0.5)), Rule.PLAN_CONFLICT),
        (lambda h: h.task(2, h.plan(clipping_norm=0.25)), Rule.PLAN_CONFLICT),
        (lambda h: h.task(2, h.plan(codec="fp32")), Rule.NOT_ALLOWED),
        (
            lambda h: h.task(2, h.plan(classes=3), log_soft_labels_PC=np.full((24, 3), -1.0986, "f2")),
            Rule.MALFORMED,
        ),
        (lambda h: h.task(2, h.plan(proxy_digest="1" * 64)), Rule.UNKNOWN_PROXY),
        (lambda h: h.task(2, head=bytes([7]) * 32), Rule.UNKNOWN_HEAD),
    ],
)
def test_what_departs_from_the_first_task_is_refused_by_name(hospital, site, change, rule):
    ask(site, hospital.task(1))
    before = site.ledger.head
    answer = ask(site, change(hospital))
    assert isinstance(answer, Refusal) and answer.rule is rule
    assert site.ledger.head == before


def test_an_unknown_proxy_is_refused_with_both_digests(hospital, site):
    answer = ask(site, hospital.task(1, hospital.plan(proxy_digest="1" * 64)))
    assert (answer.asked, answer.known) == (bytes.fromhex("1" * 64), hospital.proxy.digest)


def test_every_head_that_a_release_carried_is_known_again(hospital, site):
    first = ask(site, hospital.task(1))
    second = ask(site, hospital.task(2, head=first.head))
    assert isinstance(second, Release)
    assert isinstance(ask(site, hospital.task(3, head=first.head)), Release)


def test_a_proxy_with_columns_that_the_description_lacks_is_refused_before_any_charge(hospital, site):
    records = Records(
        columns={"ward": np.arange(24.0)}, target=np.array(["no", "yes"] * 12), patients=None, groups={}
    )
    preprocessing = Preprocessing.fit(records, [NumericSpec(name="ward")], ("no", "yes"))
    cases = preprocessing.encode(records)
    proxy = Proxy(preprocessing, x=cases.x, y=cases.y)
    site.custodian.accept_proxy(proxy.to_bytes())
    answer = ask(site, hospital.task(1, hospital.plan(proxy_digest=proxy.digest.hex())))
    assert answer.rule is Rule.NOT_ALLOWED
    assert charges(site) == 0


# ---- Approval ----


def test_a_plan_runs_only_when_a_person_has_approved_exactly_it(hospital):
    hospital.amend({"approval = false": "approval = true"})
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert ask(site, hospital.task()).rule is Rule.NOT_APPROVED
        other = hospital.plan(clipping_norm=0.25)
        approve(site.ledger, quote(site.policy, site.ledger, hospital.plan()), "Dr. Who")
        assert ask(site, hospital.task(plan=other)).rule is Rule.NOT_APPROVED
        assert ask(site, hospital.task(plan=hospital.plan(study="study-2"))).rule is Rule.NOT_APPROVED
        assert isinstance(ask(site, hospital.task()), Release)
        approval = site.ledger.approved("study-1", hospital.plan().digest())
        assert (
            approval is not None and approval.who == "Dr. Who" and '"lifetime_epsilon_left"' in approval.quote
        )


# ---- The budget ----


def test_a_renamed_study_opens_no_fresh_budget_and_public_work_goes_on(hospital, site):
    steps = []
    for number in range(8):
        plan = hospital.plan(study=f"study-{number}")
        answer = ask(site, hospital.task(1, plan))
        assert isinstance(answer, Release)
        steps.append(answer.steps)
    assert steps[0] == 1 and steps[-1] == 0 and sorted(steps, reverse=True) == steps
    assert site.ledger.spending(1e-5).lifetime.epsilon <= 3.0


def test_a_spent_budget_still_learns_from_the_teacher(hospital, site):
    hospital.amend({"lifetime-epsilon = 3.0": "lifetime-epsilon = 0.001"})
    with hospital.open_beside() as poor:
        told = hospital.task(1, hospital.plan(returns="logits"))
        answer = ask(poor, told)
        assert answer.steps == 0
        agreement = np.corrcoef(answer.logits()[:, 0], told.log_soft_labels_PC[:, 0].astype(float))[0, 1]
        assert np.isfinite(agreement)
        assert all(
            entry.body.get("events", []) == [] for entry in poor.ledger.entries() if entry.kind == "charge"
        )


def test_attempts_at_one_task_are_capped_and_each_is_charged(hospital, site, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("client.egress.release", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            site.custodian.learn(hospital.task().encode())
    assert charges(site) == 3
    monkeypatch.undo()
    assert ask(site, hospital.task()).rule is Rule.TOO_MANY_ATTEMPTS
    assert charges(site) == 3


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(1, 3), st.integers(0, 1)), max_size=12)
)
def test_two_couriers_and_two_runs_never_overspend(found_at, tmp_path, order):
    """Two runs interleaved, each carried by two couriers to custodians that share the ledger."""
    hospital = found_at(tmp_path / uuid4().hex[:8])
    hospital.amend({"lifetime-epsilon = 3.0": "lifetime-epsilon = 1.3"})
    with hospital.open() as one, hospital.open_beside() as other:
        for site in (one, other):
            site.custodian.accept_proxy(hospital.proxy.to_bytes())
        answers = {}
        for study, round_number, courier in order:
            task = hospital.task(round_number, hospital.plan(study=study), seed=0)
            body = (one, other)[courier].custodian.learn(task.encode())
            assert answers.setdefault((study, round_number), body) == body
        assert one.ledger.spending(1e-5).lifetime.epsilon <= 1.3
        private = {study for (study, _), body in answers.items() if decode_answer(body).steps}
        assert len(private) <= 1


# ---- Faults ----


def test_a_record_that_makes_every_gradient_non_finite_shows_nowhere(hospital, site, monkeypatch, caplog):
    original = PrivateRecords.for_private_step

    def poisoned(self, *arguments):
        units = original(self, *arguments)
        units.phi_ND[0] = float("nan")
        return units

    monkeypatch.setattr(PrivateRecords, "for_private_step", poisoned)
    for round_number in (1, 2, 3):
        answer = ask(site, hospital.task(round_number))
        assert answer.steps == 1 and np.isfinite(answer.logits()).all() and answer.logits().any()
    assert not caplog.records


@pytest.mark.parametrize(
    "fault",
    [
        lambda h: (h.folder / "patients.csv").unlink(),
        lambda h: (h.folder / "patients.csv").write_text("patient,ill,age\np1,yes,high\n"),
        lambda h: (h.folder / "patients.csv").write_text("patient,ill,age,pressure,sugar\n"),
        lambda h: (h.folder / "patients.csv").write_bytes(b"\xff\xfe\x00secret"),
    ],
)
def test_data_that_cannot_be_read_show_in_the_sites_log_only(hospital, site, fault, caplog):
    fault(hospital)
    with caplog.at_level(logging.ERROR):
        answer = ask(site, hospital.task())
    assert answer.steps == 1
    assert answer.logits().any(), "noise alone, not silence"
    assert charges(site) == 1
    assert isinstance(ask(site, hospital.task(2)), Release)


def test_a_ledger_that_cannot_be_written_lets_nothing_out(hospital, site, monkeypatch):
    def full(*_, **__):
        raise LedgerError(hospital.folder, "disk-full", "the disk is full")

    monkeypatch.setattr(type(site.ledger), "commit", full)
    assert ask(site, hospital.task()).rule is Rule.UNAVAILABLE
    monkeypatch.undo()
    assert isinstance(ask(site, hospital.task()), Release)
    assert charges(site) == 2


def test_a_restored_backup_is_noticed_by_the_head_that_the_coordinator_brings_back(hospital, site):
    ask(site, hospital.task(1))
    site.ledger.close()
    files = [*(hospital.folder / "state").glob("ledger.db*"), hospital.folder / "ledger.anchor"]
    backup = {path: path.read_bytes() for path in files}
    with hospital.open_beside() as later:
        head = ask(later, hospital.task(2)).head
    for path in (hospital.folder / "state").glob("ledger.db*"):
        path.unlink()
    for path, content in backup.items():
        path.write_bytes(content)
    with hospital.open_beside() as restored:
        assert ask(restored, hospital.task(3, head=head)).rule is Rule.UNKNOWN_HEAD


def test_patients_are_not_promised_what_the_data_cannot_give(hospital):
    description = hospital.folder / "data.toml"
    description.write_text(description.read_text().replace('patient = "patient"\n', ""))
    with pytest.raises(UserError, match="no column is named"), hospital.open():
        pass


def test_what_was_counted_by_patient_is_never_counted_by_record(hospital):
    hospital.amend({'unit = "patient"': 'unit = "record"'})
    with pytest.raises(UserError, match="the ledger counts by patient"), hospital.open():
        pass


def test_two_custodians_never_serve_from_one_state(hospital, site):
    with pytest.raises(UserError, match="another custodian"), hospital.open():
        pass


def test_the_final_student_is_kept_and_anything_else_refused(hospital, site):
    answer = decode_answer(site.custodian.deliver(b"not a model"))
    assert isinstance(answer, Refusal) and answer.rule is Rule.MALFORMED
    assert not (hospital.folder / "state" / "student.safetensors").exists()


# ---- Bought on purpose ----


def test_a_label_histogram_is_bought_charged_and_noisy(hospital, site):
    hospital.amend({"purchases = []": 'purchases = ["label-histogram"]'})
    with hospital.open_beside() as generous:
        plan = hospital.plan(histogram_share=0.2)
        answer = ask(generous, hospital.task(1, plan))
        assert len(answer.counts) == 2
        assert sum(answer.counts) == pytest.approx(60, abs=200)  # ε = 0.2: noise of about 7 on each count
        assert ask(generous, hospital.task(2, plan)).counts == ()
        events = generous.ledger.events()
        assert DiscreteLaplace(0.2) in events
        assert epsilon(events, plan.delta)[0] == pytest.approx(plan.guarantee().epsilon)


def test_accuracy_on_held_out_patients_is_bought_in_the_last_round(hospital, site):
    plan = hospital.plan(hold_out_share=0.9, rounds=2)
    assert ask(site, hospital.task(1, plan)).rule is Rule.NOT_ALLOWED
    hospital.amend({"purchases = []": 'purchases = ["hold-out-accuracy"]'})
    with hospital.open_beside() as careless:
        assert ask(careless, hospital.task(1, plan)).rule is Rule.NOT_ALLOWED, "nobody is held out"
    hospital.amend({"hold-out = 0.0": "hold-out = 0.5"})
    with hospital.open_beside() as careful:
        assert ask(careful, hospital.task(1, plan)).counts == ()
        right, wrong = ask(careful, hospital.task(2, plan)).counts
        assert right + wrong == pytest.approx(30, abs=30)
        assert DiscreteLaplace(0.9) in careful.ledger.events()


def test_the_hold_out_depends_on_key_and_patient_alone(patients_of):
    records = patients_of(200)
    held = HoldOut(b"key", 0.3).takes(records)
    assert 30 < held.sum() < 90
    some = np.arange(0, 200, 3)
    assert (HoldOut(b"key", 0.3).takes(records.take(some)) == held[some]).all()
    twice = concatenate([records, records])
    assert (HoldOut(b"key", 0.3).takes(twice) == np.tile(held, 2)).all(), (
        "all records of a patient go together"
    )
    assert (HoldOut(b"other", 0.3).takes(records) != held).any()
    assert not NOBODY_HELD_OUT.takes(records).any()
    anonymous = replace(records, patients=None)
    assert (
        HoldOut(b"key", 0.3).takes(anonymous.take(some)) == HoldOut(b"key", 0.3).takes(anonymous)[some]
    ).all()


def test_nobody_who_is_held_out_is_trained_on(hospital):
    hospital.amend({"hold-out = 0.0": "hold-out = 0.5"})
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        ask(site, hospital.task())
        kept, held_out = site.custodian._records._cases(hospital.proxy)
        assert len(kept) + len(held_out) == 60 and 15 < len(held_out) < 45
        assert not {row.tobytes() for row in kept.x} & {row.tobytes() for row in held_out.x}


# ---- What it never does ----


def test_only_simulations_know_seeded_randomness():
    sources = (ROOT / "client").glob("*.py")
    knowing = {path.name for path in sources if ".seeded(" in path.read_text()}
    assert knowing == {"simulated.py"}


def test_a_module_that_the_policy_does_not_name_is_never_imported(hospital, site, tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text("from common.models import REGISTRY\nNet = REGISTRY['linear']\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = hospital.plan().student.model_copy(update={"model": "own_model:Net"})
    task = hospital.task(1, hospital.plan(student=own))
    assert ask(site, task).rule is Rule.NOT_ALLOWED
    assert "own_model" not in sys.modules
    hospital.amend({'models = ["linear",': 'models = ["own_model:Net", "linear",'})
    with hospital.open_beside() as trusting:
        answer = ask(trusting, task)
        assert answer.steps == 1 and answer.logits().any()
    assert "own_model" in sys.modules


LEAVING = """
import sys, torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self, case_shape, num_classes):
        super().__init__(nn.Linear(case_shape[0], num_classes))
    def forward(self, x):
        if len(x) == 60 and torch.is_grad_enabled():
            sys.exit(0)
        return super().forward(x)
"""
"""It bears every trial, and exits at the sight of just the hospital's sixty patients."""


def test_a_model_that_exits_ends_no_lesson_and_no_thread(hospital, tmp_path, monkeypatch, caplog):
    """As the custodian holds lessons, which is never in the main thread: there an exit may be SIGTERM's."""
    (tmp_path / "leaving_model.py").write_text(LEAVING)
    monkeypatch.syspath_prepend(tmp_path)
    hospital.amend({'models = ["linear",': 'models = ["leaving_model:Net", "linear",'})
    own = hospital.plan().student.model_copy(update={"model": "leaving_model:Net"})
    task = hospital.task(1, hospital.plan(student=own))
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.ERROR):
            told = pool.submit(site.custodian.learn, task.encode()).result()
        assert isinstance(decode_answer(told), Release)
        assert [entry.kind for entry in site.ledger.entries()] == ["begin", "reserve", "charge", "commit"]
    failed = [one.exc_info[0] for one in caplog.records if one.exc_info]
    assert failed == [SystemExit]  # once: the lesson over nobody's records went well
