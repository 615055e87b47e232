"""How every file and message of settings is read: to the letter.

An int given as a string, an unknown key, or a number that isn't finite is refused. Keys are kebab-case in
files and snake_case in Python.
"""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A frozen section of settings."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        alias_generator=lambda name: name.replace("_", "-"),
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )
