"""`docs/run-config.md` lists every key with its default and meaning, as `RunConfig` has them."""

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from common.config import RunConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "run-config.md"


def rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = prefix + name.replace("_", "-")
        if isinstance(field.default, BaseModel):
            yield from rows(type(field.default), key + ".")
        else:
            text_or_truth = isinstance(field.default, str | bool)
            default = json.dumps(field.default) if text_or_truth else f"{field.default:g}"
            yield f"| `{key}` | `{default}` | {' '.join((field.description or '').split())} |"


def test_every_key_stands_on_the_page_as_the_code_has_it():
    written = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert written == list(rows(RunConfig))
