"""One message at a site: Flower's ClientApp process, which loads the bundle that the kit names and no other.

Flower has no such pin: what the coordinator sends is unpacked and run. Here the digest of the bytes that
came is taken before anything of them is unpacked, and another than the agreed one ends in an error that
shows both. This is a second line of defence: the custodian doesn't rely on it, for a courier holds nothing.

`client.pinned_executor` starts it in a process of its own for every message.
"""

import hashlib
import sys
from typing import Any

from flwr.supernode.runtime import run_clientapp

from client.flower_seams import exchange

OURS = ("client", "common", "server")
"""Packages that a bundle has as well: its own are to be loaded, not those of this program."""


class NotAgreed(Exception):
    """A bundle that this site has not agreed on."""


def require_agreed(bundle: bytes, agreed: str) -> None:
    """Refuse a bundle by its bytes.

    Raises:
        NotAgreed: with both digests.
    """
    if (found := hashlib.sha256(bundle).hexdigest()) != agreed:
        raise NotAgreed(f"the bundle {found} is refused: this site agreed on {agreed}")


def forget_own_modules() -> None:
    """Let the bundle's modules be loaded where this program has some of the same name."""
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]


def carry_one(agreed: str, address: str, token: str, executor: int | None) -> None:
    """Become Flower's ClientApp process for one message; doesn't return.

    Args:
        agreed: Digest of the bundle that may be loaded.
        address: Where the SuperNode gives out messages, on this machine's loopback.
        token: What the SuperNode gives this one message for.
        executor: Process without which this one ends.
    """

    def pull_agreed(*given: Any, **named: Any) -> Any:
        message, context, run, bundle = pull(*given, **named)
        # Flower looks for the unpacked app under the digest that the coordinator says, not that of the bytes.
        bundle.hash_str = agreed
        return message, context, run, bundle

    def install_agreed(bundle: bytes, *given: Any, **named: Any) -> Any:
        require_agreed(bundle, agreed)
        installed = install(bundle, *given, **named)
        forget_own_modules()
        return installed

    pull = exchange(run_clientapp, "pull_task_input", pull_agreed)
    install = exchange(run_clientapp, "install_from_fab", install_agreed)
    run_clientapp.run_clientapp(
        address, token, insecure=True, parent_pid=executor, runtime_dependency_install=False
    )
