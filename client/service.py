"""The custodian's service: one narrow door on a Unix socket, or on loopback with mutual TLS.

- **One thing at a time.** Offers, proxies, tasks and students take turns in one room, in the order of their
  coming; a few may wait, the rest are refused. A release, or word of a task that failed, keeps the room until
  it may leave (`client.schedule`), or what waits behind it would show when it was done.
- **Health and quotes at once.** Quotes have a room of their own, health needs none; no record is near them.
- **Nothing by accident.** Each call ends in an answer of the protocol. An exception's text stays in the
  site's log.
- **Light until needed.** torch comes with the first task.
- **Safe to kill.** What counts is in the ledger before a byte leaves, so ending at once is as good as
  ending well; after SIGTERM the running task has `GRACE` to end.

A courier is a program on the same machine and can always make itself a nuisance there; bounds on messages,
calls and handshakes keep it at that.
"""

import atexit
import gc
import logging
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from grpc_health.v1.health_pb2 import HealthCheckResponse
from pydantic import ValidationError

from client.custodian_pb2 import Body, Price
from client.custodian_pb2 import Plan as PlanMessage
from client.custodian_pb2_grpc import CustodianServicer, add_CustodianServicer_to_server
from client.policy import ServicePolicy, require_secret
from client.quote import quote
from client.schedule import departure
from client.served import ServedSite
from client.site_metrics import metrics_kept
from common.errors import UserError
from common.logs import about
from common.messages import Refusal, Release, Rule, Task, decode_answer
from common.plan import Plan as RunPlan

SERVICE = "grandrounds.v1.Custodian"
MOST_WAITING = 8
"""Calls that may wait for a room."""
MOST_CALLS = 128
"""Calls under way at once, half-sent ones included; each has a thread."""
GRACE = 5.0
"""Seconds that a running task has after SIGTERM: less than any supervisor waits before it kills."""
OPTIONS = (
    ("grpc.max_concurrent_streams", 32),  # of one connection
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.keepalive_time_ms", 30_000),  # who answers no ping is gone
    ("grpc.keepalive_timeout_ms", 5_000),
)
UNAVAILABLE = Refusal(Rule.UNAVAILABLE).encode()

T = TypeVar("T")
log = logging.getLogger("grandrounds.custodian")


class Room:
    """One thread, in which one thing happens after another; only so many may wait at its door."""

    def __init__(self, name: str) -> None:
        """Open the room; its thread starts with the first visitor."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._door = threading.Lock()
        self._visitors = 0

    def enter(self, do: Callable[[], T], otherwise: T) -> T:
        """Do something in turn, or return `otherwise` if too many wait."""
        with self._door:
            if self._visitors > MOST_WAITING:
                return otherwise
            self._visitors += 1
        try:
            return self._thread.submit(do).result()
        finally:
            with self._door:
                self._visitors -= 1

    @property
    def visitors(self) -> int:
        """How many are inside or wait."""
        return self._visitors


class Desk(CustodianServicer):
    """The five calls, each led to its room."""

    def __init__(self, site: ServedSite) -> None:
        """Sit down; nothing is opened yet."""
        self._site = site
        self._lessons, self._quotes = Room("lesson"), Room("quote")
        self._closing = threading.Event()

    def Offer(self, request: Body, context: grpc.ServicerContext) -> Body:
        """Say who the site is, and whether it knows the run's proxy."""
        return self._in_turn(self._site.custodian.offer, request, context)

    def AcceptProxy(self, request: Body, context: grpc.ServicerContext) -> Body:
        """Take in a proxy."""
        return self._in_turn(self._site.custodian.accept_proxy, request, context)

    def Learn(self, request: Body, context: grpc.ServicerContext) -> Body:
        """Hold a lesson."""
        return self._in_turn(self._learn, request, context)

    def Deliver(self, request: Body, context: grpc.ServicerContext) -> Body:
        """Take in the final student."""
        return self._in_turn(self._site.custodian.deliver, request, context)

    def Quote(self, request: PlanMessage, context: grpc.ServicerContext) -> Price:
        """Price a plan."""
        unavailable = Price(refused_by=Rule.UNAVAILABLE.label)
        price = partial(self._guarded, self._price, request.json, context, unavailable)
        return self._quotes.enter(price, unavailable)

    def close(self) -> None:
        """Let nobody in any more; what waits for its departure is not sent."""
        self._closing.set()

    @property
    def queue(self) -> int:
        """Calls that are worked on or wait."""
        return self._lessons.visitors + self._quotes.visitors

    def _in_turn(self, ask: Callable[[bytes], bytes], request: Body, context: grpc.ServicerContext) -> Body:
        answer = partial(self._guarded, ask, request.body, context, UNAVAILABLE)
        return Body(body=self._lessons.enter(answer, UNAVAILABLE))

    def _guarded(
        self, ask: Callable[[bytes], T], body: bytes, context: grpc.ServicerContext, otherwise: T
    ) -> T:
        """Ask, unless it is too late or nobody waits for the answer any more; no exception gets out."""
        if self._closing.is_set() or not context.is_active():
            return otherwise
        try:
            return ask(body)
        except Exception:
            log.exception("a call failed; the courier is told that the site is unavailable")
            return otherwise

    def _price(self, plan_json: bytes) -> Price:
        """A courier may learn what a run costs, and which rule refuses it.

        What the policy refuses as it stands has no price here, so that nobody can make the site reckon.
        """
        policy = self._site.policy
        try:
            plan = RunPlan.model_validate_json(plan_json)
        except ValidationError:
            return Price(refused_by=Rule.MALFORMED.label)
        if (objection := policy.refusal(plan)) is not None:
            return Price(refused_by=objection[0].label)
        priced = quote(policy, self._site.ledger, plan)
        if priced.refused_by is Rule.NOT_APPROVED:
            self._site.asked.keep(plan)
        run = priced.price.run
        return Price(
            epsilon=run.epsilon,
            delta=run.delta,
            unit=run.unit,
            adjacency=run.adjacency,
            accountant=run.accountant,
            refused_by="" if priced.refused_by is None else priced.refused_by.label,
        )

    def _learn(self, body: bytes) -> bytes:
        """Hold a lesson and keep the room until its answer may leave."""
        began = time.monotonic()
        try:
            answer = self._site.custodian.learn(body)
        except Exception:
            log.exception("a task failed; the courier is told that the site is unavailable")
            answer = UNAVAILABLE
        match decode_answer(answer):
            case Release():
                return self._send(Task.decode(body), answer, began)
            case Refusal(rule=Rule.UNAVAILABLE):
                # It may have failed after a lesson, and when that was done must not show either.
                self._wait(began)
            case Refusal(rule=Rule.NOT_APPROVED):
                self._site.asked.keep(Task.decode(body).plan)
        return answer

    def _send(self, task: Task, release: bytes, began: float) -> bytes:
        with about(run=task.plan.study, round=task.round):
            if not self._wait(began):
                return UNAVAILABLE
            self._site.releases.note(task.plan.study, task.round, release)
            log.info("a release leaves: study %s round %d", task.plan.study, task.round)
            return release

    def _wait(self, began: float) -> bool:
        """Wait until what is ready may leave; false if the service closes before."""
        ready, beat = time.monotonic(), self._site.policy.replies.every_seconds
        if 0 < beat < ready - began:
            log.warning("a task outlasted replies.every-seconds")
        return not self._closing.wait(max(0.0, departure(began, ready, beat) - time.monotonic()))


STOPS = (signal.SIGTERM, signal.SIGINT)


def serve(site: ServedSite) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UserError: if the address can't be listened at or its certificates can't be read.
    """
    atexit.register(gc.freeze)  # or Python looks through all that torch has loaded before it ends
    # Blocked in every thread and waited for below: a handler that sets an event may meet the very lock that
    # whoever waits for the event holds.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    service, desk = site.policy.service, Desk(site)
    longest = service.largest_message_mib << 20
    lengths = (("grpc.max_receive_message_length", longest), ("grpc.max_send_message_length", longest))
    server = grpc.server(
        ThreadPoolExecutor(MOST_CALLS, thread_name_prefix="call"),
        options=(*OPTIONS, *lengths),
        maximum_concurrent_rpcs=MOST_CALLS,
    )
    # Whoever watches the health holds no thread.
    health = HealthServicer(experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1))
    health.set(SERVICE, HealthCheckResponse.SERVING)
    add_CustodianServicer_to_server(desk, server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    _listen(server, service)
    server.start()
    log.info("%s listens at %s", site.policy.site, service.listen)
    with metrics_kept(site, lambda: desk.queue):
        signal.sigwait(STOPS)
    desk.close()
    health.enter_graceful_shutdown()
    server.stop(GRACE).wait()
    Path(service.listen.removeprefix("unix:")).unlink(missing_ok=True)
    if desk.queue:
        log.warning("a task was still running; it is charged, and will start anew when it is asked again")
        os._exit(0)  # its thread can't be ended, and the ledger is safe at every moment


def _listen(server: grpc.Server, service: ServicePolicy) -> None:
    """Bind the address; a Unix socket is for its owner and its group from the first moment."""
    kind, _, address = service.listen.partition(":")
    before = os.umask(0o117)
    try:
        if kind == "unix":
            _clear(Path(address))
            server.add_insecure_port(service.listen)
        else:
            server.add_secure_port(address, _credentials(service))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{service.listen} can't be listened at: {error}") from None
    finally:
        os.umask(before)


def _clear(path: Path) -> None:
    """Take away the socket that a killed custodian left; its lock on the state folder is ours by now."""
    if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
        raise UserError(f"{path} is there already and is no socket: service.listen needs another place")
    path.unlink(missing_ok=True)


def _credentials(service: ServicePolicy) -> grpc.ServerCredentials:
    require_secret(Path(service.key))
    key, certificate, authority = (
        Path(file).read_bytes() for file in (service.key, service.certificate, service.courier_authority)
    )
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
