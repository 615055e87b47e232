"""`grandrounds`: the command line's one front door.

Commands live with the room they belong to; this file only hangs the doors, and turns what a user can mend
into one line and an exit code.
"""

import errno
import os
import signal
import sys
from pathlib import Path

# Small models are slowed down many times over by more than one thread a process; set before torch is loaded.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console

from client.site_commands import site
from common.errors import UserError
from server.federation.commands import federation
from simulations.commands import compare, proxy, rehearse, simulate

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes, as shells give them."""

cli = typer.Typer(
    help="Hospitals learn together without moving a patient record.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
cli.command()(simulate)
cli.command()(compare)
cli.command()(proxy)
cli.command()(rehearse)
cli.add_typer(site, name="site")
cli.add_typer(federation, name="federation")


@cli.callback()
def front_door() -> None:
    """Hospitals learn together without moving a patient record."""


def main() -> None:
    """Run a command.

    Exit codes: 0 success, 1 a check that failed, 2 something the user can mend, 130 and 143 interrupted
    (Ctrl-C, SIGTERM).
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        _stand_somewhere()
        cli()
    except UserError as error:
        _say(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None or error.errno != errno.ENOSPC:
            raise
        _flush()  # says so if it is that
        _say(f"{error.strerror}: a file of this command's can't be written, or standard output")
        sys.exit(2)
    except SystemExit as end:  # what typer makes of Ctrl-C, too
        if end.code in (INTERRUPTED, TERMINATED):
            _say("interrupted; nothing half-written is left")
        raise
    finally:
        _flush()


def _flush() -> None:
    """Write what is left to be said, where it can be told if that fails."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        sys.stdout = None  # or Python would try once more
        if error.errno == errno.EPIPE:  # whoever read it has enough
            sys.exit(1)
        _say(f"standard output can't be written: {error.strerror}")
        sys.exit(2)


def _stand_somewhere() -> None:
    try:
        Path.cwd()
    except OSError:
        raise UserError("the folder that you are in is gone: cd to one that is there") from None


def _say(text: str) -> None:
    screen = Console(stderr=True, style="bold red", highlight=False, markup=False, soft_wrap=True)
    screen.print(f"grandrounds: {text}")


if __name__ == "__main__":
    main()
