"""The courier: Flower's ClientApp at a site. It carries bodies to and from the custodian and knows nothing.

It is code that the coordinator may send and replace, so it holds no data, no key and no budget, and needs
neither torch nor opacus. The custodian is reached through the socket that the site's node config names
(`custodian = "unix:/run/grandrounds/custodian.sock"`). Where the node config names a partition instead, this
is a simulation: the same custodian is called in this process (`client.simulated`).
"""

import logging
from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.envelope import seal, unseal
from common.errors import UserError
from common.logs import about, follow_environment
from common.messages import MessageError, Refusal, Rule

log = logging.getLogger("grandrounds.courier")

app = ClientApp()


class Site(Protocol):
    """The four questions that a custodian answers: bytes in, bytes out."""

    def offer(self, body: bytes) -> bytes: ...  # noqa: D102
    def accept_proxy(self, body: bytes) -> bytes: ...  # noqa: D102
    def learn(self, body: bytes) -> bytes: ...  # noqa: D102
    def deliver(self, body: bytes) -> bytes: ...  # noqa: D102


def reach_site(context: Context) -> Site:
    """Find the custodian this courier serves. The node config is the site's own; no run config can choose.

    Raises:
        ConnectionError: if there is none, or the courier's certificates can't be read.
    """
    if "custodian" in context.node_config:
        from client.connection import connect

        certificates = context.node_config.get("custodian-certificates", "")
        return connect(str(context.node_config["custodian"]), str(certificates))
    if "partition-id" in context.node_config:
        from client.simulated import simulated_site

        return simulated_site(context)
    raise ConnectionError("the node config names no custodian")


def _carry(message: Message, context: Context, ask: Callable[[Site, bytes], bytes]) -> Message:
    with about(**_subject(message, context)):
        try:
            follow_environment()
            answer = ask(reach_site(context), unseal(message.content))
        except MessageError:
            answer = Refusal(Rule.MALFORMED).encode()
        except Exception as error:  # what it says would travel to the coordinator
            expected = isinstance(error, OSError | UserError)
            log.error("the custodian gives no answer: %s", error, exc_info=None if expected else error)
            answer = Refusal(Rule.UNAVAILABLE).encode()
    return Message(seal(answer), reply_to=message)


def _subject(message: Message, context: Context) -> dict[str, str | int]:
    """What a courier's lines are about; its site is what the node config calls it."""
    run = context.run_config.get("run-id") or context.run_id
    site = context.node_config.get("site", f"node {context.node_id}")
    digits = message.metadata.group_id[:9]  # of a coordinator that may write anything there
    return {"run": str(run), "round": int(digits) if digits.isdecimal() else 0, "site": str(site)}


@app.query("offer")
def offer(message: Message, context: Context) -> Message:
    """Ask whether the site knows the run's proxy."""
    return _carry(message, context, lambda site, body: site.offer(body))


@app.train("proxy")
def proxy(message: Message, context: Context) -> Message:
    """Bring the proxy."""
    return _carry(message, context, lambda site, body: site.accept_proxy(body))


@app.train("learn")
def learn(message: Message, context: Context) -> Message:
    """Bring one round's task, take back the release."""
    return _carry(message, context, lambda site, body: site.learn(body))


@app.train("deliver")
def deliver(message: Message, context: Context) -> Message:
    """Bring the final student."""
    return _carry(message, context, lambda site, body: site.deliver(body))
