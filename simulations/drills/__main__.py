"""Break a federation on this machine, and see what becomes of it.

    python -m simulations.drills NAME … [--times 20] [--sites 4] [--rounds 10] [--seed 0] [--json]

A line a drill: what was broken, how often, which studies completed, how often one had to be resumed, whether
every site's books are right. Exit code 1 if anything is found wrong. `--keep` leaves all files and logs.
Drills that kill or move run on the loopback; the others have networks of their own, and need root.
"""

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table

from common.errors import UserError
from simulations.drills.conditions import CONDITIONS, Stage
from simulations.drills.kills import STRIKES
from simulations.drills.kills import run as run_kills
from simulations.drills.local import heart_study, local_federation
from simulations.drills.moves import MOVES
from simulations.drills.verdict import Verdict, judge

SCENES = MOVES | CONDITIONS
"""What is held once, by name, however many times others kill."""
DRILLS = (*STRIKES, *SCENES)
MOST_RESUMES = 5
"""Of a study in which something was killed, once nothing is killed any more."""

screen = Console(stderr=True, highlight=False, soft_wrap=True)


def hold(names: list[str], times: int, sites: int, rounds: int, seed: int, folder: Path) -> Verdict:
    """Hold drills in one federation, one after the other."""

    def say(what: str) -> None:
        screen.print(f"[dim]{time.monotonic() - began:6.0f} s[/] {name}: {what}")

    began, name = time.monotonic(), "start"
    deaths, random = 0, Random(seed)
    study = heart_study(sites, f"num-rounds={rounds} min-sites=1 round-timeout=180.0")
    with local_federation(folder, study, networked=not CONDITIONS.keys().isdisjoint(names)) as local:
        local.run_all()
        say(f"{sites} sites are online")
        stage = Stage(local, say)
        for name in names:
            if name in STRIKES:
                run_kills(local, name, times, random, say, stage.studies)
                deaths += times * STRIKES[name].custodians(sites)
        for one in stage.studies:
            stage.complete(one, resumes=MOST_RESUMES)
        for name in names:
            if name in SCENES:
                SCENES[name](stage)
        verdict = judge(local, stage.studies, deaths)
        return replace(verdict, findings=(*stage.findings, *verdict.findings))


def main() -> int:
    """Hold the drills that are named."""
    parser = argparse.ArgumentParser(prog="python -m simulations.drills", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(DRILLS)}; default: all")
    parser.add_argument("--times", type=int, default=20, help="kills in each drill")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10, help="of each study")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--together", action="store_true", help="hold all drills in one federation")
    parser.add_argument("--keep", type=Path, help="folder that is to keep everything")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if unknown := [name for name in given.names if name not in DRILLS]:
        raise UserError(f"{unknown[0]}: no such drill; there are {', '.join(DRILLS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    held: dict[str, tuple[Verdict, int]] = {}
    chosen = given.names or list(DRILLS)
    for names in [chosen] if given.together else [[name] for name in chosen]:
        folder = Path(tempfile.mkdtemp(prefix="gr-"))  # short: a socket's path has an end
        began = time.monotonic()
        try:
            verdict = hold(names, given.times, given.sites, given.rounds, given.seed, folder)
            held[", ".join(names)] = verdict, round(time.monotonic() - began)
        finally:
            if given.keep:
                sockets = shutil.ignore_patterns("*.sock")
                shutil.copytree(folder, given.keep / names[0], ignore=sockets, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
    if given.json:
        rows = {name: asdict(verdict) | {"seconds": seconds} for name, (verdict, seconds) in held.items()}
        sys.stdout.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    else:
        Console().print(_table(held, given.times))
    return int(any(verdict.findings for verdict, _ in held.values()))


def _table(held: Mapping[str, tuple[Verdict, int]], times: int) -> Table:
    table = Table(title=f"kills: {times} times each")
    for column in (
        "drill",
        "studies completed",
        "resumed",
        "charges",
        "charged again",
        "seconds",
        "found wrong",
    ):
        table.add_column(column)
    for name, (verdict, seconds) in held.items():
        numbers = verdict.completed, verdict.resumed, verdict.charges, verdict.repeated, seconds
        table.add_row(name, *map(str, numbers), "; ".join(verdict.findings) or "nothing")
    return table


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        screen.print(str(error), style="bold red", markup=False)
        sys.exit(error.exit_code)
