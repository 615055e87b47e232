"""What may be watched at a site: true, for the hospital alone, and timed by the clock."""

import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client import site_metrics
from client.policy import read_policy
from client.site_metrics import metrics_file, metrics_kept, queue_in


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(site_metrics, "EVERY", 0.02)


def told(path) -> dict[str, float]:
    families = text_string_to_metric_families(path.read_text())
    return {sample.name: sample.value for family in families for sample in family.samples}


def soon(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_file_follows_ledger_releases_and_queue_and_goes_with_the_custodian(hospital):
    path, queue = metrics_file(read_policy(hospital.policy_path)), [0]
    with hospital.open() as site, metrics_kept(site, lambda: queue[0]):
        soon(path.exists)
        first = told(path)
        assert first["grandrounds_site_lifetime_epsilon_left"] == 3.0
        assert first["grandrounds_site_last_release_timestamp_seconds"] == 0.0
        site.custodian.accept_proxy(hospital.proxy.to_bytes())
        release = site.custodian.learn(hospital.task().encode())
        soon(lambda: told(path)["grandrounds_site_lifetime_epsilon_spent"] > 0)
        # A release is made and hasn't left: nothing tells so.
        assert told(path)["grandrounds_site_releases_total"] == 0
        began, queue[0] = time.time(), 2
        site.releases.note("study-1", 1, release)
        soon(lambda: told(path)["grandrounds_site_releases_total"] == 1)
        last = told(path)
        assert last["grandrounds_site_last_release_timestamp_seconds"] == pytest.approx(began, abs=5)
        assert last["grandrounds_site_queue"] == queue_in(site.policy) == 2
        spent = site.ledger.spending(1e-5)
        assert last["grandrounds_site_lifetime_epsilon_spent"] == spent.lifetime.epsilon
        assert last["grandrounds_site_lifetime_epsilon_left"] == 3.0 - spent.lifetime.epsilon
        assert last["grandrounds_site_study_epsilon_left"] == 1.0 - spent.studies["study-1"].epsilon
    assert not path.exists() and queue_in(site.policy) is None


def test_it_tells_when_certificates_end(hospital, certify, tmp_path):
    certify(tmp_path)
    shutil.copy(tmp_path / "courier.crt", hospital.folder / "state")
    path = metrics_file(read_policy(hospital.policy_path))
    with hospital.open() as site, metrics_kept(site, lambda: 0):
        soon(path.exists)
        ends = told(path)["grandrounds_site_certificate_end_timestamp_seconds"]
    assert ends - time.time() == pytest.approx(86400, abs=60)


def test_what_a_killed_custodian_left_tells_no_queue(hospital):
    policy = read_policy(hospital.policy_path)
    kept = hospital.folder / "kept"
    with hospital.open() as site, metrics_kept(site, lambda: 1):
        soon(lambda: queue_in(policy) == 1)
        shutil.copy(metrics_file(policy), kept)
    shutil.copy(kept, metrics_file(policy))
    time.sleep(0.1)
    assert queue_in(policy) is None


def test_the_couriers_group_cannot_read_it_and_another_can(hospital):
    with hospital.open() as site:
        with metrics_kept(site, lambda: 0):
            path = metrics_file(site.policy)
            soon(path.exists)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        # On TCP no group reaches the custodian, and the folder's may be the collector's.
        service = site.policy.service.model_copy(update={"listen": "tcp:127.0.0.1:7443"})
        elsewhere = replace(site, policy=site.policy.model_copy(update={"service": service}))
        before = os.umask(0o077)  # as the custodian's unit has it
        try:
            with metrics_kept(elsewhere, lambda: 0):
                soon(path.exists)
                assert stat.S_IMODE(path.stat().st_mode) == 0o640
        finally:
            os.umask(before)


def test_the_policy_may_name_another_place(hospital):
    place = hospital.folder / "collector"
    place.mkdir()
    hospital.amend({'metrics = ""': 'metrics = "collector/north.prom"'})
    with hospital.open() as site, metrics_kept(site, lambda: 0):
        soon((place / "north.prom").exists)


@pytest.mark.parametrize("wrong", ["no such folder", "the ledger"])
def test_without_metrics_it_goes_on_and_says_why(hospital, caplog, wrong):
    if wrong == "no such folder":
        hospital.amend({'metrics = ""': 'metrics = "nowhere/north.prom"'})
    with hospital.open() as site, metrics_kept(site, lambda: 0):
        path = metrics_file(site.policy)
        if wrong == "the ledger":
            soon(path.exists)
            (hospital.folder / "state" / "ledger.db").rename(hospital.folder / "elsewhere")
        soon(lambda: "no metrics: " in caplog.text)
        soon(lambda: not path.exists())
    assert ("nowhere" if wrong == "no such folder" else "older-copy") in caplog.text
