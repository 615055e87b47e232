"""A run's metrics, as Prometheus fetches them: by HTTP, from this machine, while the run lasts."""

import socket
import urllib.request
from collections import Counter

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from prometheus_client.parser import text_string_to_metric_families

from client.app import app as real_app
from common.envelope import LEARN, seal, unseal
from common.errors import ConfigError
from common.messages import Refusal, Release, Rule, Task, decode_answer
from common.summary import LeftOut, Round
from server.admission import Admitted, rule_in
from server.metrics import RunMetrics
from simulations.inprocess import FIRST_NODE_ID

SITES = ("cleveland", "hungary", "switzerland", "long-beach")
HUNGARY = 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Fetch and parse; a sample's key is its name with its labels' values."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        families = text_string_to_metric_families(page.read().decode())
        return {
            (sample.name.removeprefix("grandrounds_"), *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }


class Watched(ClientApp):
    """The real sites, of which Hungary's refuses round 2; looks at the metrics once a round."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self.seen: dict[int, dict[tuple[str, ...], float]] = {}

    def __call__(self, message: Message, context: Context) -> Message:
        reply = real_app(message, context)
        if message.metadata.message_type != LEARN:
            return reply
        number = Task.decode(unseal(message.content)).round
        if number not in self.seen:
            self.seen[number] = scrape(self.port)
        if number == 2 and context.node_config["partition-id"] == HUNGARY:
            return Message(seal(Refusal(Rule.TOO_MANY_ATTEMPTS).encode()), reply_to=message)
        return reply


def test_what_is_scraped_is_what_the_summary_says_in_the_end(run_app):
    sites = Watched(port := free_port())
    outcome = run_app({"num-rounds": 3, "metrics-port": port}, sites)
    assert sites.seen.keys() == {1, 2, 3}
    first, last = sites.seen[1], sites.seen[3]
    assert (first["rounds_planned",], first["round",], first["sites_seen",]) == (3, 0, 4)
    assert first["run_info", outcome.folder.name] == 1
    assert first["last_round_timestamp_seconds",] == 0 < last["last_round_timestamp_seconds",]
    assert (last["round",], last["sites_answered",], last["round_seconds_count",]) == (2, 3, 2)
    assert (last["site_last_round", "hungary"], last["site_last_round", "cleveland"]) == (1, 2)
    assert (last["left_out_total", "hungary"], last["refusals_total", "too-many-attempts"]) == (1, 1)
    payload, wire = Counter[str](), Counter[str]()
    for reply, body in outcome.replies:
        answer = decode_answer(unseal(reply.content))
        if isinstance(answer, Release) and answer.round < 3:
            site = SITES[reply.metadata.src_node_id - FIRST_NODE_ID]
            payload[site] += len(answer.encode())
            wire[site] += len(body)
    for name, sizes in (("payload_bytes_total", payload), ("wire_bytes_total", wire)):
        assert {key[1]: value for key, value in last.items() if key[0] == name} == sizes
    assert 0 < last["round_seconds_sum",] < outcome.summary.seconds
    with pytest.raises(OSError):
        scrape(port)  # the run is over


def test_a_port_that_is_taken_stops_the_run_before_a_site_is_asked(run_app):
    class Nobody(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            raise AssertionError("a site was asked")

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"metrics-port = {port} is refused: .*Address already in use"):
            run_app({"metrics-port": port}, Nobody())


@pytest.mark.parametrize("rule", Rule)
def test_the_rule_is_read_from_a_reason_wherever_it_was_given(rule):
    said = Refusal(rule)
    assert rule_in(f"refused: {said}") == rule.label
    assert rule_in(f"did not take the proxy: refused: {said}") == rule.label


@pytest.mark.parametrize("reason", ["no answer in time", "", "refused: ", "refused: by nobody"])
def test_other_reasons_have_none(reason):
    assert rule_in(reason) is None


def test_a_run_that_goes_on_stands_where_it_was():
    metrics = RunMetrics()
    held = [Round(seed=0, round=n, metrics={}, answered=("a", "b")[:n], left_out=()) for n in (1, 2)]
    metrics.begin("trial", 9, 2, held)
    value = metrics.registry.get_sample_value
    assert (value("grandrounds_round"), value("grandrounds_rounds_planned")) == (2, 9)
    assert value("grandrounds_site_last_round", {"site": "b"}) == 2
    line = Round(
        seed=0, round=3, metrics={}, answered=("a",), left_out=(LeftOut(site="b", reason="refused: budget"),)
    )
    metrics.observe(line, Admitted(("a",), {}, frozenset(), {}, {}, {}, {"a": 7}, {"a": 9}), 2, 1.5)
    assert value("grandrounds_round") == 3 and value("grandrounds_round_seconds_sum") == 1.5
    assert value("grandrounds_refusals_total", {"rule": "budget"}) == 1
