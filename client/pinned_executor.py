"""Flower's SuperExec at a site: it starts couriers, of one bundle, and nothing else.

Flower's own would also start agents, models and connectors if the coordinator's run asked for them. This one
takes up tasks of client apps only. A message has a process of its own, forked from one that has loaded
Flower and nothing else: loading it takes a second of a processor, and a run has many messages.

    python -m client.pinned_executor BUNDLE ADDRESS SECRET
"""

import multiprocessing
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec import run_superexec
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

from client.flower_seams import exchange
from client.pinned_app import carry_one

COURIERS = {TaskType.CLIENT_APP}


class PinnedExecutor:
    """Starts couriers of one bundle; an executor by Flower's protocol.

    Args:
        bundle: SHA-256 of the agreed bundle.
    """

    def __init__(self, bundle: str) -> None:
        """Nothing runs yet."""
        self._bundle = bundle
        self._started: list[BaseProcess] = []
        self._starter = multiprocessing.get_context("forkserver")
        self._starter.set_forkserver_preload([__spec__.name, carry_one.__module__])

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], **_: object
    ) -> tuple[set[TaskType], set[str]]:
        """Take up client apps, whatever else Flower would."""
        return supported_task_types & COURIERS, set()

    def wait_for_capacity(self, *_: object, **__: object) -> None:
        """There is always room: a SuperNode works on one message at a time."""

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a courier for one message."""
        if spec.task_type not in COURIERS:
            return LaunchResult.failed(f"{spec.task_type} is not started here: couriers only")
        message = (self._bundle, spec.runtime_api_address, spec.token, spec.parent_pid)
        courier = self._starter.Process(target=carry_one, args=message, daemon=True)
        courier.start()
        self._started.append(courier)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Let ended couriers go."""
        self._started = [process for process in self._started if process.is_alive()]

    def close(self) -> None:
        """End what still runs."""
        for process in self._started:
            process.terminate()


def main() -> None:
    """Become the executor of a SuperNode on this machine."""
    _, bundle, address, secret = sys.argv
    exchange(run_superexec, "get_executor", lambda *_, **__: PinnedExecutor(bundle))
    run_superexec.run_superexec(
        runtime_api_address=address,
        insecure=True,  # the loopback of this machine; the secret keeps other accounts out
        superexec_auth_secret=Path(secret).read_bytes(),
        parent_pid=os.getppid(),  # neither outlives the other
        runtime_dependency_install=False,
    )


if __name__ == "__main__":
    main()
