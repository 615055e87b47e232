"""Images and compose files, as far as they can be held without a Docker engine.

The Dockerfile is linted by hadolint, compose files are read by docker compose itself, and what the build
stage copies is installed here: the entry point must start from it alone.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import VERSION
from common.site_files import render

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
PROGRAMS = Path(sys.executable).parent
"""Where this environment's tools lie: docker-compose and hadolint come as packages."""
FEDERATION = ROOT / "server" / "federation" / "templates"
COORDINATOR = {"folder": "/srv/fed", "port": 8443}
SITE = {"folder": "/var/lib/grandrounds", "data": "/srv/Data of $ward: 3"}


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def composed(text: str, folder: Path) -> dict[str, dict]:
    """A compose file's services as docker compose understands them."""
    (folder / "compose.yaml").write_text(text)
    shown = run(PROGRAMS / "docker-compose", "-f", folder / "compose.yaml", "config")
    services: dict[str, dict] = yaml.safe_load(shown)["services"]
    return services


def mounts(service: dict) -> dict[str, bool]:
    """Where a service's mounts are, and whether it may write there."""
    assert all(mount["type"] == "bind" for mount in service["volumes"])
    return {
        mount["source"].replace("$$", "$"): not mount.get("read_only", False) for mount in service["volumes"]
    }


@pytest.fixture
def site(tmp_path) -> dict[str, dict]:
    return composed(render("compose.yaml", SITE), tmp_path)


@pytest.fixture
def coordinator(tmp_path) -> dict[str, dict]:
    return composed(render("compose.yaml", COORDINATOR, FEDERATION), tmp_path)


def test_the_dockerfile_passes_its_linter():
    run(PROGRAMS / "hadolint", ROOT / "deploy" / "Dockerfile")


def test_images_that_compose_files_name_are_built_by_the_dockerfile(site, coordinator):
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE))
    ours = {service["image"] for service in [*site.values(), *coordinator.values()]} - {"nginx:1.28.0-alpine"}
    assert ours == {f"grandrounds-{target}:{VERSION}" for target in ("site", "coordinator")}
    for image in ours:
        target = image.removeprefix("grandrounds-").partition(":")[0]
        assert target in targets and re.search(rf"--target {target} +-t {image} ", DOCKERFILE)


def test_no_container_is_root_or_keeps_a_privilege(site, coordinator):
    for service in [*site.values(), *coordinator.values()]:
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].partition(":")[0]) >= 10000
        assert "privileged" not in service
    for target in ("coordinator", "site"):
        stage = DOCKERFILE.partition(f" AS {target}\n")[2].partition("\nFROM")[0]
        assert re.search(r"^USER 1000[01]:10000$", stage, re.MULTILINE)


def test_the_custodian_has_no_network_and_the_courier_no_data(site):
    custodian, courier = site["custodian"], site["courier"]
    assert custodian["network_mode"] == "none" and not {"ports", "networks"} & custodian.keys()
    assert "ports" not in courier and custodian["user"] != courier["user"]
    folder = SITE["folder"]
    assert mounts(custodian) == {f"{folder}/custodian": True, f"{folder}/door": True, SITE["data"]: False}
    assert mounts(courier) == {f"{folder}/courier": True, f"{folder}/door": False}


def test_only_the_gateway_is_reached_and_nobody_sees_the_authoritys_key_or_the_kits(coordinator):
    assert [name for name, service in coordinator.items() if "ports" in service] == ["gateway"]
    for name, service in coordinator.items():
        assert name == "gateway" or service["network_mode"] == "service:gateway"
        assert not {place for place in mounts(service) if place.split("/")[3] in ("ca", "kits")}
        assert "/srv/fed" not in mounts(service)
    seen = {Path(place).name for place in mounts(coordinator["gateway"])}
    assert seen == {"nginx.conf", "ca.crt", "server.crt", "server.key", "gateway", "logs"}


@pytest.mark.slow
def test_what_the_build_stage_copies_installs_to_programs_that_start(tmp_path):
    allowed = {
        line[1:]
        for line in (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
        if line[0] == "!"
    }
    project, installed = tmp_path / "project", tmp_path / "installed"
    project.mkdir()
    stage = DOCKERFILE.partition(" AS build\n")[2].partition("\nFROM")[0]
    for line in re.findall(r"^COPY (.+)$", stage, re.MULTILINE):
        *sources, destination = line.split()
        for source in sources:
            assert source in allowed, f"{source} is copied, and .dockerignore leaves it out"
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / source, project / destination, ignore=ignored)
            else:
                shutil.copy(ROOT / source, project / destination / source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    run(*pip, "--target", installed, project)
    alone = os.environ | {"PYTHONPATH": str(installed)}
    for command in (
        ["site", "serve"],
        ["site", "courier"],
        ["federation", "superlink"],
        ["federation", "register"],
    ):
        assert "Usage" in run(
            sys.executable, "-P", "-m", "grandrounds", *command, "--help", env=alone, cwd=tmp_path
        )
    found = "import common.site_files as f, server.federation.provisioning as p; print(f.HERE, p.TEMPLATES)"
    here, templates = run(sys.executable, "-P", "-c", found, env=alone, cwd=tmp_path).split()
    for folder, source in ((here, ROOT / "common/site_files"), (templates, FEDERATION)):
        assert Path(folder).is_relative_to(installed)
        expected = {
            path.relative_to(source) for path in source.rglob("*") if path.suffix not in (".py", ".pyc")
        }
        assert {path for path in expected if (source / path).is_file()} <= {
            path.relative_to(folder) for path in Path(folder).rglob("*")
        }
