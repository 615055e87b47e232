"""The coordinator's machine is lost in the middle of a round, and the study goes on on another one.

What is left of it is a copy of the study's folder. Another federation is founded, with an authority, keys and
a SuperLink of its own; every site takes its kit, and keeps its policy, ledger and budget. The open round's
task is asked again, and a site that had answered it gives the same bytes for no further charge
(`client.ledger`).
"""

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from client.policy import read_policy
from client.release_log import Sent
from client.served import release_log
from common.errors import UserError
from common.runs import working_folder
from server.federation.settings import open_federation
from server.results import ROUNDS
from simulations.drills.conditions import STUDY_PATIENCE, Stage
from simulations.drills.local import NGINX, Local, Study, free_ports
from simulations.drills.processes import kill

LOOK = 0.05
"""Seconds between two looks for a release: a round with an answer is open for little more than a second."""


def another_coordinator(stage: Stage) -> None:
    """Everything at the coordinator is killed and gone in a round that sites have answered."""
    local, study = stage.local, stage.begin("moved")
    answered = _break_off(stage, study)
    stage.say(f"the coordinator is lost; answered in the open round: {', '.join(answered) or 'nobody'}")
    _move(local, study)
    local.await_nodes()
    stage.say("every site is online at another coordinator")
    study.resume()
    stage.complete(study)
    for site, before in answered.items():
        again = [one.sha256 for one in _sent(local, site, study) if one.round == before.round]
        if again != [before.sha256] * 2:
            stage.findings.append(f"{site} was to answer round {before.round} twice alike: {again}")


MOVES: dict[str, Callable[[Stage], None]] = {"another-coordinator": another_coordinator}
"""By where studies go on."""


def _break_off(stage: Stage, study: Study) -> Mapping[str, Sent]:
    """Kill the coordinator in a round with an answer; return what sites have answered in it."""
    deadline = time.monotonic() + STUDY_PATIENCE
    while time.monotonic() < deadline and not study.ended():
        if _rounds_over(study) and _answered(study):
            kill(stage.local.servers())
            if answered := _answered(study):
                stage.local.lose_coordinator()
                study.let_go()
                return answered
            study.resume()  # the round was over just then
        time.sleep(LOOK)
    raise UserError(f"{study.name} could not be broken off in a round: {study.failures}")


def _move(local: Local, study: Study) -> None:
    """Found another federation with nothing of the lost one but the study's folder; sites join it."""
    lost, old = local.federation, local.folder / "lost"
    lost.path.rename(old)
    outer, inner = free_ports(2)
    folder = local.folder / "fed2"
    ports = ["--port", str(outer), "--superlink-port", str(inner if NGINX else outer)]
    where = ["--host", lost.settings.host, *ports, "--sites", ",".join(local.sites), "--json"]
    kits = json.loads(_well(local, "init", folder, *where, of="federation"))
    local.federation = open_federation(folder)
    partial = working_folder(local.federation.runs / study.name)
    shutil.copytree(working_folder(old / "runs" / study.name), partial)
    local.run_coordinator()
    for kit in kits:
        _well(local, "renew", kit["kit"], local.site(kit["site"]), "--seal", kit["seal"], of="site")
        local.run_courier(kit["site"])


def _answered(study: Study) -> dict[str, Sent]:
    """Each site's answer in the open round, if it has left."""
    over, local = _rounds_over(study), study.local
    last = {site: sent[-1] for site in local.sites if (sent := _sent(local, site, study))}
    return {site: one for site, one in last.items() if one.round > over}


def _sent(local: Local, site: str, study: Study) -> list[Sent]:
    """What a site has sent for the study."""
    log = release_log(read_policy(local.policy(site)))
    return [one for one in log.read() if one.study == study.name]


def _rounds_over(study: Study) -> int:
    noted = working_folder(study.local.federation.runs / study.name) / ROUNDS
    return noted.read_text().count("\n") if noted.exists() else 0


def _well(local: Local, *command: str | Path, of: str) -> str:
    done = local.call(of, *command)
    if done.returncode:
        raise UserError(f"{of} {command[0]}: {done.stderr}")
    return done.stdout
