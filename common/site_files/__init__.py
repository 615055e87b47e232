"""Texts that a site's folder is made of: policy, courier's settings, units, compose file, the page to read.

They are templates (Jinja, `{{ }}`) in this folder. A coordinator renders them for the places where things
usually lie and puts them into a kit, so that a hospital can read what it will run; `grandrounds site join`
renders them again from the hospital's own software, for the places where things lie there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from common import VERSION

HERE = Path(__file__).parent


def render(template: str, values: Mapping[str, Any], folder: Path = HERE) -> str:
    """Fill in a template; every name in it must have a value.

    Args:
        template: File in the folder.
        values: What stands for the names; `{{ name | quoted }}` spells a value as TOML and YAML do.
        folder: Where templates lie.
    """
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["quoted"] = lambda value: json.dumps(value, ensure_ascii=False)
    text = (folder / template).read_text(encoding="utf-8")
    return environment.from_string(text).render({"version": VERSION} | dict(values))
