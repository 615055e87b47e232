"""Run configuration as people write it: TOML files, and `key=value` pairs as for Flower's `--run-config`.

Both sides read it: a coordinator to start a run, a hospital to ask what such a run would cost.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import RunConfig, Scalar
from common.errors import ConfigError, UserError

INPUTS = ("data.description", "data.folder", "teacher.path")
"""Keys that name what a run reads: in a TOML file, relative to that file; else to the working directory."""


def read_run_config(sources: Sequence[str]) -> RunConfig:
    """Put a run's configuration together; later sources win over earlier ones, all over the defaults.

    Args:
        sources: Each a TOML file, or `key=value` pairs.

    Raises:
        UserError: naming what is wrong and where.
    """
    return RunConfig.from_run_config(read_given(sources))


def read_given(sources: Sequence[str]) -> dict[str, Scalar]:
    """Read what stands in the sources, and no defaults; later ones win.

    Raises:
        UserError: naming what is wrong and where.
    """
    flat: dict[str, Scalar] = {}
    for source in sources:
        where, values = _read(source)
        RunConfig.from_run_config(values, where)
        flat |= values
    return flat


def as_toml(flat: Mapping[str, Scalar]) -> str:
    """Write a flat run config as TOML, which spells scalars as JSON does, but for one control character."""
    spelt = {key: json.dumps(value, ensure_ascii=False) for key, value in flat.items()}
    return "".join(f"{key} = {value}\n" for key, value in spelt.items()).replace("\x7f", "\\u007f")


def _read(source: str) -> tuple[str, dict[str, Scalar]]:
    """Read one source; a source that ends in .toml and holds no `=` is a file."""
    is_file = source.endswith(".toml") and "=" not in source
    try:
        text = Path(source).read_text(encoding="utf-8-sig") if is_file else _lines(source)
        tree = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{source}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        pairs = "key=value pairs, strings in quotes, such as 'method=\"fedmd\" num-rounds=10'"
        expected = "valid TOML" if is_file else pairs
        raise UserError(f"--run-config {source!r}: expected {expected} ({error})") from None
    where = source if is_file else "--run-config"
    values = dict(_leaves(tree, where))
    return where, _beside(Path(source).parent, values) if is_file else values


def _beside(folder: Path, values: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Read the paths of input files that a file names as relative to its own folder."""
    found = {key: value for key in INPUTS if isinstance(value := values.get(key), str) and value}
    return {**values, **{key: str(folder / value) for key, value in found.items()}}


def _lines(pairs: str) -> str:
    """Put `a.b=1 c="x y"` on a line each, as Flower does: a pair ends at a space outside of quotes."""
    lines, quoted, word = [], "", ""
    for character in pairs.strip() + " ":
        if character.isspace() and not quoted:
            if word:
                lines.append(word)
            word = ""
            continue
        if character in "\"'":
            quoted = "" if quoted == character else quoted or character
        word += character
    return "\n".join([*lines, word])  # a word is left where a quote is not closed


def _leaves(tree: Mapping[str, object], where: str, prefix: str = "") -> list[tuple[str, Scalar]]:
    found: list[tuple[str, Scalar]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found += _leaves(value, where, f"{prefix}{key}.")
        elif isinstance(value, str | int | float | bool):
            found.append((prefix + key, value))
        else:
            raise ConfigError(
                where, prefix + key, value, "a string, a number or a boolean (run config holds no lists)"
            )
    return found
