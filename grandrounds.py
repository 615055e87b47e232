"""`grandrounds`: the command line's one front door.

Commands live with the room they belong to; this file only hangs the doors, and turns what a user can mend into one line and exit code 2.
"""

import os
import signal
import sys

# Small models are slowed down many times over by more than one thread a process; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console

from common.errors import UserError
from simulations.commands import simulate

cli = typer.Typer(
    help="Hospitals learn together without moving a patient record.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli.command()(simulate)


@cli.callback()
def front_door() -> None:
    """Hospitals learn together without moving a patient record."""


def main() -> None:
    """Run a command.

    Exit codes: 0 success, 2 something the user can mend, 130 interrupted.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        cli(standalone_mode=True)
    except UserError as error:
        Console(stderr=True).print(f"grandrounds: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("grandrounds: interrupted; nothing half-written is left", markup=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
