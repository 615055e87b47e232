"""A site starts couriers of the agreed bundle and nothing else, and a Flower it doesn't know not at all."""

import hashlib
import subprocess
import sys
import types
from pathlib import Path

import pytest
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus

from client.flower_seams import exchange
from client.pinned_app import NotAgreed, require_agreed
from client.pinned_executor import PinnedExecutor

ROOT = Path(__file__).resolve().parents[2]
AGREED = hashlib.sha256(b"agreed").hexdigest()


def spec(kind: TaskType) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=kind,
        runtime_api_address="127.0.0.1:9",
        token="token",
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=None,
        suppress_output=False,
        task_id=1,
        fab_hash=AGREED,
    )


def test_another_bundle_is_refused_by_its_bytes_with_both_digests():
    require_agreed(b"agreed", AGREED)
    with pytest.raises(NotAgreed) as refused:
        require_agreed(b"another", AGREED)
    assert AGREED in str(refused.value) and hashlib.sha256(b"another").hexdigest() in str(refused.value)


@pytest.mark.parametrize("kind", sorted(set(TaskType) - {TaskType.CLIENT_APP}))
def test_whatever_else_flower_would_start_is_not_started(kind):
    executor = PinnedExecutor(AGREED)
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    assert executor.launch(spec(kind)).status is LaunchResultStatus.FAILED
    assert not executor._started


def test_a_flower_without_the_place_for_a_pin_is_refused():
    module = types.ModuleType("flwr.elsewhere")
    with pytest.raises(RuntimeError, match=r"flwr\.elsewhere\.install_from_fab"):
        exchange(module, "install_from_fab", print)
    module.install_from_fab = len  # type: ignore[attr-defined]
    assert exchange(module, "install_from_fab", print) is len
    assert module.install_from_fab is print  # type: ignore[attr-defined]


def test_the_installed_flower_has_every_place_that_is_exchanged():
    program = (
        "from flwr.supernode import fleet_http_connection as a; a.FleetHttpClient;"
        "from flwr.supernode.runtime import run_clientapp as b; b.install_from_fab, b.pull_task_input;"
        "from flwr.supercore.superexec import run_superexec as c; c.get_executor"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_modules_of_the_bundle_are_loaded_where_the_program_has_some_of_the_same_name():
    program = (
        "import sys, common.errors; from client.pinned_app import forget_own_modules; forget_own_modules();"
        "print([name for name in sys.modules if name.split('.')[0] in ('client', 'common', 'server')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
