"""Texts that a site's folder is made of: policy, courier's settings, units, compose file, the page to read.

They are templates (Jinja, `{{ }}`) in this folder. A coordinator renders them for the places where things
usually lie and puts them into a kit, so that a hospital can read what it will run; `grandrounds site join`
renders them again from the hospital's own software, for the places where things lie there.
"""

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from common import VERSION
from common.errors import UserError

HERE = Path(__file__).parent
PROGRAM = ("-P", "-m", "grandrounds")
"""How a Python starts this program wherever it is installed; never from the working directory."""
PLAIN = re.compile(r"/[A-Za-z0-9/._+@-]*")


def own_program() -> list[str]:
    """This program's command: what units start, and what goes into the background."""
    return [sys.executable, *PROGRAM]


def require_plain(folder: Path) -> None:
    """See that a folder's path means itself in units, nginx's and compose files, which quote differently.

    Raises:
        UserError: if it has other signs than those.
    """
    if not PLAIN.fullmatch(str(folder)):
        raise UserError(
            f"{folder}: choose a folder whose path has only letters, digits and . _ + @ - /: units and "
            "configuration files name it"
        )


def render(template: str, values: Mapping[str, Any], folder: Path = HERE) -> str:
    """Fill in a template; every name in it must have a value.

    Args:
        template: File in the folder.
        values: What stands for the names; `{{ name | quoted }}` spells a value as TOML and YAML do, and
            `| as_command` a command's words as systemd does.
        folder: Where templates lie.
    """
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["as_command"] = shlex.join
    text = (folder / template).read_text(encoding="utf-8")
    return environment.from_string(text).render({"version": VERSION} | dict(values))
