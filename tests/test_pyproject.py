"""`pyproject.toml` says to Flower what the code says, and the bundle has what the app needs and no more."""

import io
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import flatten_dict

from common import VERSION
from common.config import RunConfig

PROJECT = Path(__file__).resolve().parents[1]
BUNDLE_LIMIT = 2 * 2**20
"""Bytes; Flower's own limit is 10 MB, but the bundle goes to every site."""


@pytest.fixture(scope="module")
def settings() -> dict[str, object]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]


@pytest.fixture(scope="module")
def bundle() -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(build_fab_from_disk(PROJECT)))


def test_flower_accepts_the_project_without_a_warning() -> None:
    _, warnings = load_and_validate(PROJECT / "pyproject.toml")
    assert not warnings


def test_the_apps_defaults_are_those_of_the_run_config(settings: dict[str, dict]) -> None:
    defaults = flatten_dict(settings["app"]["config"])
    expected = RunConfig().flat()
    assert defaults == expected
    assert {k: type(v) for k, v in defaults.items()} == {k: type(v) for k, v in expected.items()}


def test_flower_is_given_no_table_that_makes_it_rewrite_the_file(settings: dict[str, object]) -> None:
    assert "federations" not in settings


def test_the_bundle_has_the_app_with_its_tables_and_scenarios(bundle: zipfile.ZipFile) -> None:
    names = set(bundle.namelist())
    for package in ("common", "server", "client"):
        sources = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / package).rglob("*.py")}
        assert sources <= names
    for pattern in ("common/datasets/*.json", "simulations/scenarios/*.toml"):
        files = {path.relative_to(PROJECT).as_posix() for path in PROJECT.glob(pattern)}
        assert files and files <= names
    assert "LICENSE" in names


def test_the_bundle_has_nothing_else(bundle: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in bundle.namelist()}
    allowed = {"common", "server", "client", "simulations", "LICENSE", "pyproject.toml", ".info"}
    assert tops <= allowed
    stray = [n for n in bundle.namelist() if n.startswith("simulations/") and not n.endswith(".toml")]
    assert not stray
    assert sum(entry.compress_size for entry in bundle.infolist()) < BUNDLE_LIMIT


def test_the_version_that_programs_know_is_the_packages() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION
