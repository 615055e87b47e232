"""Settings files of our own, TOML read to the letter: a site's policy, its courier's, a federation's.

Run configs are read by `common.run_config_files`, and descriptions of data, which explain more, by
`common.datasets.description`.
"""

import tomllib
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from common.config import first_complaint
from common.errors import UserError
from common.strict import Strict

Settings = TypeVar("Settings", bound=Strict)


def read_settings(kind: type[Settings], path: Path) -> Settings:
    """Read a file.

    Raises:
        OSError: if it can't be read.
        UserError: if it isn't TOML, or has a missing, unknown or wrong key; it names the file and the key.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    return parse_settings(kind, text, str(path))


def parse_settings(kind: type[Settings], text: str, where: str) -> Settings:
    """Check the text of a file.

    Args:
        kind: What it is.
        text: The text.
        where: What it came from, for messages.

    Raises:
        UserError: if it isn't TOML, or has a missing, unknown or wrong key.
    """
    try:
        return kind.model_validate(tomllib.loads(text), by_alias=True, by_name=False)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise first_complaint(error, where) from None
