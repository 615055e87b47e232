"""A run's metrics, for Prometheus to fetch from this machine.

They are taken from what is noted of each round anyhow (`server.results`), and served on loopback where
`metrics-port` names a port. Nothing here is learned from a site that its answers did not say.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, start_http_server

from common.errors import ConfigError
from common.summary import Round
from server.admission import Admitted, rule_in
from server.stragglers import Late

LOOPBACK: Final = "127.0.0.1"
SECONDS: Final = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Bounds of the histogram of rounds."""


class RunMetrics:
    """What is counted in one run. Counters begin with this process, also where a run goes on."""

    def __init__(self) -> None:
        """Start at nothing, in a registry of its own."""
        self.registry = CollectorRegistry()

        def gauge(name: str, says: str, *labels: str) -> Gauge:
            return Gauge(f"grandrounds_{name}", says, labels, registry=self.registry)

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"grandrounds_{name}", says, labels, registry=self.registry)

        self._run = Info("grandrounds_run", "The run.", registry=self.registry)
        self._planned = gauge("rounds_planned", "Rounds of the plan.")
        self._round = gauge("round", "The last round that is over.")
        self._ended = gauge("last_round_timestamp_seconds", "When it ended; 0 if none did.")
        self._seen = gauge("sites_seen", "Sites that have taken part in the roll so far.")
        self._answered = gauge("sites_answered", "Sites that the last round's ensemble is made of.")
        self._last = gauge("site_last_round", "The last round whose ensemble has the site.", "site")
        self._payload = counter("payload_bytes", "Bytes of releases.", "site")
        self._wire = counter("wire_bytes", "Bytes of whole answers.", "site")
        self._left_out = counter("left_out", "Rounds without the site.", "site")
        self._refusals = counter("refusals", "Refusals of sites and by them.", "rule")
        self._late = counter("late_answers", "Answers to rounds that were over, refused.", "site")
        self._seconds = Histogram(
            "grandrounds_round_seconds",
            "From one round's end to the next one's.",
            buckets=SECONDS,
            registry=self.registry,
        )

    def begin(self, run: str, rounds: int, sites: int, held: Iterable[Round]) -> None:
        """Tell which run this is, and what of it is over already."""
        self._run.info({"run": run})
        self._planned.set(rounds)
        self._seen.set(sites)
        for line in held:
            self._stand(line)

    def observe(self, line: Round, admitted: Admitted, sites: int, seconds: float) -> None:
        """Count one round.

        Args:
            line: What is noted of it.
            admitted: What came of its answers.
            sites: Sites that have taken part in the roll so far.
            seconds: How long it took.
        """
        self._stand(line)
        self._ended.set(time.time())
        self._seen.set(sites)
        self._seconds.observe(seconds)
        for site, size in admitted.payload_bytes.items():
            self._payload.labels(site).inc(size)
        for site, size in admitted.wire_bytes.items():
            self._wire.labels(site).inc(size)
        for one in line.left_out:
            self._left_out.labels(one.site).inc()
            if (rule := rule_in(one.reason)) is not None:
                self._refusals.labels(rule).inc()

    def refused_late(self, answers: Iterable[Late]) -> None:
        """Count answers that came after their round."""
        for one in answers:
            self._late.labels(one.site).inc()

    def _stand(self, line: Round) -> None:
        self._round.set(line.round)
        self._answered.set(len(line.answered))
        for site in line.answered:
            self._last.labels(site).set(line.round)


@contextmanager
def metrics_served(port: int) -> Iterator[RunMetrics]:
    """Serve a run's metrics at `http://127.0.0.1:port/metrics` while it lasts; with port 0 nowhere.

    Raises:
        ConfigError: if the port can't be had.
    """
    metrics = RunMetrics()
    if not port:
        yield metrics
        return
    try:
        server, thread = start_http_server(port, LOOPBACK, metrics.registry)
    except OSError as error:
        expected = f"a port of {LOOPBACK} that can be had ({error.strerror or error})"
        raise ConfigError("run config", "metrics-port", port, expected) from None
    try:
        yield metrics
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
