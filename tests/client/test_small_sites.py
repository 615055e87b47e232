"""Small sites: one with n patients and the same with n − 1 differ in nothing but noisy logits.

The length of a payload follows from the logits in it. Nothing else of a message may differ, its length
included.
"""

import time
from dataclasses import replace

import numpy as np
import pytest

from client.quote import quote
from common.codec import CODECS
from common.messages import Offer, Release, Rule, decode_answer

OPAQUE = {"scale": 1.0, "payload": b"", "head": bytes(32), "counts": ()}
"""What of a release may differ: noisy logits and counts, and a seal that says nothing without the key."""


def conversation(hospital, site, **plan_changes) -> list[object]:
    """Everything a coordinator can get to hear, with the noisy parts taken out."""
    custodian, plan = site.custodian, hospital.plan(**plan_changes)
    heard: list[object] = [
        decode_answer(custodian.offer(Offer(hospital.proxy.digest).encode())),
        decode_answer(custodian.accept_proxy(hospital.proxy.to_bytes())),
        vars(quote(site.policy, site.ledger, plan).price.run),
    ]
    for round_number in (1, 2, 3):
        body = custodian.learn(hospital.task(round_number, plan).encode())
        release = decode_answer(body)
        assert isinstance(release, Release)
        heard += [replace(release, **OPAQUE), len(body) - len(release.payload), len(release.counts)]
        # What the payload's length could tell is in its logits already: it is written from them alone.
        _, again = CODECS[plan.codec].encode(release.logits())
        heard += [len(release.payload) - len(again), bool(release.logits().any())]
    for task in (
        hospital.task(1, plan, seed=9),
        hospital.task(2, hospital.plan(rounds=9)),
        hospital.task(1, plan),
    ):
        answer = decode_answer(custodian.learn(task.encode()))
        heard.append(answer.rule if not isinstance(answer, Release) else replace(answer, **OPAQUE))
    heard.append(decode_answer(custodian.deliver(b"")))
    heard.append(vars(quote(site.policy, site.ledger, hospital.plan(study="next")).price.lifetime))
    return heard


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"codec": "int2"},
        {"sample_rate": 0.3, "steps_per_round": 2},
        {"histogram_share": 0.3, "hold_out_share": 0.3},
    ],
)
@pytest.mark.parametrize("n", [1, 2, 5, 60])
def test_one_patient_more_or_less_shows_in_the_logits_alone(found_at, patients_of, tmp_path, n, changes):
    heard = []
    for count in (n, n - 1):
        hospital = found_at(tmp_path / f"{count}", patients_of(60).take(np.arange(count)))
        hospital.amend({"purchases = []": 'purchases = ["*"]', "hold-out = 0.0": "hold-out = 0.3"})
        with hospital.open() as site:
            heard.append(conversation(hospital, site, **changes))
    assert heard[0] == heard[1]


def test_the_logits_do_differ(found_at, patients_of, tmp_path):
    """The test above would also pass if nobody learned anything."""
    payloads = []
    for count in (60, 0):
        hospital = found_at(tmp_path / f"{count}", patients_of(60).take(np.arange(count)))
        hospital.amend(
            {
                "run-epsilon = 1.0": "run-epsilon = 500.0",
                "lifetime-epsilon = 3.0": "lifetime-epsilon = 5000.0",
            }
        )
        hospital.amend(
            {
                "study-epsilon = 1.0": "study-epsilon = 500.0",
                "noise-multiplier = 0.5": "noise-multiplier = 0.001",
            }
        )
        with hospital.open() as site:
            site.custodian.accept_proxy(hospital.proxy.to_bytes())
            plan = hospital.plan(epsilon=500.0, step_size=4.0)
            payloads.append(decode_answer(site.custodian.learn(hospital.task(1, plan).encode())).logits())
    assert np.abs(payloads[0]).mean() > 3 * np.abs(payloads[1]).mean()


@pytest.mark.slow
def test_their_answers_leave_on_the_same_beat(found_at, patients_of, tmp_path):
    took = []
    for count in (3000, 1):
        hospital = found_at(tmp_path / f"{count}", patients_of(count))
        hospital.amend({"every-seconds = 0.0": "every-seconds = 1.0"})
        with hospital.served():
            connection = hospital.connect()
            connection.accept_proxy(hospital.proxy.to_bytes())
            connection.learn(hospital.task(1).encode())
            began = time.monotonic()
            assert isinstance(decode_answer(connection.learn(hospital.task(2).encode())), Release)
            took.append(time.monotonic() - began)
            refusal = decode_answer(connection.learn(hospital.task(2, seed=3).encode()))
            assert refusal.rule is Rule.ROUND_CONFLICT
    assert took == pytest.approx([1.0, 1.0], abs=0.25)
