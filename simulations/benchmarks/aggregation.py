"""What a round costs the server in memory and time, as the number of sites grows.

    python -m simulations.benchmarks.aggregation [--sites 10,1000] [--rules mean,…] [--json]

A crowd of sites answers one task on 10,000 cases with 10 classes. Each release is made when it is pulled, and
goes the way of a real one: Flower's message, admission, ensemble. Every line is a process of its own, so
that its peak memory is its own; `grows` is what it grew by since the server was ready to send.

The bandwidth of the `mean` is that of its sum alone, once the values are decoded: each value is read (4
bytes) and a total read and written (8 + 8). It stands beside what this machine does in the same run with
`total += values` on arrays too large for any cache.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np
from flwr.app import Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from rich.console import Console
from rich.table import Table

from common.codec import CODECS
from common.config import Aggregation, RunConfig
from common.envelope import seal, unseal
from common.messages import Release, Task
from common.plan import plan_of
from server.admission import Member
from server.aggregation import Contribution, Moment, open_ensemble
from server.correspondence import ask_round

CASES, CLASSES = 10_000, 10
MOST_MIB = 1024.0
"""What a round with 1,000 sites may take in all, under a streaming rule."""
LEAST_SHARE = 0.5
"""Of the memory bandwidth, for the sum."""
STREAMS = ("mean",)
DECLARED_SIZE = 100


class Crowd(Grid):
    """Nodes that answer a task when their reply is pulled, with Gaussian values.

    Args:
        sites: How many there are.
    """

    def __init__(self, sites: int) -> None:
        """Draw the values that all sites send, each under a scale of its own."""
        self._tasks: dict[str, Message] = {}
        self._nodes = list(range(2, 2 + sites))
        values_PC = np.random.default_rng(0).normal(size=(CASES, CLASSES)).astype(np.float32)
        self._scale, self._payload = CODECS["int8"].encode(values_PC)

    def set_run(self, run: Run) -> None:
        """There is one run."""

    @property
    def run(self) -> Run:
        """The run."""
        return Run.create_empty(1)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Build a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages, of which only the digest of the task is kept."""
        ids = []
        for message in messages:
            message_id = f"{len(self._tasks):064x}"
            message.metadata.__dict__["_message_id"] = message_id
            task = Task.decode(unseal(message.content))
            empty = Message(seal(task.digest() + bytes.fromhex(task.plan.proxy_digest)), 2, "train.learn")
            empty.metadata.__dict__["_message_id"] = message_id
            self._tasks[message_id] = empty
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Make the replies to these messages."""
        return [self._reply(self._tasks.pop(one)) for one in message_ids if one in self._tasks]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Take messages and answer them."""
        del timeout
        return list(self.pull_messages(self.push_messages(messages)))

    def _reply(self, asked: Message) -> Message:
        digests = unseal(asked.content)
        release = Release(
            task_digest=digests[:32],
            proxy_digest=digests[32:],
            round=1,
            steps=1,
            codec="int8",
            scale=self._scale,
            payload=self._payload,
            cases=CASES,
            classes=CLASSES,
        )
        return Message(seal(release.encode()), reply_to=asked)


@dataclass(frozen=True)
class Round:
    """One round with one number of sites.

    Attributes:
        peak_mib: Of the whole process.
        grown_mib: Since it was ready to send.
        seconds: From the first message to the ensemble.
    """

    rule: str
    sites: int
    peak_mib: float
    grown_mib: float
    seconds: float


@dataclass(frozen=True)
class Bandwidth:
    """GB/s of the streaming sum, of `total += values` in memory, and their ratio."""

    sum: float
    memory: float
    share: float


def hold_round(rule: str, sites: int) -> Round:
    """Hold one round of a rule in this process."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    config = RunConfig.from_run_config({"aggregation.rule": rule})
    plan = plan_of(config, study="crowd", proxy_digest=bytes(32), classes=CLASSES)
    soft_PC = np.full((CASES, CLASSES), -np.log(CLASSES), dtype=np.float16)
    task = Task(plan, 1, np.arange(CASES, dtype=np.int32), soft_PC)
    grid = Crowd(sites)
    members = {f"site-{k}": Member(2 + k, f"site-{k}", DECLARED_SIZE, plan) for k in range(sites)}
    before, started = _peak_mib(), time.perf_counter()
    ensemble = open_ensemble(rule, Moment(Aggregation(), float(DECLARED_SIZE * sites)))
    admitted = ask_round(grid, dict.fromkeys(members, task), members, {}, 3600.0, ensemble.hear)
    ensemble.combined()
    if len(admitted.answered) != sites:
        raise RuntimeError(f"{len(admitted.answered)} of {sites} sites were heard: {admitted.left_out}")
    seconds = time.perf_counter() - started
    return Round(rule, sites, _peak_mib(), _peak_mib() - before, seconds)


def measure_bandwidth() -> Bandwidth:
    """Time the mean's sum over decoded releases, and plain sums beside it."""
    values_KPC = [
        np.random.default_rng(k).normal(size=(CASES, CLASSES)).astype(np.float32) for k in range(40)
    ]
    large, total = np.ones(25_000_000), np.zeros(25_000_000)
    folds, plain = [], []
    for _ in range(7):
        ensemble = open_ensemble("mean", Moment(Aggregation(), float(DECLARED_SIZE * len(values_KPC))))
        ensemble.hear(Contribution("first", values_KPC[0], 0.0))  # takes its memory
        started = time.perf_counter()
        for k, values_PC in enumerate(values_KPC):
            ensemble.hear(Contribution(str(k), values_PC, float(DECLARED_SIZE)))
        folds.append(time.perf_counter() - started)
        started = time.perf_counter()
        np.add(total, large, out=total)
        plain.append(time.perf_counter() - started)
    ours = len(values_KPC) * CASES * CLASSES * (4 + 8 + 8) / min(folds) / 1e9
    memory = large.size * (8 + 8 + 8) / min(plain) / 1e9
    return Bandwidth(ours, memory, ours / memory)


def met(rounds: list[Round], bandwidth: Bandwidth) -> bool:
    """Whether streams stay in their memory and the sum is fast enough."""
    small = all(one.peak_mib <= MOST_MIB for one in rounds if one.rule in STREAMS)
    return small and bandwidth.share >= LEAST_SHARE


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _as_table(rounds: list[Round], bandwidth: Bandwidth) -> Table:
    table = Table(title=f"One round on {CASES:,} cases × {CLASSES} classes")
    for column in ("rule", "sites", "peak memory", "grows by", "time"):
        table.add_column(column, justify="left" if column == "rule" else "right")
    for one in rounds:
        memory = f"{one.peak_mib:.0f} MiB", f"{one.grown_mib:.0f} MiB"
        table.add_row(one.rule, f"{one.sites:,}", *memory, f"{one.seconds:.1f} s")
    table.caption = (
        f"sum of the mean: {bandwidth.sum:.1f} GB/s, memory: {bandwidth.memory:.1f} GB/s, "
        f"ratio {bandwidth.share:.2f} (≥ {LEAST_SHARE})"
    )
    return table


def main() -> None:
    """Run the benchmark; the exit code is 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.aggregation", description=__doc__)
    parser.add_argument("--sites", default="10,1000", help="numbers of sites, with commas")
    parser.add_argument("--rules", default="mean,median,geometric-median", help="rules, with commas")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    arguments = parser.parse_args()
    lines = [
        (rule, int(sites)) for rule in arguments.rules.split(",") for sites in arguments.sites.split(",")
    ]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rounds = pool.starmap(hold_round, lines, chunksize=1)
    bandwidth = measure_bandwidth()
    if arguments.json:
        print(
            json.dumps({"rounds": [asdict(one) for one in rounds], "bandwidth": asdict(bandwidth)}, indent=2)
        )
    else:
        Console().print(_as_table(rounds, bandwidth))
    raise SystemExit(not met(rounds, bandwidth))


if __name__ == "__main__":
    main()
