"""Who answers a round that is over is refused by name, and nothing comes of the answer."""

import json

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.envelope import LEARN, seal, unseal
from common.logs import VARIABLE
from common.messages import Task
from server.stragglers import MOST_TASKS, Late, Stragglers
from simulations import inprocess
from simulations.inprocess import FIRST_NODE_ID, run_inprocess

HUNGARY = FIRST_NODE_ID + 1


class SlowRoad(inprocess.InProcessGrid):
    """Hungary's answer of round 2 arrives when round 4 has been sent."""

    def push_messages(self, messages):
        ids = []
        for message in messages:
            number = 0
            if message.metadata.message_type == LEARN:
                number = Task.decode(unseal(message.content)).round
            pushed = super().push_messages([message])
            if number == 2 and message.metadata.dst_node_id == HUNGARY:
                self.held = pushed[0]
            if number == 4:
                self.held = ""
            ids += pushed
        return ids

    def pull_messages(self, message_ids):
        held = getattr(self, "held", "")
        return super().pull_messages(one for one in message_ids if one != held)


class NeverBack(inprocess.InProcessGrid):
    """The same answer never arrives."""

    def pull_messages(self, message_ids):
        def lost(reply: Message) -> bool:
            learns = reply.metadata.message_type == LEARN and reply.metadata.src_node_id == HUNGARY
            return learns and reply.metadata.group_id == "2"

        return [reply for reply in super().pull_messages(message_ids) if not lost(reply)]


@pytest.mark.usefixtures("loggers_as_before")
def test_a_late_answer_is_refused_by_name_and_changes_nothing(run_app, monkeypatch, capsys):
    changes = {"num-rounds": 5, "round-timeout": 0.5}
    monkeypatch.setenv(VARIABLE, "json")
    monkeypatch.setattr(inprocess, "InProcessGrid", SlowRoad)
    late = run_app(changes)
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    monkeypatch.setattr(inprocess, "InProcessGrid", NeverBack)
    never = run_app(changes)
    assert "over" not in capsys.readouterr().err

    (refusal,) = (line for line in lines if line["level"] == "WARNING")
    assert refusal["message"] == "hungary answered round 2, which is over: refused; round 4 is open"
    assert [(line["round"], line["site"]) for line in lines if "no answer in time" in line["message"]] == [
        (2, "hungary")
    ]
    assert (refusal["round"], refusal["site"], refusal["run"]) == (4, "hungary", late.folder.name)
    for outcome in (late, never):
        assert outcome.left_out(2) == {"hungary": "no answer in time"}
        assert all("hungary" in line.answered for line in outcome.summary.history if line.round != 2)
    assert late.models == never.models


def test_only_the_latest_tasks_of_a_site_are_remembered_and_each_is_taken_once():
    class Echo(ClientApp):
        def __call__(self, message: Message, context) -> Message:
            return Message(message.content, reply_to=message)

    def body(grid: Grid) -> None:
        stragglers, rounds = Stragglers(), range(1, MOST_TASKS + 3)
        for number in rounds:
            letter = Message(seal(b""), FIRST_NODE_ID, LEARN, group_id=str(number))
            stragglers.expect(number, dict.fromkeys(grid.push_messages([letter]), "north"))
        late = stragglers.refuse(grid, rounds[-1])
        assert late == [Late("north", number) for number in rounds[-MOST_TASKS:]]
        assert stragglers.refuse(grid, rounds[-1]) == []

    with_grid(body, Echo())


def test_word_that_there_will_be_no_answer_is_none():
    class Fails(ClientApp):
        def __call__(self, message: Message, context) -> Message:
            raise ValueError("gone")

    def body(grid: Grid) -> None:
        stragglers = Stragglers()
        letters = grid.push_messages([Message(seal(b""), FIRST_NODE_ID, LEARN)])
        stragglers.expect(1, dict.fromkeys(letters, "north"))
        assert stragglers.refuse(grid, 2) == [] == stragglers.refuse(grid, 3)

    with_grid(body, Fails())


def with_grid(body, sites: ClientApp) -> None:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context) -> None:
        body(grid)

    run_inprocess({}, 1, app, sites)
