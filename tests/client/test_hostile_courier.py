"""A courier that means harm, against a custodian in a process of its own.

Each request of the table is put to it as any program in the socket's group could. Whatever is asked, what
comes back is the answer the table names, of the length and with the fields that follow from the request;
the ledger has charged what the answer admits and never more than the caps; and the custodian goes on
serving.
"""

import os
import pickle
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from pydantic_core import to_json
from safetensors.numpy import save

from client.connection import OPTIONS
from client.custodian_pb2 import Body
from client.custodian_pb2 import Plan as PlanMessage
from client.custodian_pb2_grpc import CustodianStub
from common.accounting import epsilon
from common.messages import Answer, Greeting, Offer, Receipt, Refusal, Release, decode_answer
from common.plan import Plan

pytestmark = pytest.mark.slow

CAP = 3.0
FRESH = ("grpc.use_local_subchannel_pool", 1)


class Trap:
    """Unpickled, it leaves a trace."""

    trace = "/tmp/grandrounds-unpickled"

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.trace}",)


@dataclass
class Attack:
    """A hostile courier's means: the hospital's address, and what an honest coordinator would have sent."""

    hospital: "object"
    served: "object"

    def ask(self, call: str, body: bytes, timeout: float = 60.0) -> str:
        """Put one request; return what came back, in a word."""
        with grpc.insecure_channel(self.hospital.address, OPTIONS) as channel:
            stub = CustodianStub(channel)
            try:
                if call == "Quote":
                    return stub.Quote(PlanMessage(json=body), timeout=timeout).refused_by or "price"
                answer = getattr(stub, call)(Body(body=body), timeout=timeout).body
            except grpc.RpcError as error:
                assert "north" not in str(error.details())
                return error.code().name.lower()
        return in_a_word(decode_answer(answer))


def in_a_word(answer: Answer) -> str:
    match answer:
        case Refusal():
            return answer.rule.label
        case Release():
            return "release" if answer.steps else "public release"
        case Greeting():
            assert (answer.site, answer.declared_size) == ("north", 50)
            return "known" if answer.knows_proxy else "unknown"
        case Receipt():
            return "receipt"


@pytest.fixture(scope="module")
def attack(tmp_path_factory, found_at) -> Iterator[Attack]:
    hospital = found_at(tmp_path_factory.mktemp("attacked") / "north")
    with hospital.served() as served:
        attack = Attack(hospital, served)
        assert attack.ask("AcceptProxy", hospital.proxy.to_bytes()) == "receipt"
        assert attack.ask("Learn", hospital.task(1).encode()) == "release"
        yield attack
        assert served.process.poll() is None


# ---- What is asked, and what comes back -------------------------------------------------------------------


def changed(plan: Plan, **changes: object) -> bytes:
    """A plan's canonical JSON with values put in their places, whether a plan may have them or not."""
    text = plan.canonical().decode()
    for key, value in changes.items():
        written = f'"{key}":{to_json(value).decode()}'  # numbers as canonical JSON has them
        text, found = re.subn(rf'"{key}":("[^"]*"|[^,}}]*)', lambda _, new=written: new, text, count=1)
        text = text if found else f"{text[:-1]},{written}}}"
    return text.encode()


def forged(
    hospital, plan_json: bytes, round_number: int = 2, cases: int = 24, classes: int = 2, **more
) -> bytes:
    """A task written by hand around any bytes that claim to be a plan."""
    cases_P = more.get("cases_P", np.arange(cases, dtype="<i4").tobytes())
    labels = more.get("labels", np.full((cases, classes), np.log(1 / classes), "<f2").tobytes())
    header = struct.pack("<4sIIH32sI", b"GRT1", round_number, cases, classes, bytes(32), len(plan_json))
    return header + plan_json + cases_P + labels


def planned(**changes: object) -> Callable[..., bytes]:
    """A task of round 2 under a plan with these changes, well-formed where the protocol can express it."""
    return lambda h: forged(h, changed(h.plan(), **changes))


def proxy_file(**changes: np.ndarray) -> Callable[..., bytes]:
    def write(hospital) -> bytes:
        arrays = {"x": hospital.proxy.x, "y": hospital.proxy.y} | changes
        return save(arrays, metadata={"preprocessing": hospital.proxy.preprocessing.to_json()})

    return write


def with_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


NAN = np.full((24, 3), np.nan, np.float32)
DEEP = b"[" * 100_000 + b"]" * 100_000

REQUESTS: dict[str, tuple[str, Callable[..., bytes], str]] = {
    # ---- offers ----
    "an offer of nothing": ("Offer", lambda h: b"", "malformed"),
    "an offer cut short": ("Offer", lambda h: Offer(h.proxy.digest).encode()[:-1], "malformed"),
    "an offer with more behind it": ("Offer", lambda h: Offer(h.proxy.digest).encode() + b"x", "malformed"),
    "an offer that is a task": ("Offer", lambda h: h.task(1).encode(), "malformed"),
    "an offer of a proxy that nobody has": ("Offer", lambda h: Offer(bytes(32)).encode(), "unknown"),
    "an offer whose digest is a path": (
        "Offer",
        lambda h: b"GRO1" + b"../../../../../etc/passwd".ljust(32, b"/"),
        "unknown",
    ),
    # ---- proxies ----
    "no proxy": ("AcceptProxy", lambda h: b"", "malformed"),
    "a pickle for a proxy": ("AcceptProxy", lambda h: pickle.dumps(Trap()), "malformed"),
    "a proxy with NaN": ("AcceptProxy", proxy_file(x=NAN), "malformed"),
    "a proxy with a label that is no class": ("AcceptProxy", proxy_file(y=np.full(24, 7)), "malformed"),
    "a proxy of another shape": ("AcceptProxy", proxy_file(x=np.zeros((24, 9), np.float32)), "malformed"),
    "a proxy with one array more": ("AcceptProxy", proxy_file(z=np.zeros(3)), "malformed"),
    "a proxy in another type": ("AcceptProxy", proxy_file(x=np.zeros((24, 3))), "malformed"),
    "a proxy whose header is longer than the world": (
        "AcceptProxy",
        lambda h: b"\xff" * 8 + b"{}",
        "malformed",
    ),
    "a proxy whose header is nested": ("AcceptProxy", lambda h: with_header(DEEP), "malformed"),
    "a proxy beyond the largest message": ("AcceptProxy", lambda h: bytes(65 << 20), "resource_exhausted"),
    # ---- tasks that are no tasks ----
    "no task": ("Learn", lambda h: b"", "malformed"),
    "a pickle for a task": ("Learn", lambda h: pickle.dumps(Trap()), "malformed"),
    "noise for a task": ("Learn", lambda h: np.random.default_rng(0).bytes(5000), "malformed"),
    "a task cut short": ("Learn", lambda h: h.task(2).encode()[:-1], "malformed"),
    "a task with more behind it": ("Learn", lambda h: h.task(2).encode() + b"\0", "malformed"),
    "a task of another protocol": ("Learn", lambda h: b"GRT2" + h.task(2).encode()[4:], "malformed"),
    "a release for a task": ("Learn", lambda h: b"GRR1" + h.task(2).encode()[4:], "malformed"),
    "a billion cases": (
        "Learn",
        lambda h: forged(h, h.plan().canonical(), cases_P=b"", labels=b"")[:8] + b"\xff" * 200,
        "malformed",
    ),
    "cases twice": (
        "Learn",
        lambda h: forged(h, h.plan().canonical(), cases_P=np.zeros(24, "<i4").tobytes()),
        "malformed",
    ),
    "cases before the first": (
        "Learn",
        lambda h: forged(h, h.plan().canonical(), cases_P=np.arange(-1, 23, dtype="<i4").tobytes()),
        "malformed",
    ),
    "cases behind the last": (
        "Learn",
        lambda h: h.task(2, cases_P=np.arange(1, 25, dtype="i4")).encode(),
        "malformed",
    ),
    "soft labels that are NaN": (
        "Learn",
        lambda h: forged(h, h.plan().canonical(), labels=np.full((24, 2), np.nan, "<f2").tobytes()),
        "malformed",
    ),
    "soft labels that are infinite": (
        "Learn",
        lambda h: forged(h, h.plan().canonical(), labels=np.full((24, 2), np.inf, "<f2").tobytes()),
        "malformed",
    ),
    "soft labels that add up to more than one": (
        "Learn",
        lambda h: forged(h, h.plan().canonical(), labels=np.zeros((24, 2), "<f2").tobytes()),
        "malformed",
    ),
    "a plan with spaces": ("Learn", lambda h: forged(h, h.plan().canonical() + b" "), "malformed"),
    "a plan that is nested": ("Learn", lambda h: forged(h, DEEP), "malformed"),
    "a plan with a key twice": (
        "Learn",
        lambda h: forged(h, h.plan().canonical()[:-1] + b',"epsilon":0.1}'),
        "malformed",
    ),
    # ---- more than agreed ----
    "round 0": ("Learn", lambda h: forged(h, h.plan().canonical(), 0), "malformed"),
    "a round after the last": ("Learn", lambda h: forged(h, h.plan().canonical(), 4), "malformed"),
    "more rounds than agreed": ("Learn", planned(rounds=4), "plan-conflict"),
    "more steps than agreed": ("Learn", planned(steps_per_round=2), "plan-conflict"),
    "the same round with another task": ("Learn", lambda h: h.task(1, seed=5).encode(), "round-conflict"),
    "the same round with fewer cases": (
        "Learn",
        lambda h: h.task(
            1, cases_P=np.arange(23, dtype="i4"), log_soft_labels_PC=h.task(1).log_soft_labels_PC[:23]
        ).encode(),
        "round-conflict",
    ),
    "a replay": ("Learn", lambda h: h.task(1).encode(), "release"),
    # ---- less noise ----
    "no noise": ("Learn", planned(noise_multiplier=0.0), "malformed"),
    "ε = 0": ("Learn", planned(epsilon=0.0), "malformed"),
    "ε below 0": ("Learn", planned(epsilon=-1.0), "malformed"),
    "ε = NaN": ("Learn", lambda h: forged(h, changed(h.plan(), epsilon=float("nan"))), "malformed"),
    "ε without end": ("Learn", lambda h: forged(h, changed(h.plan(), epsilon=float("inf"))), "malformed"),
    "ε in words": ("Learn", planned(epsilon="1"), "malformed"),
    "ε above the cap": ("Learn", planned(epsilon=100.0), "not-allowed"),
    "δ = 1": ("Learn", planned(delta=1.0), "malformed"),
    "δ above a tenth": ("Learn", planned(delta=0.5), "malformed"),
    "δ above the cap": ("Learn", planned(delta=0.05), "not-allowed"),
    "clipping at 1e9": ("Learn", planned(clipping_norm=1e9), "malformed"),
    "clipping above the cap": ("Learn", planned(clipping_norm=1e5), "not-allowed"),
    "a sampling rate above 1": ("Learn", planned(sample_rate=1.5), "malformed"),
    "records instead of patients": ("Learn", planned(unit="record"), "not-allowed"),
    "a histogram that nobody allowed": ("Learn", planned(histogram_share=0.5), "not-allowed"),
    "a sharper codec than is allowed": ("Learn", planned(codec="fp32"), "not-allowed"),
    "a codec that doesn't exist": ("Learn", planned(codec="raw"), "malformed"),
    # ---- another proxy ----
    "a proxy digest that isn't one": ("Learn", planned(proxy_digest="../../etc/passwd"), "malformed"),
    "a proxy that nobody sent": ("Learn", planned(proxy_digest="0" * 64), "unknown-proxy"),
    "classes that the proxy doesn't have": (
        "Learn",
        lambda h: forged(h, changed(h.plan(), classes=3), classes=3),
        "malformed",
    ),
    # ---- heads ----
    "an invented head": ("Learn", lambda h: h.task(2, head=bytes([9]) * 32).encode(), "unknown-head"),
    # ---- code and paths ----
    "a module to import": ("Learn", planned(model="os:system"), "not-allowed"),
    "a module by a path": ("Learn", planned(model="../../tmp/evil:Net"), "not-allowed"),
    "a file for a model": ("Learn", planned(model="/etc/passwd"), "not-allowed"),
    "a wildcard for a model": ("Learn", planned(model="*"), "not-allowed"),
    "features that don't exist": ("Learn", planned(features="raw"), "malformed"),
    "a year of epochs": ("Learn", planned(epochs=10**9), "not-allowed|malformed"),
    "a learning rate without end": (
        "Learn",
        planned(learning_rate=float("inf")),
        "malformed",
    ),
    "a study that is a path": ("Learn", planned(study="../../../tmp/x"), "malformed"),
    "a study without a name": ("Learn", planned(study=""), "malformed"),
    "a study with a line break": ("Learn", planned(study="a\nb"), "malformed"),
    "a key that nobody knows": ("Learn", planned(export="patients.csv"), "malformed"),
    # ---- students ----
    "no student": ("Deliver", lambda h: b"", "malformed"),
    "a pickle for a student": ("Deliver", lambda h: pickle.dumps(Trap()), "malformed"),
    "a student without a card": ("Deliver", lambda h: save({"w": np.zeros(3)}), "malformed"),
    # ---- quotes ----
    "a quote for nothing": ("Quote", lambda h: b"", "malformed"),
    "a quote for a pickle": ("Quote", lambda h: pickle.dumps(Trap()), "malformed"),
    "a quote for ε above the cap": ("Quote", lambda h: h.plan(epsilon=500.0).canonical(), "not-allowed"),
    "a quote for another plan": ("Quote", lambda h: h.plan(rounds=9).canonical(), "plan-conflict"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_it_answers_by_a_rule_and_charges_nothing(attack, name):
    call, write, expected = REQUESTS[name]
    before = entries(attack)
    assert attack.ask(call, write(attack.hospital)) in expected.split("|")
    assert entries(attack) == before
    assert attack.served.health()
    assert not Path(Trap.trace).exists()


def test_there_are_enough_of_them():
    assert len(REQUESTS) >= 40


def entries(attack: Attack) -> list[str]:
    with attack.hospital.open_beside() as site:
        assert epsilon(site.ledger.events(), 1e-5)[0] <= CAP
        return [entry.kind for entry in site.ledger.entries()]


# ---- Stubborn couriers ------------------------------------------------------------------------------------


def test_an_old_head_is_known_and_an_extreme_but_allowed_task_makes_an_ordinary_release(attack):
    """What the policy allows is answered, however odd, with the length that the task calls for."""
    for number, changes in enumerate(
        (
            {"step_size": 1e6},
            {"step_size": 1e-300},
            {"temperature": 1e-300},
            {"temperature": 1e6, "alpha": 0.0},
            {"model": "mlp", "private_layers": "all", "learning_rate": 1e6, "epochs": 3},
            {"clipping_norm": 1e-6},
        )
    ):
        plan = changed(attack.hospital.plan(study=f"odd-{number}", epsilon=0.01), **changes)
        assert attack.ask("Learn", forged(attack.hospital, plan, 1)) == "release"


@pytest.mark.parametrize("clipping_norm", [1e-300, 0.51 * 2.0**-149, 0.99e-6])
def test_a_clipping_norm_that_float32_would_round_up_is_refused_and_charges_nothing(attack, clipping_norm):
    before = entries(attack)
    plan = changed(attack.hospital.plan(study="denormal", epsilon=0.01), clipping_norm=clipping_norm)
    assert attack.ask("Learn", forged(attack.hospital, plan, 1)) == "malformed"
    assert entries(attack) == before


def test_renamed_studies_run_into_the_lifetime_cap(attack):
    words = []
    for number in range(12):
        plan = attack.hospital.plan(study=f"renamed-{number}")
        words.append(attack.ask("Learn", attack.hospital.task(1, plan).encode()))
    assert words[-1] == "public release"
    entries(attack)


def test_plans_that_wait_for_a_person_fill_no_disk(attack, found_at, tmp_path):
    hospital = found_at(tmp_path / "south")
    hospital.amend({"approval = false": "approval = true"})
    with hospital.served() as served:
        other = Attack(hospital, served)
        for number in range(100):
            other.ask("Quote", hospital.plan(study=f"s{number}").canonical())
        assert len(list((hospital.folder / "state" / "asked").iterdir())) <= 64


def test_ten_thousand_requests_in_a_burst(attack):
    replay, noise = attack.hospital.task(1).encode(), b"GRT1" + bytes(500)
    before = entries(attack)
    with grpc.insecure_channel(attack.hospital.address, OPTIONS) as channel, ThreadPoolExecutor(64) as pool:
        stub = CustodianStub(channel)

        def burst(number: int) -> str:
            try:
                body = stub.Learn(Body(body=replay if number % 2 else noise), timeout=60).body
            except grpc.RpcError as error:
                return error.code().name.lower()
            return in_a_word(decode_answer(body))

        words = set(pool.map(burst, range(10_000)))
    assert words <= {"release", "malformed", "unavailable", "resource_exhausted"}
    assert attack.served.health()
    assert entries(attack) == before


def test_half_open_connections(attack):
    path = attack.hospital.address.removeprefix("unix:")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    openings = [b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + b"\0\x40\0\1\4\0\0\0\1", os.urandom(100)]
    held = []
    try:
        for number in range(200):
            half = socket.socket(socket.AF_UNIX)
            half.connect(path)
            half.sendall(openings[number % len(openings)])
            held.append(half)
        assert attack.served.health()
        assert attack.ask("Learn", attack.hospital.task(1).encode()) == "release"
    finally:
        for half in held:
            half.close()


def test_calls_that_never_send_what_they_announce(attack):
    """Their headers come, their message doesn't: on the wire a unary call is a stream of one."""
    over = threading.Event()

    def silence() -> Iterator[bytes]:
        over.wait()
        yield from ()

    channels = [grpc.insecure_channel(attack.hospital.address, [*OPTIONS, FRESH]) for _ in range(4)]
    try:
        for number in range(100):
            channels[number % 4].stream_unary("/grandrounds.v1.Custodian/Learn").future(silence())
        time.sleep(0.5)
        assert attack.served.health()
        assert attack.ask("Learn", attack.hospital.task(1).encode()) == "release"
    finally:
        over.set()
        for channel in channels:
            channel.close()


def test_calls_that_are_broken_off_leave_nothing_behind(attack):
    body = Body(body=attack.hospital.task(1).encode())
    with grpc.insecure_channel(attack.hospital.address, OPTIONS) as channel:
        stub = CustodianStub(channel)
        for _ in range(500):
            stub.Learn.future(body).cancel()
    assert attack.ask("Learn", attack.hospital.task(1).encode()) == "release"
