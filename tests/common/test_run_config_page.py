"""`docs/run-config.md` lists every key with its default and meaning, as `RunConfig` has them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from common.config import RunConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "run-config.md"


def allowed(field: FieldInfo) -> str:
    """Return what a key takes, in words: `one of` …, or bounds as a mathematician writes them."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    if field.annotation in (bool, str):
        return {bool: "`true`, `false`", str: "text"}[field.annotation]
    low, high = "(-∞", "∞)"
    for bound in field.metadata:
        match bound:
            case Ge(ge=value):
                low = f"[{number(value)}"
            case Gt(gt=value):
                low = f"({number(value)}"
            case Le(le=value):
                high = f"{number(value)}]"
            case Lt(lt=value):
                high = f"{number(value)})"
    return f"{'integer' if field.annotation is int else 'number'} in {low}, {high}"


def number(value: object) -> str:
    """Write 9223372036854775808 as people do: 2^63."""
    return "2^63" if value == 2**63 else f"{value:g}"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + name.replace("_", "-")
        if isinstance(field.default, BaseModel):
            yield from rows(type(field.default), key + ".")
        else:
            text_or_truth = isinstance(field.default, str | bool)
            default = json.dumps(field.default) if text_or_truth else f"{field.default:g}"
            meaning = " ".join((field.description or "").split())
            yield f"| `{key}` | `{default}` | {allowed(field)} | {meaning} |"


def test_every_key_stands_on_the_page_as_the_code_has_it():
    written = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert written == list(rows(RunConfig))
