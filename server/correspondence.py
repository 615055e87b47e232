"""Letters to sites and back: each round's task, the final student, and how any letter is sent and answered.

Everything goes through Flower's `Grid`; every wait has a timeout.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from flwr.app import Message
from flwr.serverapp import Grid

from common.envelope import DELIVER, LEARN, seal
from common.messages import NO_HEAD, Answer, Receipt, Task
from server.admission import GONE, Admitted, Member, NotAdmitted, admit, answer_in
from server.aggregation import Contribution

LONGEST_PAUSE = 0.5
"""Seconds between two looks for replies, at most."""

PULLED_AT_ONCE = 32
"""Replies that are in memory at the same time, at most."""

PATIENCE = 30.0
"""Seconds to wait for nodes that have not connected yet."""


def ask_round(
    grid: Grid,
    tasks: Mapping[str, Task],
    members: Mapping[str, Member],
    heads: Mapping[str, bytes],
    timeout: float,
    hear: Callable[[Contribution], None],
) -> Admitted:
    """Send sites their tasks of one round and admit what comes back in time.

    Args:
        grid: Where the nodes are.
        tasks: Each site's task.
        members: Where the sites are.
        heads: Head of each site's ledger, which its task brings back.
        timeout: Seconds for all answers.
        hear: Takes each contribution as it comes.
    """
    asked = {
        members[site].node_id: replace(task, head=heads.get(site, NO_HEAD)) for site, task in tasks.items()
    }
    by_node = {members[site].node_id: members[site] for site in tasks}
    round_number = next((task.round for task in tasks.values()), 0)
    node_of: dict[str, int] = {}
    for node, task in asked.items():  # one body at a time: together they would fill the memory
        node_of |= send(grid, {node: task.encode()}, LEARN, round_number)
    waiting = dict(node_of)
    admitted = admit(
        _collect(grid, waiting, timeout),
        {message_id: asked[node] for message_id, node in node_of.items()},
        {message_id: by_node[node] for message_id, node in node_of.items()},
        hear,
    )
    gone = {by_node[node].site: GONE for node in by_node.keys() - node_of.values()}
    unanswered = {message_id: by_node[node].site for message_id, node in waiting.items()}
    return replace(admitted, left_out={**admitted.left_out, **gone}, unanswered=unanswered)


def deliver_student(grid: Grid, body: bytes, members: Mapping[str, Member], timeout: float) -> dict[str, str]:
    """Send the final student back to every site; return the sites that didn't take it, and why."""
    letters = send(grid, {member.node_id: body for member in members.values()}, DELIVER)
    answers = answers_to(grid, letters, timeout)
    received = Receipt(hashlib.sha256(body).digest())
    return {
        site: in_words(answers.get(member.node_id, "no answer in time"))
        for site, member in members.items()
        if answers.get(member.node_id) != received
    }


def connected(grid: Grid, expected: int) -> list[int]:
    """Nodes, of which so many are waited for: they may connect after the server app has started."""
    deadline = time.monotonic() + PATIENCE
    while len(nodes := sorted(grid.get_node_ids())) < expected and time.monotonic() < deadline:
        time.sleep(LONGEST_PAUSE)
    return nodes


def send(grid: Grid, bodies: Mapping[int, bytes], action: str, round_number: int = 0) -> dict[str, int]:
    """Push one message a node; return the node behind each message id. A node that is gone gets none."""
    node_of: dict[str, int] = {}
    for node, body in bodies.items():
        message = Message(seal(body), node, action, group_id=str(round_number))
        node_of |= dict.fromkeys(grid.push_messages([message]), node)
    return node_of


def answers_to(grid: Grid, letters: dict[str, int], timeout: float) -> dict[int, Answer | str]:
    """Wait, take answered letters out of `letters`, return each node's answer or why it is none."""
    answers: dict[int, Answer | str] = {}
    for reply in _collect(grid, dict(letters), timeout):
        node = letters.pop(reply.metadata.reply_to_message_id, None)
        if node is None:
            continue  # answered twice
        try:
            answers[node] = answer_in(reply)
        except NotAdmitted as reason:
            answers[node] = str(reason)
    return answers


def pulled(grid: Grid, message_ids: Sequence[str]) -> Iterator[Message]:
    """Pull the replies to these messages that are there, a few at a time."""
    for start in range(0, len(message_ids), PULLED_AT_ONCE):
        yield from grid.pull_messages(message_ids[start : start + PULLED_AT_ONCE])


def in_words(answer: Answer | str) -> str:
    """Why an answer isn't the one that was asked for; nothing that a site wrote is shown."""
    return answer if isinstance(answer, str) else "an answer about something else"


def _collect(grid: Grid, waiting: dict[str, int], timeout: float) -> Iterator[Message]:
    """Pull replies, a few at a time, until all are in or time is up; with no time, what is there.

    Who has answered is taken out of `waiting`.
    """
    deadline = time.monotonic() + timeout
    pause = 0.001  # Flower's own loop sleeps for three seconds between looks
    while waiting:
        before = len(waiting)
        for reply in pulled(grid, list(waiting)):
            if reply.metadata.reply_to_message_id in waiting:
                del waiting[reply.metadata.reply_to_message_id]
                yield reply
        if time.monotonic() >= deadline:
            break
        if len(waiting) == before:
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
