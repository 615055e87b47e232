"""The app bundle: found, built the same every time, and held against what was agreed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from server.federation.bundle import build, digest_of, find_project, require_agreed, unpack


def test_the_project_is_found_around_the_package() -> None:
    assert (find_project() / "server" / "federation" / "bundle.py").is_file()


def test_a_project_that_is_not_there_is_missed_in_plain_words(tmp_path: Path) -> None:
    """As when only the packages are installed and the working directory is somewhere else."""
    here = find_project()
    for package in ("common", "server"):
        shutil.copytree(here / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "someone-elses"\n')
    metadata = tmp_path / "grandrounds-1.dist-info" / "METADATA"  # of an installation from nowhere known
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: grandrounds\nVersion: 1\n")
    script = "from server.federation.bundle import find_project; find_project()"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "UserError: the project's own folder is needed" in done.stderr
    assert str(tmp_path) in done.stderr and "cd to a clone of the installed version" in done.stderr


@pytest.mark.slow
def test_the_project_is_found_where_it_was_installed_from(tmp_path: Path) -> None:
    """Installed by pip from its folder, whatever that is called, and asked from somewhere else."""
    here, project, installed = find_project(), tmp_path / "a clone", tmp_path / "installed"
    for package in ("common", "server", "client", "simulations"):
        shutil.copytree(here / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "grandrounds.py"):
        shutil.copy(here / file, project)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", installed, project], cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from server.federation import bundle; print(bundle.__file__, bundle.find_project())",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"{installed / 'server' / 'federation' / 'bundle.py'} {project}"


def test_what_a_bundle_holds_makes_the_same_bundle_again(tmp_path: Path) -> None:
    bundle = build(find_project())
    unpack(bundle, tmp_path / "app")
    assert build(tmp_path / "app") == bundle
    require_agreed(tmp_path / "app", digest_of(bundle))


def test_an_edited_page_leaves_the_digest_as_it_is_and_edited_code_does_not(tmp_path: Path) -> None:
    """Sites agree on what runs: nobody has to ask them about a page's wording."""
    project, app = find_project(), tmp_path / "app"
    for name in ("common", "server", "client", "simulations", "docs"):
        shutil.copytree(project / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(project / name, app / name)
    agreed = digest_of(build(project))
    assert digest_of(build(app)) == agreed
    pages = sorted(app.rglob("*.md"))
    assert {app / "README.md", app / "docs" / "deploy.md"} <= set(pages)
    for page in pages:
        page.write_text(page.read_text() + "Another line.\n")
    assert digest_of(build(app)) == agreed
    with (app / "client" / "student.py").open("a") as file:
        file.write("# another line\n")
    assert digest_of(build(app)) != agreed


def test_another_app_than_the_agreed_one_is_refused_with_both_digests(tmp_path: Path) -> None:
    agreed = digest_of(build(find_project()))
    unpack(build(find_project()), tmp_path / "app")
    with (tmp_path / "app" / "client" / "app.py").open("a") as file:
        file.write("# another one\n")
    with pytest.raises(UserError) as refused:
        require_agreed(tmp_path / "app", agreed)
    assert agreed in str(refused.value) and digest_of(build(tmp_path / "app")) in str(refused.value)
