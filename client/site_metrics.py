"""The custodian's metrics: a small file in Prometheus' text format, for a textfile collector on the machine.

A custodian has no network, so nothing is served; who may read the file may watch the site. That is the
hospital and never the courier: other studies' spending is none of a coordinator's business. The file is for
its owner and, unless it is the courier's, for the group of its folder.

It is written by the clock alone, every `EVERY` seconds, so that its time tells nothing. What it holds changes
when a task is charged, which comes before any record is read, and when a release leaves, which is on the beat
(`client.schedule`).
"""

import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prometheus_client import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.parser import text_string_to_metric_families

from client.policy import ServedPolicy
from client.served import ServedSite, certificates
from client.standing import Standing, standing_of
from common.certificates import Term, terms
from common.errors import UserError
from common.runs import write_whole

EVERY = 15.0
"""Seconds between two writings: as often as Prometheus looks by default."""
QUEUE = "grandrounds_site_queue"
ENDS = "grandrounds_site_certificate_end_timestamp_seconds"

log = logging.getLogger("grandrounds.custodian")


def metrics_file(policy: ServedPolicy) -> Path:
    """Where the metrics lie."""
    return Path(policy.metrics or Path(policy.state) / "metrics.prom")


@dataclass(frozen=True)
class Exposition:
    """What is told of a site; a collector of `prometheus_client`'s.

    Attributes:
        policy: The site's.
        standing: Where it stands.
        queue: Calls that are worked on or wait.
        certificates: How long those are good that the site can't do without.
    """

    policy: ServedPolicy
    standing: Standing
    queue: int
    certificates: Sequence[Term]

    def collect(self) -> Iterator[Metric]:
        """Tell metric by metric."""
        policy, standing, gauge = self.policy, self.standing, GaugeMetricFamily
        labels = {"site": policy.site, "unit": policy.data.unit, "delta": repr(policy.budget.delta)}
        yield InfoMetricFamily("grandrounds_site", "The site.", labels)
        lifetime, spent = standing.lifetime, standing.lifetime.guarantee.epsilon
        yield gauge("grandrounds_site_lifetime_epsilon_cap", "The policy's lifetime-epsilon.", lifetime.cap)
        yield gauge("grandrounds_site_lifetime_epsilon_spent", "ε that is spent or reserved.", spent)
        yield gauge("grandrounds_site_lifetime_epsilon_left", "ε that is left.", lifetime.left)
        studies = gauge("grandrounds_site_study_epsilon_left", "ε left to a study.", labels=["study"])
        for name, study in standing.studies.items():
            studies.add_metric([name], study.left)
        yield studies
        yield gauge(QUEUE, "Calls that are worked on or wait.", self.queue)
        yield gauge("grandrounds_site_plans_waiting", "Plans to approve.", standing.plans_waiting)
        yield CounterMetricFamily("grandrounds_site_releases", "Releases that left.", standing.releases)
        ends = gauge(ENDS, "When a certificate ends, in Unix time.", labels=["certificate"])
        for one in self.certificates:
            ends.add_metric([one.of], one.ends.timestamp())
        yield ends
        last = standing.last_release
        sent = datetime.fromisoformat(last.when).timestamp() if last else 0.0
        says = "When the last release left; 0 if none did."
        yield gauge("grandrounds_site_last_release_timestamp_seconds", says, sent)


def queue_in(policy: ServedPolicy) -> int | None:
    """The queue of the custodian that serves, or None where its metrics are missing or out of date."""
    path = metrics_file(policy)
    try:
        if time.time() - path.stat().st_mtime > 3 * EVERY:
            return None
        families = list(text_string_to_metric_families(path.read_text()))
    except (OSError, ValueError):
        return None
    return next((int(one.samples[0].value) for one in families if one.name == QUEUE), None)


@contextmanager
def metrics_kept(site: ServedSite, queue: Callable[[], int]) -> Iterator[None]:
    """Keep the file up to date as long as a custodian serves, and none where none does.

    Args:
        site: The site that is served.
        queue: Counts calls that are worked on or wait.
    """
    over, path = threading.Event(), metrics_file(site.policy)

    def keep() -> None:
        while True:
            try:
                standing = standing_of(site.policy, site.ledger, site.releases, site.asked)
                ends = terms(certificates(site.policy))
                told = generate_latest(Exposition(site.policy, standing, queue(), ends))
                write_whole(path, told, _mode(site.policy, path))
            except UserError as error:
                log.error("no metrics: %s", error)
                path.unlink(missing_ok=True)
            if over.wait(EVERY):
                return

    thread = threading.Thread(target=keep, name="metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=1.0)
        path.unlink(missing_ok=True)


def _mode(policy: ServedPolicy, path: Path) -> int:
    """Who may read the file: its group only if the socket, and so the courier, is another's."""
    kind, _, address = policy.service.listen.partition(":")
    shared = kind == "unix" and _group_in(path.parent) == _group_in(Path(address).parent)
    return 0o600 if shared else 0o640


def _group_in(folder: Path) -> int:
    """Group of a file that this process makes in a folder."""
    try:
        found = folder.stat()
    except OSError as error:
        raise UserError(f"metrics: {folder}: {error.strerror}") from None
    return found.st_gid if found.st_mode & stat.S_ISGID else os.getegid()
