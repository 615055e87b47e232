"""Flower's programs for a federation: how they are started, and how its SuperLink is asked.

Registering nodes and asking what runs goes through the client of Flower's control API that `flwr` itself
uses, since `flwr supernode list` doesn't show which node is whose. Studies are submitted by `flwr run`.
"""

import contextlib
import fcntl
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import UserError
from common.runs import disk_errors
from server import flower_programs
from server.federation.settings import REVOKED, Federation, open_federation
from server.flower_programs import program
from server.node_owners import write_owners

if TYPE_CHECKING:
    from flwr.supercore.control import ControlHttpClient

CONNECTION = "federation"
"""The SuperLink's name in Flower's own configuration (`flower/config.toml`)."""
POLL_SECONDS = 0.25
"""How often SuperExec looks for a task."""


@dataclass(frozen=True)
class Node:
    """A site's SuperNode as the SuperLink sees it.

    Attributes:
        site: Whose it is.
        node_id: Flower's number for it; None if its key isn't registered.
        status: `online`, `offline`, `registered` (never seen), `not registered` or `revoked`.
        seen: When it last changed to that, ISO 8601, or "".
    """

    site: str
    node_id: int | None
    status: str
    seen: str


@dataclass(frozen=True)
class Run:
    """A run as the SuperLink sees it.

    Attributes:
        run_id: Flower's number for it.
        study: The run config's `run-id`, under which sites know it.
        status: Such as `running` or `finished:completed`.
        details: Why it failed, or "".
        began: When it was submitted, ISO 8601.
        ended: When it finished, or "".
        bytes_from_sites: What sites have sent for it.
        bytes_to_sites: What was sent to sites for it.
    """

    run_id: int
    study: str
    status: str
    details: str
    began: str
    ended: str
    bytes_from_sites: int
    bytes_to_sites: int

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen."""
        return self.status.startswith("finished")

    @property
    def completed(self) -> bool:
        """Whether it went well."""
        return self.status == "finished:completed"


def environment(federation: Federation) -> dict[str, str]:
    """The environment of a federation's programs."""
    own = flower_programs.environment(federation.flower_home)
    return own | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(POLL_SECONDS)}


def superlink_command(federation: Federation) -> list[str]:
    """Start the SuperLink: TLS, known nodes only, all in a database, server apps in other processes."""
    settings = federation.settings
    return [
        *(
            program("flower-superlink"),
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ),
        *("--ssl-ca-certfile", str(federation.authority)),
        *("--ssl-certfile", str(federation.certificate), "--ssl-keyfile", str(federation.certificate_key)),
        *("--database", str(federation.state / "superlink.db"), "--isolation", "process"),
        *("--superexec-auth-secret-file", str(federation.state / "superexec.key")),
        *("--host", settings.superlink_host, "--port", str(settings.superlink_port)),
    ]


def superexec_command(federation: Federation) -> list[str]:
    """Start SuperExec, which starts server apps; it outlives the SuperLink, and so do they."""
    return [
        *(program("flower-superexec"), "--runtime-api-address", federation.superlink),
        *("--root-certificates", str(federation.authority)),
        *("--superexec-auth-secret-file", str(federation.state / "superexec.key")),
    ]


def answers(federation: Federation) -> bool:
    """Whether a SuperLink with our certificate answers."""
    trusted = ssl.create_default_context(cafile=str(federation.authority))
    return flower_programs.answers(f"https://{federation.superlink}", trusted)


def await_superlink(federation: Federation, patience: float) -> bool:
    """Wait until it answers; False if it doesn't within so many seconds."""
    deadline = time.monotonic() + patience
    while not (there := answers(federation)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return there


def register_nodes(federation: Federation) -> list[str]:
    """See that the SuperLink knows the sites' public keys and no others; return the sites that are new to it.

    A revoked site's key and one that another kit has replaced are taken back. Whose each node is then, is
    written down for studies, also for one that is under way. Commands that do this at once take turns, and go
    by the sites that there are when their turn comes.

    Raises:
        UserError: if it can't be reached or refuses, or the file can't be written.
    """
    turn = federation.state / "nodes.lock"
    with disk_errors(turn):
        lock = turn.open("w")
    with lock:
        with disk_errors(turn):
            fcntl.flock(lock, fcntl.LOCK_EX)
        return _register_nodes(open_federation(federation.path))


def _register_nodes(federation: Federation) -> list[str]:
    from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest

    revoked = federation.revoked()
    ours = {
        _public_bytes(federation, site): site for site in federation.settings.sites if site not in revoked
    }
    with _control(federation) as client:
        listed = client.ListNodes(ListNodesRequest()).nodes_info
        known = {node.public_key: node.node_id for node in listed if node.status != "unregistered"}
        for node_id in (known[key] for key in known.keys() - ours.keys()):
            client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
        new = {key: site for key, site in ours.items() if key not in known}
        owner_of = {known[key]: site for key, site in ours.items() if key in known}
        for key, site in new.items():
            made = client.RegisterNode(RegisterNodeRequest(public_key=key, name=site))
            owner_of[made.node_id] = site
    write_owners(federation.node_owners, owner_of)
    return list(new.values())


def nodes(federation: Federation) -> list[Node]:
    """Every site's node.

    Raises:
        UserError: if the SuperLink can't be reached.
    """
    from flwr.proto.control_pb2 import ListNodesRequest

    with _control(federation) as client:
        listed = client.ListNodes(ListNodesRequest()).nodes_info
    by_key = {node.public_key: node for node in listed if node.status != "unregistered"}
    found = []
    for site in federation.settings.sites:
        node = by_key.get(_public_bytes(federation, site))
        if node is None:
            status = REVOKED if site in federation.revoked() else "not registered"
            found.append(Node(site, None, status, ""))
            continue
        seen = node.last_deactivated_at if node.status == "offline" else node.last_activated_at
        found.append(Node(site, node.node_id, node.status, seen))
    return found


def runs(federation: Federation, run_id: int | None = None) -> list[Run]:
    """Every run, the latest first, or one.

    Raises:
        UserError: if the SuperLink can't be reached, or doesn't know the run.
    """
    from flwr.proto.control_pb2 import ListRunsRequest

    with _control(federation) as client:
        listed = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict.values()
    found = [
        Run(
            run_id=one.run_id,
            study=one.override_config["run-id"].string if "run-id" in one.override_config else "",
            status=":".join(part for part in (one.status.status, one.status.sub_status) if part),
            details=one.status.details,
            began=one.pending_at,
            ended=one.finished_at,
            bytes_from_sites=one.bytes_recv,
            bytes_to_sites=one.bytes_sent,
        )
        for one in listed
    ]
    return sorted(found, key=lambda run: run.began, reverse=True)


@contextlib.contextmanager
def _control(federation: Federation) -> Iterator["ControlHttpClient"]:
    import httpx
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    try:
        with ControlHttpClient.from_server_address(
            server_address=federation.superlink,
            insecure=False,
            root_certificates=federation.authority.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="grandrounds")],
        ) as client:
            yield client
    except httpx.HTTPStatusError as error:
        reason = error.response.text[:200]
        raise UserError(f"the SuperLink at {federation.superlink} refuses: {reason}") from None
    except httpx.HTTPError:
        raise UserError(
            f"no SuperLink of this federation answers at {federation.superlink}: "
            f"grandrounds federation start {federation.path}"
        ) from None


def _public_bytes(federation: Federation, site: str) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    path = federation.node_keys()[site]
    try:
        key = load_ssh_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no public key: {error}") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(f"{path}: expected an EC key, as grandrounds federation init makes them")
    return public_key_to_bytes(key)
