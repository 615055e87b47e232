"""Preflight: what can be wrong with a site, looked at before it serves. No budget is touched.

Each check is a function of the policy that says what it found, or raises `UserError` with what to do. The
one that looks at records says only whether they fit the description and the public sets that are known
here.
"""

import os
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from client.policy import ANY, ServedPolicy, read_policy, require_secret
from client.served import open_ledger, require_ledgers_unit, require_unit
from client.shelf import shelf_of
from common.errors import ConfigError, UserError

TOLERANCE = timedelta(minutes=5)
"""Clocks that differ by less agree."""
TIMEOUT = 5.0
"""Seconds to wait for a coordinator."""
COPIES = 3
"""Of what a private step holds: the numbers, their gradients, and what is made of both."""


@dataclass(frozen=True)
class Finding:
    """One line of the preflight.

    Attributes:
        check: What was looked at.
        passed: Whether it is well.
        says: What was found, or what to do.
    """

    check: str
    passed: bool
    says: str


def preflight(path: Path, coordinator: str = "", authority: str = "") -> list[Finding]:
    """Look at a site.

    Args:
        path: Its policy.
        coordinator: `host:port` of the coordinator's SuperLink; empty leaves that check out.
        authority: File with the certificate of who signed the coordinator's; without it the system's are
            used.

    Raises:
        UserError: if `coordinator` is no such address.
    """
    host, _, port = coordinator.rpartition(":")
    if coordinator and not (host and port.isdigit()):
        raise UserError(f"--coordinator {coordinator}: expected host:port")
    try:
        policy = read_policy(path)
    except UserError as error:
        return [Finding("policy", False, str(error))]
    unit, size = policy.data.unit, policy.data.declared_size
    findings = [Finding("policy", True, f"{path}: site {policy.site}, unit {unit}, declared size {size}")]
    checks = dict(CHECKS)
    if coordinator:
        checks["coordinator"] = lambda _: _reach(host.strip("[]"), int(port), authority)
    return findings + [_look(name, partial(check, policy)) for name, check in checks.items()]


def _look(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except UserError as error:
        return Finding(name, False, str(error))


def _data(policy: ServedPolicy) -> str:
    from client.private_data import described_records

    described = require_unit(policy)
    declared = described.sites[policy.site].declared_size if policy.site in described.sites else None
    if declared is not None and declared != policy.data.declared_size:
        size = policy.data.declared_size
        raise UserError(f"the data description declares {declared} and the policy {size}: which is it?")
    proxies = list(shelf_of(policy).all_proxies())
    records = described_records(policy.data.description, policy.site)
    if complaints := records.for_schema_check([proxy.preprocessing for proxy in proxies]):
        raise UserError("; ".join(dict.fromkeys(complaints)))
    if not proxies:
        return "readable; no public set has come yet that the columns could be held against"
    return f"readable; public sets that the columns fit: {len(proxies)}"


def _memory(policy: ServedPolicy) -> str:
    from client.private_step import numbers_held
    from common.models import REGISTRY, build

    names = [policy.student.model] if policy.student else policy.allow.models
    names = [*dict.fromkeys(name for listed in names for name in (REGISTRY if listed == ANY else [listed]))]
    batch = 2 * policy.data.declared_size
    needed, largest = 0, "linear"
    for proxy in shelf_of(policy).all_proxies():
        shape, classes = proxy.preprocessing.case_shape, len(proxy.preprocessing.classes)
        for name in names:
            try:
                model = build(name, shape, classes, seed=0, allowed_paths=policy.allow.models)
            except ConfigError as error:
                if ":" in name:
                    raise error
                continue  # an architecture for other cases than these
            bytes_ = 4 * (COPIES * numbers_held(model, shape, batch) + 2 * proxy.x.size)
            if bytes_ > needed:
                needed, largest = bytes_, name
    if not needed:
        return "no public set has come yet that would say how large a model is"
    if needed > (available := _available_memory()):
        raise UserError(
            f"{largest} may need {needed >> 20} MiB and {available >> 20} are free: "
            "take it off allow.models, or set [student] to a smaller one"
        )
    return f"{largest} may need {needed >> 20} MiB of {available >> 20}"


def _models(policy: ServedPolicy) -> str:
    from common.models import REGISTRY, build, private_ready

    named = [*policy.allow.models, *([policy.student.model] if policy.student else [])]
    if strange := [name for name in named if ":" not in name and name not in (ANY, *REGISTRY)]:
        near = get_close_matches(strange[0], REGISTRY, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no model {strange[0]!r}: {', '.join(REGISTRY)}, or module:Class{hint}")
    own = [*dict.fromkeys(name for name in named if ":" in name)]
    proxies = list(shelf_of(policy).all_proxies())
    for name in own:
        for proxy in proxies:
            shape, classes = proxy.preprocessing.case_shape, len(proxy.preprocessing.classes)
            try:
                private_ready(build(name, shape, classes, seed=0, allowed_paths=own), shape)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None
    if not own:
        return "none by import path"
    tried = "keep cases apart when tried, which is no proof" if proxies else "no public set to try them on"
    return f"{', '.join(own)}: {tried}"


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _ledger(policy: ServedPolicy) -> str:
    with open_ledger(policy) as ledger:
        require_ledgers_unit(policy, ledger)
        return f"sound; {len(ledger.entries())} entries"


def _clock(policy: ServedPolicy) -> str:
    now = datetime.now(UTC)
    with open_ledger(policy) as ledger:
        last = max((entry.when for entry in ledger.entries()), default=now.isoformat())
    if datetime.fromisoformat(last) > now + TOLERANCE:
        here = f"it is {now:%Y-%m-%d %H:%M} UTC here"
        raise UserError(f"{here} and the ledger was last written at {last}: set the clock")
    return f"{now:%Y-%m-%d %H:%M} UTC"


def _door(policy: ServedPolicy) -> str:
    service = policy.service
    kind, _, address = service.listen.partition(":")
    if kind == "tcp":
        return _certificate(policy)
    folder = Path(address).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: no socket can be made there; make the folder, writable for this account")
    if not Path(address).is_socket():
        return f"{address} can be made; nobody listens there now"
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(TIMEOUT)
            probe.connect(address)
    except OSError:
        return f"{address} is left from a custodian that ended; the next one takes it over"
    return f"a custodian listens at {address}"


def _certificate(policy: ServedPolicy) -> str:
    from cryptography import x509

    service = policy.service
    require_secret(Path(service.key))
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(service.certificate, service.key)
        soonest = min(
            x509.load_pem_x509_certificate(Path(file).read_bytes()).not_valid_after_utc
            for file in (service.certificate, service.courier_authority)
        )
    except (OSError, ValueError) as error:
        raise UserError(f"service.certificate, service.key, service.courier-authority: {error}") from None
    if soonest < datetime.now(UTC):
        raise UserError(f"a certificate of [service] ran out on {soonest:%Y-%m-%d}: renew it")
    return f"certificates are good until {soonest:%Y-%m-%d}"


def _reach(host: str, port: int, authority: str) -> str:
    address = f"{host}:{port}"
    try:
        context = ssl.create_default_context(cafile=authority or None)
        with (
            socket.create_connection((host, port), TIMEOUT) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            return f"{address} answers in {secure.version()} with a certificate that is trusted"
    except ssl.SSLError as error:
        reason = error.reason or error
        raise UserError(f"{address}: no trusted TLS ({reason}); is --authority the right one?") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{address} can't be reached: {reason}; ask who runs the network") from None


CHECKS: dict[str, Callable[[ServedPolicy], str]] = {
    "data": _data,
    "memory": _memory,
    "models": _models,
    "ledger": _ledger,
    "clock": _clock,
    "socket": _door,
}
