"""The rooms of the design, held by their doors: who may import whom, and who may open private records."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "common": {"server", "client", "simulations"},
    "server": {"client", "simulations"},
    "client": {"server", "simulations"},
}
READERS = {"load_private", "read_site_records"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_one_it_must_not(room):
    assert sources(room)
    for path in sources(room):
        forbidden = {name for name in imported(path) if name.split(".")[0] in ROOMS[room]}
        assert not forbidden, f"{path.relative_to(ROOT)} imports {sorted(forbidden)}"


def test_only_one_module_opens_private_records():
    openers = set()
    for room in (*ROOMS, "simulations"):
        for path in sources(room):
            if "common/datasets" in path.as_posix():
                continue  # where the readers are defined
            if any(name.split(".")[-1] in READERS for name in imported(path)):
                openers.add(path.relative_to(ROOT).as_posix())
    assert openers == {"client/private_data.py"}


def test_the_courier_needs_neither_torch_nor_opacus_nor_data():
    heavy = ["torch", "opacus", "pyarrow", "dp_accounting", "client.private_data"]
    program = f"import sys, client.app; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"


def test_nothing_reads_or_writes_pickles():
    for room in (*ROOMS, "simulations"):
        for path in sources(room):
            assert not imported(path) & {"pickle", "cloudpickle", "dill", "joblib"}, path
            assert not re.search(r"(?<!safetensors\.)torch\.load\(", path.read_text()), path


def test_files_stay_readable():
    long = [
        path
        for room in (*ROOMS, "simulations")
        for path in sources(room)
        if len(path.read_text().splitlines()) > 650
    ]
    assert not [path for path in long if "_pb2" not in path.name]
