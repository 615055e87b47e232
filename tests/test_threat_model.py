"""The threat model names its tests: each of them is there, and each claim has one."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
CLAIMS = re.split(r"\n(?=\d+\. \*\*)", TEXT.split("## What is not protected")[0])[1:]


def test_every_claim_names_a_test():
    assert [int(claim.split(".")[0]) for claim in CLAIMS] == list(range(1, len(CLAIMS) + 1))
    assert all("::test_" in claim for claim in CLAIMS)


def test_every_test_that_is_named_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", TEXT)
    assert len(named) >= len(CLAIMS)
    for path, name in named:
        functions = {
            node.name
            for node in ast.walk(ast.parse((ROOT / path).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert name in functions, f"{path}::{name}"
