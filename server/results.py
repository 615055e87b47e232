"""What the coordinator writes down: a line a round while it runs, and at the end the folder of results.

The folder is built aside (`common.runs`) and gets its name only when it is whole, so that nobody takes half
a result for one.
"""

import logging
import resource
import time
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from common.config import RunConfig
from common.datasets import PublicData
from common.logs import about
from common.metrics import headline_metric
from common.plan import Plan
from common.rounding import at_most
from common.runs import RunFolder, disk_errors
from common.summary import (
    Bytes,
    LeftOut,
    Metrics,
    PublicSizes,
    Results,
    Round,
    SitePrivacy,
    Summary,
    statistic,
    write,
)
from server.admission import Admitted
from server.metrics import RunMetrics
from server.report.page import render

log = logging.getLogger("flwr")  # shows where a Flower user looks

ROUNDS = "rounds.jsonl"
REPORTED = ("auroc", "accuracy")
"""Metrics of a summary."""
PACKAGES = ("flwr", "torch", "opacus", "dp-accounting", "numpy")


def metrics_of(scores: Mapping[str, float]) -> Metrics:
    """Turn one seed's scores into statistics, those that are fractions."""
    return {name: statistic([scores[name]]) for name in REPORTED if name in scores}


def write_results(summary: Summary, folder: Path) -> None:
    """Write `summary.json` and `report.html`."""
    write(summary, folder / "summary.json")
    with disk_errors(folder / "report.html"):
        (folder / "report.html").write_text(render(summary), encoding="utf-8")


def in_words(line: Round) -> str:
    """One round in a few words: metrics, the ε spent, who was left out."""
    metrics = ", ".join(f"{name} {100 * value:.1f}" for name, value in line.metrics.items())
    without = f", without {', '.join(one.site for one in line.left_out)}" if line.left_out else ""
    return f"{metrics}, ε {at_most(line.epsilon_spent or 0.0, 3)}{without}"


class Record(BaseModel):
    """What has been noted of a run so far, for its summary.

    Attributes:
        rounds: A line a round.
        payload: Bytes of every release.
        wire: Bytes of every whole answer.
        plans: Each site's plan, once it has taken part in the roll.
        validation: The teacher's log-loss on public validation cases, round by round, if `patience` asks.
        charged: In how many rounds each site may have charged its budget.
        outlying: Sum of each site's outlier scores, if `outlier-weights` is the rule.
        seconds: How long the run had worked before it broke off.
        teacher_alone: Scores of the teacher before the first round.
    """

    model_config = ConfigDict(extra="forbid")

    rounds: list[Round] = []
    payload: list[int] = []
    wire: list[int] = []
    plans: dict[str, Plan] = {}
    charged: dict[str, int] = {}
    outlying: dict[str, float] = {}
    validation: list[float] = []
    seconds: float = 0.0
    teacher_alone: Metrics | None = None


class Journal:
    """The rounds so far, kept in a record and, a line each, in `rounds.jsonl`."""

    def __init__(
        self, folder: RunFolder, config: RunConfig, plan: Plan, record: Record, metrics: RunMetrics
    ) -> None:
        """Start the clock, or let it run on."""
        self._metrics = metrics
        self._folder = folder.path
        self._config = config
        self._plan = plan
        self._record = record
        self._started = time.monotonic() - record.seconds
        if record.rounds:  # a run that goes on: its file may have a line more than was kept
            self._write("w", record.rounds)
        metrics.begin(plan.study, plan.rounds, len(record.plans), record.rounds)

    def note(
        self,
        round_number: int,
        admitted: Admitted,
        asked: Collection[str],
        absent: Mapping[str, str],
        scores: Mapping[str, float],
    ) -> None:
        """Write one round down.

        Args:
            round_number: Which.
            admitted: What came of it.
            asked: Sites that were sent a task; who doesn't say that it took no step may have charged.
            absent: Why others weren't.
            scores: The teacher's on the public test cases.
        """
        record = self._record
        sizes = list(admitted.payload_bytes.values())
        record.payload += sizes
        record.wire += admitted.wire_bytes.values()
        for site in set(asked) - admitted.idle:
            record.charged[site] = record.charged.get(site, 0) + 1
        line = Round(
            seed=self._config.seed,
            round=round_number,
            metrics={name: scores[name] for name in REPORTED if name in scores},
            epsilon_spent=self._epsilon_spent(),
            hold_out_accuracy=dict(admitted.hold_out),
            answered=admitted.answered,
            left_out=tuple(
                LeftOut(site=site, reason=why) for site, why in {**absent, **admitted.left_out}.items()
            ),
            bytes_up=_bytes(sizes),
        )
        record.rounds.append(line)
        before, record.seconds = record.seconds, time.monotonic() - self._started
        self._write("a", [line])
        self._metrics.observe(line, admitted, len(record.plans), record.seconds - before)
        with about(round=round_number):
            log.info("round %d of %d: %s", round_number, self._plan.rounds, in_words(line))
            for one in line.left_out:
                with about(site=one.site):
                    log.info("round %d without %s: %s", round_number, one.site, one.reason)

    def _epsilon_spent(self) -> float:
        """The greatest ε that any site may have spent so far."""
        spent = {(self._record.plans[site], rounds) for site, rounds in self._record.charged.items()}
        return max((plan.guarantee(rounds).epsilon for plan, rounds in spent), default=0.0)

    def _write(self, mode: str, lines: Iterable[Round]) -> None:
        path = self._folder / ROUNDS
        with disk_errors(path), path.open(mode) as file:
            file.writelines(line.model_dump_json() + "\n" for line in lines)

    def finish(self, public: PublicData, declared_sizes: Mapping[str, int], results: Results) -> None:
        """Sum the run up: `summary.json` and `report.html`."""
        write_results(self._summary(public, declared_sizes, results), self._folder)

    def _summary(self, public: PublicData, declared_sizes: Mapping[str, int], results: Results) -> Summary:
        classes = public.proxy.preprocessing.classes
        labelled = int((public.proxy.y >= 0).sum())
        return Summary(
            scenario=self._config.scenario,
            seeds=(self._config.seed,),
            results=results,
            privacy=tuple(self._privacy(site) for site in sorted(self._record.plans)),
            bytes_up_per_site_per_round=_bytes(self._record.payload),
            wire_bytes_up_per_site_per_round=_bytes(self._record.wire),
            rounds=len(self._record.rounds),
            rounds_planned=self._plan.rounds,
            seconds=time.monotonic() - self._started,
            peak_memory_mib=peak_memory_mib(),
            method=self._config.method,
            run_id=self._plan.study,
            finished=datetime.now(UTC),
            headline_metric=headline_metric(classes),
            classes=classes,
            public=PublicSizes(
                proxy=len(public.proxy),
                proxy_labelled=labelled,
                validation=len(public.validation.y),
                test=len(public.test.y),
                by_assumption=public.by_assumption,
            ),
            declared_sizes={site: declared_sizes[site] for site in sorted(self._record.plans)},
            proxy_digests=(self._plan.proxy_digest,),
            run_config=self._config.flat(),
            history=tuple(self._record.rounds),
            versions={name: version(name) for name in PACKAGES},
        )

    def _privacy(self, site: str) -> SitePrivacy:
        """A site's ε is that of its whole plan, also if the run stopped early or its answers were lost.

        Only a site that said in every round that it took no private step has spent nothing.
        """
        plan = self._record.plans[site]
        guarantee = plan.guarantee()
        return SitePrivacy(
            site=site,
            epsilon=guarantee.epsilon if site in self._record.charged else 0.0,
            delta=guarantee.delta,
            unit=guarantee.unit,
            adjacency=guarantee.adjacency,
            accountant=guarantee.accountant,
            horizon="run",
            noise_multiplier=plan.noise_multiplier(),
            clipping_norm=plan.clipping_norm,
        )


def _bytes(sizes: list[int]) -> Bytes:
    return Bytes(mean=sum(sizes) / len(sizes) if sizes else 0.0, max=max(sizes, default=0))


def peak_memory_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
