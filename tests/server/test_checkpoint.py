"""A run that broke off, anywhere, ends with the bits of one that didn't, and no site is charged again."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.app import app as courier
from client.simulated import close_sites
from common.config import RunConfig, Scalar
from common.datasets import load_public
from common.envelope import LEARN, unseal
from common.errors import UserError
from common.messages import Task
from common.runs import CHECKPOINT, working_folder
from server.checkpoint import config_in, fingerprint, resume
from server.robust_rules import MOST_OUTLYING
from simulations.attacks import Floats, InfiltratedApp
from simulations.inprocess import run_inprocess

ROOT = Path(__file__).resolve().parents[2]
SITES = 4
ROUNDS = 4
WHOLE = ("teacher.safetensors", "student.safetensors")


class PowerCut(BaseException):
    """Nothing of ours catches it."""


class FailingCourier(ClientApp):
    """The real ClientApp, until the power is cut before or after one site's answer."""

    def __init__(
        self, round_number: int, place: int, after: bool, courier: Callable[..., Message] = courier
    ) -> None:
        super().__init__()
        self.at, self.after, self.courier = (round_number, place), after, courier

    def __call__(self, message: Message, context: Context) -> Message:
        learns = message.metadata.message_type == LEARN
        number = Task.decode(unseal(message.content)).round if learns else 0
        here = (number, context.node_config["partition-id"]) == self.at
        if here and not self.after:
            raise PowerCut
        reply = self.courier(message, context)
        if here:
            raise PowerCut
        return reply


def settings(out: Path, **changes: Scalar) -> dict[str, Scalar]:
    config = RunConfig(num_rounds=ROUNDS, out=str(out), run_id="trial", resumable=True, min_sites=SITES)
    return config.flat() | changes


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    close_sites()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole")
    run_inprocess(settings(out), SITES)
    close_sites()
    return out / "trial"


def cut(out: Path, round_number: int, place: int = 2, after: bool = True) -> None:
    with pytest.raises(PowerCut):
        run_inprocess(settings(out), SITES, None, FailingCourier(round_number, place, after))
    close_sites()


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def charges(run: Path) -> list[int]:
    from client.ledger import Ledger
    from client.simulated import _key

    found = []
    for path in sorted(run.glob("sites/*/ledger.db")):
        ledger = Ledger.open(path, _key(0, path.parent.name))
        found.append([entry.kind for entry in ledger.entries()].count("charge"))
        ledger.close()
    return found


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("round_number", [1, 3, ROUNDS])
def test_a_run_goes_on_where_it_was_cut_off(tmp_path, uninterrupted, round_number, after):
    cut(tmp_path, round_number, after=after)
    assert not (tmp_path / "trial").exists()
    assert RunConfig.from_run_config(config_in(working_folder(tmp_path / "trial"))).run_id == "trial"
    run_inprocess(settings(tmp_path), SITES)
    for name in WHOLE:
        assert (tmp_path / "trial" / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert lines(tmp_path / "trial") == lines(uninterrupted)
    assert charges(tmp_path / "trial") == [ROUNDS] * SITES
    assert not (tmp_path / "trial" / CHECKPOINT).exists()


def test_what_validation_has_seen_is_kept(tmp_path):
    watched = {"patience": 2, "aggregation.validated": True, "privacy.step-size": 60.0}
    watched |= {"proxy-cases": 60, "proxy-subsets": "per-round"}
    run_inprocess(settings(tmp_path / "whole", **watched), SITES)
    close_sites()
    with pytest.raises(PowerCut):
        run_inprocess(settings(tmp_path / "cut", **watched), SITES, None, FailingCourier(2, 2, after=True))
    close_sites()
    run_inprocess(settings(tmp_path / "cut", **watched), SITES)
    assert lines(tmp_path / "cut" / "trial") == lines(tmp_path / "whole" / "trial")
    for name in WHOLE:
        assert (tmp_path / "cut" / "trial" / name).read_bytes() == (
            tmp_path / "whole" / "trial" / name
        ).read_bytes()


def test_what_a_site_has_lost_by_being_loud_is_kept(tmp_path):
    def loud_at_first(task: Task, honest_PC: Floats, place: int) -> Floats:
        return -100 * honest_PC if task.round == 1 else honest_PC

    hostile = InfiltratedApp(courier, loud_at_first, {1})
    rule = {"aggregation.rule": "outlier-weights"}
    run_inprocess(settings(tmp_path / "whole", **rule), SITES, None, hostile)
    close_sites()
    with pytest.raises(PowerCut):
        failing = FailingCourier(3, 2, after=True, courier=hostile)
        run_inprocess(settings(tmp_path / "cut", **rule), SITES, None, failing)
    close_sites()
    config = RunConfig.from_run_config(settings(tmp_path / "cut", **rule))
    known = fingerprint(config, load_public(config))
    kept = resume(working_folder(tmp_path / "cut" / "trial"), config, known).record.outlying
    assert sorted(kept.values())[2] < MOST_OUTLYING <= max(kept.values())
    run_inprocess(settings(tmp_path / "cut", **rule), SITES)
    assert lines(tmp_path / "cut" / "trial") == lines(tmp_path / "whole" / "trial")


def test_other_settings_under_the_same_name_are_refused_and_nothing_is_lost(tmp_path, uninterrupted):
    cut(tmp_path, 2)
    with pytest.raises(UserError, match=r"trial was begun with privacy.epsilon = 1.0, not 2.0"):
        run_inprocess(settings(tmp_path, **{"privacy.epsilon": 2.0}), SITES)
    with pytest.raises(UserError, match=r"was begun by a run that can go on"):
        run_inprocess(settings(tmp_path, resumable=False), SITES)
    run_inprocess(settings(tmp_path, **{"round-timeout": 60.0}), SITES)
    assert lines(tmp_path / "trial") == lines(uninterrupted)


def test_a_resumable_run_needs_a_name(tmp_path):
    with pytest.raises(UserError, match=r"run-id = '' is refused: expected a name"):
        run_inprocess(settings(tmp_path, **{"run-id": ""}), SITES)


def test_other_public_cases_are_refused_and_the_same_ones_may_lie_elsewhere(tmp_path, uninterrupted):
    cut(tmp_path, 2)
    config, folder = RunConfig.from_run_config(settings(tmp_path)), working_folder(tmp_path / "trial")
    known = fingerprint(config, load_public(config))
    for what in known:
        with pytest.raises(UserError, match=f"trial was begun with other {what} than there are here"):
            resume(folder, config, known | {what: "0" * 64})
    (tmp_path / "elsewhere").mkdir()
    run_inprocess(settings(tmp_path, **{"data.folder": str(tmp_path / "elsewhere")}), SITES)
    assert lines(tmp_path / "trial") == lines(uninterrupted)


@pytest.mark.parametrize(
    "damaged",
    [
        lambda whole: b"",
        lambda whole: b"no checkpoint",
        lambda whole: whole[:-9],
        lambda whole: whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
        lambda whole: whole.replace(b"checkpoint 2", b"checkpoint 3"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path, damaged):
    cut(tmp_path, 2)
    path = working_folder(tmp_path / "trial") / CHECKPOINT
    damage = damaged(path.read_bytes())
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"checkpoint.safetensors is damaged"):
        run_inprocess(settings(tmp_path), SITES)
    assert path.read_bytes() == damage


def test_a_run_that_is_not_resumable_keeps_no_checkpoint(tmp_path):
    with pytest.raises(PowerCut):
        run_inprocess(settings(tmp_path, resumable=False), SITES, None, FailingCourier(2, 0, after=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_the_same(tmp_path, uninterrupted):
    command = "import sys, json, simulations.inprocess as s; s.run_inprocess(json.loads(sys.argv[1]), 4)"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    instants = random.Random(7)
    kills = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", command, json.dumps(settings(tmp_path))],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        working = working_folder(tmp_path / "trial")
        while process.poll() is None and not working.exists():
            time.sleep(0.01)
        time.sleep(instants.uniform(0.0, 1.0))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if (tmp_path / "trial").exists():
            break
    else:
        run_inprocess(settings(tmp_path), SITES)
    assert kills > 0
    assert lines(tmp_path / "trial") == lines(uninterrupted)
    for name in WHOLE:
        assert (tmp_path / "trial" / name).read_bytes() == (uninterrupted / name).read_bytes()
