"""Letters to sites and back: who is there, the proxy, each round's task, the final student.

Everything goes through Flower's `Grid`; every wait has a timeout.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid

from common.envelope import DELIVER, LEARN, OFFER, PROXY, seal
from common.messages import NO_HEAD, Answer, Greeting, Offer, Receipt, Task
from common.proxy import Proxy
from server.admission import Admitted, Member, NotAdmitted, admit, answer_in

LONGEST_PAUSE = 0.5
"""Seconds between two looks for replies, at most."""

PATIENCE = 30.0
"""Seconds to wait for nodes that have not connected yet."""


@dataclass(frozen=True)
class Roll:
    """Who answered the call.

    Attributes:
        members: Sites that take part, by name.
        absent: Why others don't, by name or node.
    """

    members: Mapping[str, Member]
    absent: Mapping[str, str]


def call_roll(grid: Grid, proxy: Proxy, agreed: Mapping[str, int], timeout: float) -> Roll:
    """Ask every connected node who it is, and send the proxy, once, to sites that don't know it.

    Args:
        grid: Where the nodes are.
        proxy: The run's public cases.
        agreed: The study's sites with the public sizes that they declared when it was agreed. A site with
            another size now would give itself another weight. All are waited for, up to `PATIENCE` seconds.
        timeout: Seconds for each answer.
    """
    nodes = _connected(grid, len(agreed))
    offer = Offer(proxy.digest).encode()
    members: dict[str, Member] = {}
    absent: dict[str, str] = {}
    in_need: list[Member] = []
    for node, answer in _ask(grid, dict.fromkeys(nodes, offer), OFFER, timeout).items():
        if not isinstance(answer, Greeting):
            absent[f"node {node}"] = _reason(answer)
        elif answer.site not in agreed:
            absent[f"node {node}"] = f"calls itself {answer.site}, which is no site of this study"
        elif answer.site in members:
            absent[f"node {node}"] = f"calls itself {answer.site}, as another node does"
        elif answer.declared_size != agreed[answer.site]:
            absent[answer.site] = f"declares {answer.declared_size}, {agreed[answer.site]} was agreed"
        else:
            members[answer.site] = Member(node, answer.site, answer.declared_size)
            if not answer.knows_proxy:
                in_need.append(members[answer.site])
    if in_need:
        body = proxy.to_bytes()
        answers = _ask(grid, {member.node_id: body for member in in_need}, PROXY, timeout)
        for member in in_need:
            answer = answers[member.node_id]
            if not isinstance(answer, Receipt) or answer.digest != proxy.digest:
                del members[member.site]
                absent[member.site] = f"did not take the proxy: {_reason(answer)}"
    absent |= {site: "nobody answered to this name" for site in agreed if site not in members | absent}
    return Roll({site: members[site] for site in sorted(members)}, absent)


def ask_round(
    grid: Grid, task: Task, members: Mapping[str, Member], heads: Mapping[str, bytes], timeout: float
) -> Admitted:
    """Send one round's task to every member and admit what comes back in time."""
    tasks = {member.node_id: replace(task, head=heads.get(site, NO_HEAD)) for site, member in members.items()}
    node_of = _send(grid, {node: asked.encode() for node, asked in tasks.items()}, LEARN, task.round)
    replies = _collect(grid, node_of, timeout)
    by_node = {member.node_id: member for member in members.values()}
    asked = {message_id: tasks[node] for message_id, node in node_of.items()}
    admitted = admit(replies, asked, {message_id: by_node[node] for message_id, node in node_of.items()})
    gone = {by_node[node].site: "its node is gone" for node in by_node.keys() - node_of.values()}
    return replace(admitted, left_out={**admitted.left_out, **gone})


def deliver_student(grid: Grid, body: bytes, members: Mapping[str, Member], timeout: float) -> dict[str, str]:
    """Send the final student back to every site; return the sites that didn't take it, and why."""
    answers = _ask(grid, {member.node_id: body for member in members.values()}, DELIVER, timeout)
    received = Receipt(hashlib.sha256(body).digest())
    return {
        site: _reason(answers[member.node_id])
        for site, member in members.items()
        if answers[member.node_id] != received
    }


def _connected(grid: Grid, expected: int) -> list[int]:
    """Wait for nodes: they may connect after the server app has started."""
    deadline = time.monotonic() + PATIENCE
    while len(nodes := sorted(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(LONGEST_PAUSE)
    return nodes


def _ask(grid: Grid, bodies: Mapping[int, bytes], action: str, timeout: float) -> dict[int, Answer | str]:
    """Ask each node one thing; the answer, or the reason why there is none."""
    node_of = _send(grid, bodies, action)
    answers: dict[int, Answer | str] = dict.fromkeys(bodies, "no answer in time")
    for reply in _collect(grid, node_of, timeout):
        node = node_of[reply.metadata.reply_to_message_id]
        try:
            answers[node] = answer_in(reply)
        except NotAdmitted as reason:
            answers[node] = str(reason)
    return answers


def _reason(answer: Answer | str) -> str:
    """Why an answer isn't the one that was asked for; nothing that a site wrote is shown."""
    return answer if isinstance(answer, str) else "an answer about something else"


def _send(grid: Grid, bodies: Mapping[int, bytes], action: str, round_number: int = 0) -> dict[str, int]:
    """Push one message a node; return the node behind each message id. A node that is gone gets none."""
    node_of: dict[str, int] = {}
    for node, body in bodies.items():
        message = Message(seal(body), node, action, group_id=str(round_number))
        node_of |= dict.fromkeys(grid.push_messages([message]), node)
    return node_of


def _collect(grid: Grid, message_ids: Iterable[str], timeout: float) -> list[Message]:
    """Pull replies until all are in or time is up."""
    waiting, replies = dict.fromkeys(message_ids), list[Message]()
    deadline = time.monotonic() + timeout
    pause = 0.001  # Flower's own loop sleeps for three seconds between looks
    while waiting and time.monotonic() < deadline:
        arrived = [
            reply
            for reply in grid.pull_messages(list(waiting))
            if reply.metadata.reply_to_message_id in waiting
        ]
        replies += arrived
        for reply in arrived:
            waiting.pop(reply.metadata.reply_to_message_id, None)
        if waiting and not arrived:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
    return replies
