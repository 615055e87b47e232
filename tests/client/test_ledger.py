"""The ledger under couriers that race, processes that die, disks that fill and hands that edit."""

import contextlib
import hashlib
import math
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from client.ledger import AlreadyCommitted, Budget, Ledger, Refused
from common.accounting import (
    DiscreteLaplace,
    Event,
    GaussianSteps,
    calibrate,
    epsilon,
    lifetime_epsilon,
    tally,
)
from common.errors import ConfigError
from common.messages import Rule

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(32))
STEP = GaussianSteps(20.0, 1.0, 1)
"""Twenty of these cost ε = 0.82 at δ = 1e-5."""
PLAN = (GaussianSteps(20.0, 1.0, 20),)
BUDGET = Budget(delta=1e-5, lifetime_epsilon=3.0, study_epsilon=2.0, run_epsilon=1.0, attempts=3)


def digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger.create(path, KEY, "source-1", unit="patient") as opened:
        yield opened


def reserve(
    ledger: Ledger, study: str = "study-1", events: tuple[Event, ...] = PLAN, budget: Budget = BUDGET
) -> None:
    ledger.reserve(study, digest(study), b'{"a":"plan"}', events, budget)


def charge(ledger: Ledger, round_number: int = 1, study: str = "study-1", budget: Budget = BUDGET) -> bytes:
    return ledger.charge(study, round_number, digest(study, round_number), (STEP,), budget)


def commit(ledger: Ledger, round_number: int = 1, study: str = "study-1", mark: bytes = b"") -> bytes:
    release, state = b"release %d" % round_number + mark, b"state %d" % round_number
    task = digest(study, round_number)
    return ledger.commit(study, round_number, task, release=release, student_state=state)


def refusal(ask: Callable[[], object]) -> Rule:
    with pytest.raises(Refused) as refused:
        ask()
    return refused.value.rule


# ---- A task's life ----


def test_a_task_is_reserved_charged_committed_and_answered_again_for_nothing(ledger: Ledger) -> None:
    task = digest("study-1", 1)
    assert ledger.committed("study-1", 1, task) is None
    assert ledger.student_state("study-1") is None
    reserve(ledger)
    head = charge(ledger)
    assert head == ledger.head
    assert len(head) == 32
    assert commit(ledger) == b"release 1"
    spent = ledger.events()
    assert ledger.committed("study-1", 1, task) == b"release 1"
    assert ledger.student_state("study-1") == b"state 1"
    assert [entry.kind for entry in ledger.entries()] == ["begin", "reserve", "charge", "commit"]
    assert ledger.events() == spent == PLAN


def test_everything_is_there_after_closing(path: Path) -> None:
    with Ledger.create(path, KEY, "source-1", unit="patient") as ledger:
        reserve(ledger)
        for round_number in (1, 2):
            charge(ledger, round_number)
            commit(ledger, round_number)
        head, entries = ledger.head, ledger.entries()
        ledger.approve("study-2", digest("study-2"), '{"epsilon":1}', "Dr. Ada", "2026-01-01T00:00:00+00:00")
    with Ledger.open(path, KEY) as ledger:
        assert (ledger.data_source_id, ledger.unit) == ("source-1", "patient")
        assert ledger.entries()[:-1] == entries
        assert ledger.committed("study-1", 1, digest("study-1", 1)) == b"release 1"
        assert ledger.student_state("study-1") == b"state 2"
        assert ledger.knows_head(head)
        approval = ledger.approved("study-2", digest("study-2"))
        assert approval is not None
        assert (approval.who, approval.quote) == ("Dr. Ada", '{"epsilon":1}')
        assert ledger.approved("study-2", digest("another plan")) is None
        assert ledger.approved("study-1", digest("study-2")) is None


def test_a_charge_is_never_refunded_and_draws_on_the_reservation_first(ledger: Ledger) -> None:
    reserve(ledger)
    for _ in range(3):
        charge(ledger)  # the task died twice
    for round_number in range(2, 19):
        charge(ledger, round_number)
    assert ledger.events() == PLAN  # 20 of 20
    charge(ledger, 19)  # beyond it, within the caps
    assert ledger.events() == (GaussianSteps(20.0, 1.0, 21),)


def test_beyond_the_reservation_the_caps_decide(ledger: Ledger) -> None:
    tight = replace(BUDGET, run_epsilon=epsilon(PLAN, 1e-5)[0], attempts=1000)
    reserve(ledger, budget=tight)
    for _ in range(20):
        charge(ledger, budget=tight)
    assert refusal(lambda: charge(ledger, budget=tight)) is Rule.BUDGET
    assert refusal(lambda: charge(ledger, 2, budget=tight)) is Rule.BUDGET
    assert ledger.events() == PLAN
    roomy = replace(tight, run_epsilon=1.0)
    with pytest.raises(Refused, match="above run-epsilon = 1"):
        for _ in range(1000):
            charge(ledger, budget=roomy)
    assert 0.95 < epsilon(ledger.events(), 1e-5)[0] <= 1.0
    assert (
        refusal(lambda: charge(ledger, budget=replace(roomy, run_epsilon=2.0, study_epsilon=1.0)))
        is Rule.BUDGET
    )
    charge(ledger, budget=replace(roomy, run_epsilon=2.0))


def test_a_round_stands_for_one_task(ledger: Ledger) -> None:
    reserve(ledger)
    charge(ledger)
    other = digest("another task")
    assert refusal(lambda: ledger.charge("study-1", 1, other, (STEP,), BUDGET)) is Rule.ROUND_CONFLICT
    assert refusal(lambda: ledger.committed("study-1", 1, other)) is Rule.ROUND_CONFLICT
    commit(ledger)
    assert refusal(lambda: ledger.charge("study-1", 1, other, (STEP,), BUDGET)) is Rule.ROUND_CONFLICT
    conflict = refusal(lambda: ledger.commit("study-1", 1, other, release=b"x", student_state=b"y"))
    assert conflict is Rule.ROUND_CONFLICT
    assert len(ledger.entries()) == 4


def test_the_first_commit_of_a_task_stands(ledger: Ledger) -> None:
    reserve(ledger)
    charge(ledger)
    charge(ledger)
    assert commit(ledger) == b"release 1"
    assert commit(ledger, mark=b" again") == b"release 1"
    with pytest.raises(AlreadyCommitted) as done:
        charge(ledger)
    assert done.value.release == b"release 1"
    assert Counter(entry.kind for entry in ledger.entries())["charge"] == 2
    assert ledger.student_state("study-1") == b"state 1"


def test_a_task_may_be_attempted_so_often(ledger: Ledger) -> None:
    reserve(ledger)
    for _ in range(3):
        charge(ledger)
    assert refusal(lambda: charge(ledger)) is Rule.TOO_MANY_ATTEMPTS
    charge(ledger, 2)
    commit(ledger)  # the third attempt may still finish


def test_what_was_not_charged_cannot_be_committed(ledger: Ledger) -> None:
    reserve(ledger)
    with pytest.raises(ValueError, match="never charged"):
        commit(ledger)
    assert len(ledger.entries()) == 2


def test_public_work_is_free_and_needs_no_plan(ledger: Ledger) -> None:
    for _ in range(5):
        ledger.charge("study-9", 1, digest("public"), (), BUDGET)
    assert ledger.commit("study-9", 1, digest("public"), release=b"r", student_state=b"") == b"r"
    assert ledger.committed("study-9", 1, digest("public")) == b"r"
    assert ledger.student_state("study-9") is None
    assert ledger.events() == ()
    assert ledger.spending(1e-5).lifetime.epsilon == 0


def test_an_empty_state_leaves_the_former_one(ledger: Ledger) -> None:
    reserve(ledger)
    charge(ledger)
    commit(ledger)
    charge(ledger, 2)
    ledger.commit("study-1", 2, digest("study-1", 2), release=b"r", student_state=b"")
    assert ledger.student_state("study-1") == b"state 1"


def test_only_the_latest_state_takes_room(ledger: Ledger, path: Path) -> None:
    reserve(ledger)
    for round_number in range(1, 6):
        charge(ledger, round_number)
        commit(ledger, round_number)
    with contextlib.closing(sqlite3.connect(path)) as database:
        names = Counter(name for (name,) in database.execute("SELECT name FROM attachments"))
    assert names == {"release": 5, "state": 1}


# ---- Plans and caps ----


def test_a_plan_is_reserved_once_and_no_other_takes_its_study(ledger: Ledger) -> None:
    reserve(ledger)
    head = ledger.head
    reserve(ledger)
    assert ledger.head == head
    another = digest("another plan")
    assert refusal(lambda: ledger.reserve("study-1", another, b"{}", PLAN, BUDGET)) is Rule.PLAN_CONFLICT
    assert refusal(lambda: reserve(ledger, events=(STEP,))) is Rule.PLAN_CONFLICT
    assert ledger.head == head


def test_only_what_the_plan_holds_is_charged(ledger: Ledger) -> None:
    assert refusal(lambda: charge(ledger)) is Rule.PLAN_CONFLICT
    reserve(ledger)
    for event in (GaussianSteps(19.0, 1.0, 1), GaussianSteps(20.0, 0.5, 1), DiscreteLaplace(0.1)):
        assert (
            refusal(lambda event=event: ledger.charge("study-1", 1, digest(1), (event,), BUDGET))
            is Rule.PLAN_CONFLICT
        )
    assert [entry.kind for entry in ledger.entries()] == ["begin", "reserve"]


@pytest.mark.parametrize("cap", ["run_epsilon", "study_epsilon", "lifetime_epsilon"])
def test_each_cap_refuses_a_plan_above_it(ledger: Ledger, cap: str) -> None:
    tight = replace(BUDGET, **{cap: 0.8})
    with pytest.raises(Refused, match=cap.replace("_", "-")) as refused:
        reserve(ledger, budget=tight)
    assert refused.value.rule is Rule.BUDGET
    assert len(ledger.entries()) == 1
    reserve(ledger)


def test_a_renamed_study_gets_no_fresh_budget(ledger: Ledger) -> None:
    admitted = 0
    with contextlib.suppress(Refused):
        for number in range(100):
            reserve(ledger, f"study-{number}")
            admitted += 1
    cost = lifetime_epsilon(PLAN * admitted, 1e-5)[0]
    assert cost <= 3.0 < lifetime_epsilon(PLAN * (admitted + 1), 1e-5)[0]
    assert ledger.spending(1e-5).lifetime.epsilon == pytest.approx(cost)


@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_one_plan_may_take_a_whole_lifetime_and_then_nothing_more(ledger: Ledger, rate: float) -> None:
    budget = Budget(1e-5, 1.0, 1.0, 1.0, attempts=3)
    count = DiscreteLaplace(0.05)
    sigma = calibrate(1.0, 1e-5, steps=10, sample_rate=rate, spent=[count])
    plan = (count, GaussianSteps(sigma, rate, 10))
    reserve(ledger, events=plan, budget=budget)
    assert ledger.spending(1e-5).lifetime.epsilon <= 1.0
    assert refusal(lambda: reserve(ledger, "study-2", (GaussianSteps(1e4, 1.0, 1),), budget)) is Rule.BUDGET


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("delta", 0.0),
        ("delta", 1.0),
        ("delta", math.nan),
        ("lifetime_epsilon", math.nan),
        ("lifetime_epsilon", math.inf),
        ("study_epsilon", 0.0),
        ("run_epsilon", -1.0),
        ("attempts", 0),
    ],
)
def test_caps_that_cap_nothing_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        replace(BUDGET, **{field: value})


def test_a_refusal_carries_numbers_for_the_site_and_a_rule_for_the_coordinator(ledger: Ledger) -> None:
    with pytest.raises(Refused) as refused:
        reserve(ledger, budget=replace(BUDGET, run_epsilon=0.5))
    assert refused.value.rule.label == "budget"
    assert "ε = 0.8198" in refused.value.detail


@given(
    plans=st.lists(
        st.builds(GaussianSteps, st.floats(5, 60), st.just(1.0), st.integers(1, 40)), min_size=1, max_size=8
    ),
    caps=st.tuples(st.floats(0.2, 6), st.floats(0.2, 3), st.floats(0.2, 3)),
)
def test_a_quote_says_what_a_reservation_does(plans: list[Event], caps: tuple[float, float, float]) -> None:
    budget = Budget(1e-5, *caps, attempts=3)
    with TemporaryDirectory() as folder, Ledger.create(Path(folder) / "l.db", KEY, "s") as ledger:
        for number, plan in enumerate(plans):
            study = f"study-{number}"
            quote = ledger.quote(study, digest(study), (plan,), budget)
            assert quote.run.epsilon == pytest.approx(epsilon([plan], 1e-5)[0])
            try:
                reserve(ledger, study, (plan,), budget)
            except Refused as refused:
                assert quote.refusal is not None
                assert quote.refusal.rule == refused.rule
                continue
            assert quote.refusal is None
            assert quote.lifetime == ledger.spending(1e-5).lifetime
            assert quote.left == pytest.approx(caps[0] - quote.lifetime.epsilon)
            again = ledger.quote(study, digest(study), (plan,), budget)
            assert (again.lifetime, again.more) == (quote.lifetime, quote.more)
        assert ledger.spending(1e-5).lifetime.epsilon <= caps[0]


# ---- Two couriers, two runs, one budget ----


class Couriers(RuleBasedStateMachine):
    """Any interleaving of couriers on one file, each with the ledger opened anew, against a naive model."""

    STUDIES = st.sampled_from(["one", "two", "three"])
    ROUNDS = st.integers(1, 4)
    HANDS = st.integers(0, 1)

    @initialize()
    def begin(self) -> None:
        self.folder = TemporaryDirectory()
        self.path = Path(self.folder.name) / "ledger.db"
        self.anchor = Path(self.folder.name) / "anchor"
        Ledger.create(self.path, KEY, "source", anchor=self.anchor).close()
        self.hands = [Ledger.open(self.path, KEY, self.anchor) for _ in range(2)]
        self.budget = Budget(1e-5, 1.0, 0.6, 0.6, attempts=2)
        self.reserved: dict[str, Counter[Event]] = {}
        self.charged: dict[str, Counter[Event]] = {}
        self.attempts: Counter[tuple[str, int, int]] = Counter()
        self.tasks: dict[tuple[str, int], int] = {}
        self.released: dict[tuple[str, int], bytes] = {}
        self.states: dict[str, bytes] = {}
        self.heads: set[bytes] = set()
        self.serial = 0

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            for hand in self.hands:
                hand.close()
            self.folder.cleanup()

    @rule(hand=HANDS, study=STUDIES, steps=st.integers(1, 6))
    def reserve(self, hand: int, study: str, steps: int) -> None:
        plan = (GaussianSteps(20.0, 1.0, steps), DiscreteLaplace(0.1))
        try:
            self.hands[hand].reserve(study, digest(study, steps), b"{}", plan, self.budget)
        except Refused as refused:
            known = self.reserved.get(study)
            assert refused.rule is (Rule.BUDGET if known is None else Rule.PLAN_CONFLICT)
            assert known != tally(plan)
        else:
            assert self.reserved.setdefault(study, tally(plan)) == tally(plan)

    @rule(hand=HANDS, study=STUDIES, number=ROUNDS, variant=st.integers(0, 3), private=st.booleans())
    def charge(self, hand: int, study: str, number: int, variant: int, private: bool) -> None:
        events: tuple[Event, ...] = (STEP, DiscreteLaplace(0.1)) if private else ()
        asked = variant // 3  # mostly the same task
        task = self.tasks.get((study, number))
        try:
            head = self.hands[hand].charge(study, number, digest(study, number, asked), events, self.budget)
        except Refused as refused:
            reasons = {
                Rule.ROUND_CONFLICT: task not in (None, asked),
                Rule.PLAN_CONFLICT: private and study not in self.reserved,
                Rule.TOO_MANY_ATTEMPTS: self.attempts[study, number, asked] >= self.budget.attempts,
                Rule.BUDGET: private,
            }
            assert reasons[refused.rule]
        except AlreadyCommitted as done:
            assert done.release == self.released[study, number]
        else:
            assert task in (None, asked)
            assert (study, number) not in self.released
            self.tasks[study, number] = asked
            self.attempts[study, number, asked] += private
            assert self.attempts[study, number, asked] <= self.budget.attempts
            self.charged.setdefault(study, Counter()).update(tally(events))
            self.heads.add(head)

    @precondition(lambda self: self.tasks)
    @rule(hand=HANDS, data=st.data(), keeps_state=st.booleans())
    def commit(self, hand: int, data: st.DataObject, keeps_state: bool) -> None:
        study, number = data.draw(st.sampled_from(sorted(self.tasks)))
        self.serial += 1
        release, state = b"release %d" % self.serial, b"" if keeps_state else b"state %d" % self.serial
        task = digest(study, number, self.tasks[study, number])
        left = self.hands[hand].commit(study, number, task, release=release, student_state=state)
        if (study, number) not in self.released and state:
            self.states[study] = state
        assert left == self.released.setdefault((study, number), release)

    @rule(hand=HANDS)
    def restart(self, hand: int) -> None:
        self.hands[hand].close()
        self.hands[hand] = Ledger.open(self.path, KEY, self.anchor)

    @invariant()
    def nothing_is_forgotten_or_overspent(self) -> None:
        if not hasattr(self, "hands"):
            return
        studies = self.reserved.keys() | self.charged.keys()
        empty: Counter[Event] = Counter()
        by_study = {s: self.reserved.get(s, empty) | self.charged.get(s, empty) for s in studies}
        expected = sum(by_study.values(), empty)
        for hand in self.hands:
            assert tally(hand.events()) == expected
            spending = hand.spending(1e-5)
            assert spending.lifetime.epsilon <= self.budget.lifetime_epsilon
            assert all(spent.epsilon <= self.budget.run_epsilon for spent in spending.studies.values())
            for (study, number), release in self.released.items():
                task = digest(study, number, self.tasks[study, number])
                assert hand.committed(study, number, task) == release
            assert all(hand.student_state(study) == state for study, state in self.states.items())
            assert all(hand.knows_head(head) for head in self.heads)


TestCouriers = Couriers.TestCase
TestCouriers.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)

WRITER = """
import hashlib, sys
from pathlib import Path
from client.ledger import *
from common.accounting import GaussianSteps
path, anchor, name, rounds = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
budget = Budget(1e-5, 3.0, 3.0, 3.0, attempts=10**6)
step = GaussianSteps(20.0, 1.0, 1)
with Ledger.open(path, bytes(range(32)), anchor) as ledger:
    print("open", flush=True)
    sys.stdin.readline()
    for number in range(1, rounds + 1):
        study = f"{name}-{number // 10}"
        task = hashlib.sha256(f"{study} {number}".encode()).digest()
        try:
            ledger.reserve(study, hashlib.sha256(study.encode()).digest(), b"{}", [step], budget)
            print("charging", study, number, flush=True)
            ledger.charge(study, number, task, [step], budget)
            print("charged", study, number, flush=True)
            release = f"{study} {number} ".encode() + bytes(2000)
            print("committing", study, number, flush=True)
            ledger.commit(study, number, task, release=release, student_state=release)
            print("committed", study, number, flush=True)
        except Refused as refused:
            print("refused", refused.rule.name, number, flush=True)
        except AlreadyCommitted:
            print("already", study, number, flush=True)
"""


def writer(folder: Path, name: str, rounds: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder / "ledger.db"), str(folder / "anchor"), name, str(rounds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
def test_processes_that_race_never_overspend(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "ledger.db", KEY, "source", anchor=tmp_path / "anchor").close()
    # Two couriers bring the same studies, one brings others; together they want far more than there is.
    processes = [writer(tmp_path, name, 250) for name in ("a", "a", "b")]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
    for process in processes:
        start(process)
    lines = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    told = Counter(line.split()[0] for some in lines for line in some)
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert told["refused"] > 0
    with Ledger.open(tmp_path / "ledger.db", KEY, tmp_path / "anchor") as ledger:
        kinds = Counter(entry.kind for entry in ledger.entries())
        assert kinds["charge"] == told["charged"]
        assert kinds["commit"] <= told["committed"]
        assert 2.5 < ledger.spending(1e-5).lifetime.epsilon <= 3.0
        assert ledger.verify().findings == ()


def test_threads_share_one_ledger(ledger: Ledger) -> None:
    reserve(ledger)
    told: list[str] = []

    def courier() -> None:
        for round_number in range(1, 6):
            try:
                charge(ledger, round_number, budget=replace(BUDGET, attempts=100))
                commit(ledger, round_number, mark=str(threading.get_ident()).encode())
                told.append("charged")
            except AlreadyCommitted:
                told.append("already")

    threads = [threading.Thread(target=courier) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = Counter(entry.kind for entry in ledger.entries())
    assert kinds["commit"] == 5
    assert kinds["charge"] == told.count("charged") == 20 - told.count("already")


@pytest.mark.slow
def test_a_writer_killed_at_any_instant_leaves_no_less_than_it_did(tmp_path: Path) -> None:
    path, anchor = tmp_path / "ledger.db", tmp_path / "anchor"
    Ledger.create(path, KEY, "source", anchor=anchor).close()
    rng = random.Random(0)
    for turn in range(8):
        process = writer(tmp_path, f"turn-{turn}", 1000)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        start(process)
        time.sleep(rng.uniform(0.0, 0.12))
        process.send_signal(signal.SIGKILL)
        whole = [line for line in process.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        told = [words for words in map(str.split, whole) if len(words) == 3]
        done = {
            word: {(study, int(number)) for verb, study, number in told if verb == word}
            for word in ("charging", "charged", "committing", "committed")
        }
        with Ledger.open(path, KEY, anchor) as ledger:
            prefix = f"turn-{turn}-"
            mine = [entry for entry in ledger.entries() if entry.body.get("study", "").startswith(prefix)]
            charged = Counter((e.body["study"], e.body["round"]) for e in mine if e.kind == "charge")
            committed = {(e.body["study"], e.body["round"]) for e in mine if e.kind == "commit"}
            assert done["charged"] <= charged.keys() <= done["charging"]
            assert set(charged.values()) <= {1}
            assert done["committed"] <= committed <= done["committing"]
            for study, number in committed:
                task = hashlib.sha256(f"{study} {number}".encode()).digest()
                assert ledger.committed(study, number, task) == f"{study} {number} ".encode() + bytes(2000)
            for study in {study for study, _ in committed}:
                latest = max(number for name, number in committed if name == study)
                assert ledger.student_state(study) == f"{study} {latest} ".encode() + bytes(2000)
            assert ledger.verify().findings == ()


# ---- What it says ----


def test_a_sound_ledger_is_verified_by_another_accountant(ledger: Ledger) -> None:
    assert "none of its records has been used" in ledger.verify().guarantee
    reserve(ledger)
    reserve(ledger, "study-2", (GaussianSteps(30.0, 1.0, 20), DiscreteLaplace(0.1)))
    verdict = ledger.verify()
    assert verdict.findings == ()
    for word in (
        "source-1",
        "one patient with all records",
        "added",
        "removed",
        "δ = 1e-05",
        "lifetime",
        "study-2",
    ):
        assert word in verdict.guarantee


def test_verify_finds_what_went_past_a_cap(ledger: Ledger) -> None:
    reserve(ledger, budget=replace(BUDGET, run_epsilon=2.0))
    body = dict(ledger.entries()[-1].body) | {"study": "study-2"}
    body["events"] = [{"event": "gaussian-steps", "noise_multiplier": 2.0, "sample_rate": 1.0, "steps": 4}]
    with ledger._chain.writing() as pen:  # a custodian gone wrong, with the key
        pen.append("reserve", body)
    findings = " ".join(ledger.verify().findings)
    assert "Study study-2" in findings
    assert "above the caps" in findings
    assert "above its cap of 3" in findings


@pytest.mark.slow
def test_sampled_studies_are_verified_too(ledger: Ledger) -> None:
    reserve(ledger, events=(GaussianSteps(4.0, 0.1, 50), DiscreteLaplace(0.1)))
    reserve(ledger, "study-2", (GaussianSteps(30.0, 1.0, 10),))
    assert ledger.verify().findings == ()


def test_a_custodian_that_waits_is_light() -> None:
    code = """
import sys
from pathlib import Path
from client.ledger import *
print(sorted({"scipy", "torch", "opacus", "dp_accounting", "pandas"} & set(sys.modules)))
status = Path("/proc/self/status")
print(status.read_text().split("VmHWM:")[1].split()[0] if status.exists() else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy, kibibytes = done.stdout.splitlines()
    assert heavy == "[]"
    assert int(kibibytes) < 60 << 10


def test_a_task_costs_the_ledger_milliseconds(ledger: Ledger) -> None:
    reserve(ledger)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    for round_number in range(1, 21):
        reserve(ledger)
        charge(ledger, round_number)
        commit(ledger, round_number)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_utime - began) / 20 < 0.01
