"""Kill -9 at random instants: of one kind of program, again and again, while studies run, or of all."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from common.runs import is_taken, working_folder
from simulations.drills.local import Local, Study, wait
from simulations.drills.processes import kill

STUDY_PATIENCE = 900.0
"""Seconds for a study to end, once nothing breaks any more."""
LONGEST_WAIT, RESIDUE = 20.0, 1.0
"""Seconds to wait for a message, and within which whoever carries it is killed."""


@dataclass(frozen=True)
class Strike:
    """One way to kill.

    Attributes:
        what: Kills it; returns whether there was something to kill.
        pause: Seconds between two kills, at most, in which a study is under way.
        ends_server: Whether the study's server process dies of it, so that somebody must resume the study.
        custodians: How many of so many sites' custodians die of it, each perhaps in a lesson.
    """

    what: Callable[[Local, Random], bool]
    pause: float = 15.0
    ends_server: bool = False
    custodians: Callable[[int], int] = lambda sites: 0


def run(
    local: Local, name: str, times: int, random: Random, say: Callable[[str], None], studies: list[Study]
) -> None:
    """Kill so many times; studies that are begun for it are added to those there are; the last may go on."""
    strike, struck = STRIKES[name], 0
    while struck < times:
        if not studies or studies[-1].result is not None:
            studies.append(Study(local, f"kills-{len(studies) + 1}"))
            studies[-1].begin()
        study = studies[-1]
        _await_server(local, study)
        time.sleep(random.uniform(0.0, strike.pause))
        if study.ended():
            if study.result is None:
                say(f"{study.name} broke off: {study.failures[-1]}")
                study.resume()
        elif strike.what(local, random):
            struck += 1
            say(f"kill {struck} of {times}, in {study.name}")
            if strike.ends_server:
                study.resume()


def _await_server(local: Local, study: Study) -> None:
    """Let what was killed before come back, so that every instant lies in a study that is under way."""
    begun = working_folder(local.federation.runs / study.name)
    wait(
        lambda: study.ended() or bool(local.servers() and local.superlink_answers() and is_taken(begun)),
        STUDY_PATIENCE,
    )


def _program(name: str) -> Callable[[Local, Random], bool]:
    def strike(local: Local, random: Random) -> bool:
        chosen = f"{random.choice(local.sites)} {name}".strip() if name == "custodian" else name
        pid = local.services.programs[chosen].pid
        kill([pid] if pid else [])
        return pid is not None

    return strike


def _supernode(local: Local, random: Random) -> bool:
    found = local.supernode(random.choice(local.sites))
    kill(found)
    return bool(found)


def _server(local: Local, random: Random) -> bool:
    found = local.servers()
    kill(found)
    return bool(found)


def _courier(local: Local, random: Random) -> bool:
    """Wait for a message to be carried, and kill who carries it a moment later."""
    deadline = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < deadline:
        if found := local.couriers(random.choice(local.sites)):
            time.sleep(random.uniform(0.0, RESIDUE))
            before = set(found)
            still = [pid for site in local.sites for pid in local.couriers(site) if pid in before]
            kill(still)
            return bool(still)
        time.sleep(0.02)
    return False


def _everything(local: Local, random: Random) -> bool:
    with local.services.power_cut():
        time.sleep(random.uniform(0.5, 2.0))
    local.await_superlink()
    return True


STRIKES = {
    "courier": Strike(_courier, 5.0),
    "supernode": Strike(_supernode),
    "custodian": Strike(_program("custodian"), custodians=lambda sites: 1),
    "superlink": Strike(_program("superlink")),
    "server": Strike(_server, 30.0, ends_server=True),
    "power-cut": Strike(_everything, 40.0, ends_server=True, custodians=lambda sites: sites),
}
"""By what dies; `power-cut` is everything at once."""
