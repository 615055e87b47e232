"""The site at one look: true, and nobody is kept from serving by it."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from client.policy import read_policy
from client.site_metrics import metrics_file, metrics_kept
from client.status import status_of
from common.messages import Greeting, Offer, Release, Rule, decode_answer


def shown(hospital, *options: str) -> tuple[int, dict]:
    done = hospital.run("status", "--json", *options)
    assert not done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.mark.slow
def test_it_says_what_a_served_site_has_spent_and_sent_and_lets_it_serve(hospital):
    hospital.amend({"every-seconds = 0.0": "every-seconds = 4.0"})
    with hospital.served():
        connection = hospital.connect()
        connection.offer(Offer(hospital.proxy.digest).encode())
        connection.accept_proxy(hospital.proxy.to_bytes())
        began = datetime.now(UTC)
        assert isinstance(decode_answer(connection.learn(hospital.task().encode())), Release)
        code, status = shown(hospital)
        assert code == 0
        assert (status["site"], status["serving"], status["ledger"]["verified"]) == ("north", True, True)
        assert status["queue"] is not None
        standing = status["standing"]
        assert 0.97 < standing["lifetime"]["epsilon"] <= 1.0
        assert standing["lifetime"]["left"] == 3.0 - standing["lifetime"]["epsilon"]
        assert standing["studies"].keys() == {"study-1"} and standing["plans_waiting"] == 0
        last = standing["last_release"]
        assert (last["study"], last["round"], standing["releases"]) == ("study-1", 1, 1)
        assert datetime.fromisoformat(last["when"]) >= began + timedelta(seconds=4)
        assert isinstance(decode_answer(connection.offer(Offer(hospital.proxy.digest).encode())), Greeting)
    code, status = shown(hospital)
    assert (code, status["serving"], status["queue"]) == (1, False, None)
    assert status["standing"] == standing


def test_a_table_for_people(hospital):
    hospital.amend({"approval = false": "approval = true"})
    with hospital.open() as site:
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        assert decode_answer(site.custodian.learn(hospital.task().encode())).rule is Rule.NOT_APPROVED
        site.asked.keep(hospital.plan())
    done = hospital.run("status")
    assert done.returncode == 1  # nobody serves
    for line in ("NOT SERVING", "lifetime 3, study 1, run 1", "verified", "that wait for approval: 1"):
        assert line in done.stdout


def test_certificates_that_end_soon_are_warned_of(hospital, certify, tmp_path):
    assert shown(hospital)[1]["certificates"] == []  # it joined no federation
    certify(tmp_path)  # for a day
    for name in ("ca.crt", "courier.crt"):
        shutil.copy(tmp_path / name, hospital.folder / "state" / name)
    told = {one["of"]: (one["days_left"], one["soon"]) for one in shown(hospital)[1]["certificates"]}
    assert told == {"courier": (0, True), "authority": (0, True)}
    assert "WARNING, ask the coordinator for another kit: courier: until" in hospital.run("status").stdout


def test_however_often_one_looks_a_custodian_that_starts_finds_its_place_free(hospital):
    policy, over = read_policy(hospital.policy_path), threading.Event()

    def look() -> int:
        looks = 0
        while not over.is_set():
            assert not status_of(policy).findings
            looks += 1
        return looks

    with ThreadPoolExecutor() as pool:
        looking = pool.submit(look)
        for _ in range(40):
            with hospital.open() as site:
                site.ledger.approve("study", bytes(32), "", "Dr. Who", "")
        over.set()
        assert looking.result() > 0


def test_of_a_custodian_on_tcp_fresh_metrics_say_that_it_serves(hospital):
    with hospital.open() as site:
        listen = {"listen": "tcp:127.0.0.1:7443"}
        policy = site.policy.model_copy(update={"service": site.policy.service.model_copy(update=listen)})
        with metrics_kept(replace(site, policy=policy), lambda: 3):
            while not metrics_file(policy).exists():
                time.sleep(0.01)
            status = status_of(policy)
            assert (status.serving, status.queue, status.well) == (True, 3, True)
        assert not status_of(policy).serving


def test_a_ledger_that_cannot_be_trusted_is_shown_with_the_rest(hospital):
    (hospital.folder / "ledger.anchor").unlink()
    code, status = shown(hospital)
    assert code == 1 and not status["ledger"]["verified"] and status["standing"] is None
    assert "anchor-missing" in status["ledger"]["findings"][0]
    assert "FAIL" in hospital.run("status").stdout


def test_without_a_policy_there_is_nothing_to_see(hospital):
    hospital.policy_path.unlink()
    done = hospital.run("status")
    assert done.returncode == 2 and "no policy, no service" in done.stderr and not done.stdout
