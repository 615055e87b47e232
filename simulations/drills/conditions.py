"""What goes wrong without anybody dying: the network, the clock, the disk, keys and certificates.

Each drill says what it expects of whoever is concerned: a study that completes, or one clear line.
"""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from common.errors import UserError
from common.runs import working_folder
from server.federation.authority import (
    Credentials,
    certify_courier,
    certify_server,
    found_authority,
    make_node_key,
)
from server.results import ROUNDS
from simulations.drills.local import COORDINATOR, Local, Study, wait
from simulations.drills.network import Network

STUDY_PATIENCE = 1200.0
LINE_IS_DOWN = 30.0
LOSS, DELAY = 0.2, 0.1
"""Share of packets that a bad line loses each way, and seconds that it takes each way."""
DISK = 3 << 20
"""Bytes of a small disk."""
PATIENCE = 60.0
"""Seconds for a program to say what is wrong."""
OVER = timedelta(minutes=-1)
"""How long a certificate lasts that has run out."""
CLOCK = "/usr/lib/*/faketime/libfaketime.so.1"


@dataclass
class Stage:
    """A drill under way.

    Attributes:
        local: The federation.
        say: Tells whoever watches.
        studies: What ran.
        findings: What was not as expected.
    """

    local: Local
    say: Callable[[str], None]
    studies: list[Study] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)

    @property
    def network(self) -> Network:
        """The network, which these drills need."""
        assert self.local.network is not None
        return self.local.network

    def begin(self, name: str, **changes: object) -> Study:
        """Begin a study."""
        study = Study(self.local, name, changes)
        self.studies.append(study)
        study.begin()
        return study

    def complete(self, study: Study, resumes: int = 0) -> None:
        """Let a study end; more resumes than these are a finding."""
        study.to_its_end(STUDY_PATIENCE, resumes)
        self.say(f"{study.name}: {'completed' if study.result else study.failures[-1:]}")

    def expect(self, name: str, pattern: str, since: int = 0) -> None:
        """Wait for a program to say something."""
        if wait(lambda: re.search(pattern, self.local.said(name)[since:]) is not None, PATIENCE):
            said = self.local.said(name)[since:].splitlines()
            line = next((line for line in said if re.search(pattern, line)), pattern)
            self.say(f"{name}: {line.strip()[:300]}")
        else:
            self.findings.append(f"{name} did not say {pattern!r}: {self.local.said(name)[-300:]}")

    def await_rounds(self, study: Study, rounds: int) -> None:
        """Wait until so many rounds of a study are over."""
        noted = working_folder(self.local.federation.runs / study.name) / ROUNDS

        def there() -> bool:
            return study.ended() or (noted.exists() and noted.read_text().count("\n") >= rounds)

        if not wait(there, STUDY_PATIENCE) or study.ended():
            self.findings.append(f"{study.name} broke off too early: {study.failures}")

    def heard(self, name: str) -> int:
        """How much a program has said so far."""
        return len(self.local.said(name))


def lost_network(stage: Stage) -> None:
    """Every line of the coordinator's is down for 30 s in the middle of a study."""
    study = stage.begin("lost-network")
    stage.await_rounds(study, 1)
    stage.network.cut.add(COORDINATOR)
    stage.say(f"the network is gone for {LINE_IS_DOWN:g} s")
    time.sleep(LINE_IS_DOWN)
    stage.network.cut.clear()
    stage.complete(study)


def bad_line(stage: Stage) -> None:
    """Every line loses a fifth of its packets and takes 0.1 s each way, from beginning to end."""
    stage.network.loss, stage.network.delay = LOSS, DELAY
    study = stage.begin("bad-line", **{"num-rounds": 3, "round-timeout": 600.0})
    stage.complete(study)
    stage.network.loss = stage.network.delay = 0.0


def wrong_clock(stage: Stage) -> None:
    """A courier's clock is an hour ahead of the coordinator's, then an hour behind; then the custodian's."""
    local, site = stage.local, stage.local.sites[0]
    late = r"3[56]\d\d s behind|not yet valid"
    for shift, says in (("+3600", r"36\d\d s ahead of"), ("-3600", late)):
        with _clock(local, site, shift):
            _courier_says(stage, site, says)
            if shift == "+3600":
                stage.complete(stage.begin("without-a-clock"))
    local.run_courier(site)
    local.await_nodes()
    for shift, way in (("+3600", "ahead"), ("-3600", "behind")):
        with _clock(local, f"{site} custodian", shift):
            local.run_custodian(site)
            stage.complete(stage.begin(f"custodian-{way}"))
    local.run_custodian(site)
    wrong_clock_at_the_coordinator(stage)


def wrong_clock_at_the_coordinator(stage: Stage) -> None:
    """The clock that sites meet, that of SuperLink and gateway, is an hour ahead, then behind, then right."""
    local, site = stage.local, stage.local.sites[0]
    for shift, says in (("+3600", r"3[56]\d\d s behind"), ("-3600", r"36\d\d s ahead of")):
        with _clock(local, COORDINATOR, shift):
            local.run_front()
        local.await_superlink()
        _courier_says(stage, site, says)
    local.run_front()
    local.await_superlink()
    local.run_courier(site)
    local.await_nodes()
    stage.complete(stage.begin("right-again"))


def full_disk_at_a_site(stage: Stage) -> None:
    """A site's disk fills up in the middle of a study; afterwards there is room again."""
    local, site = stage.local, stage.local.sites[0]
    local.services.retire(f"{site} custodian")
    with _small_disk(local.site(site) / "custodian" / "state") as fill:
        local.run_custodian(site)
        study = stage.begin("full-at-site")
        stage.await_rounds(study, 1)
        with fill():
            stage.say(f"{site}'s disk is full")
            stage.complete(study)
            stage.expect(f"{site} custodian", r"disk.*full|full.*disk|No space left")
        stage.complete(stage.begin("room-at-site"))
        local.services.retire(f"{site} custodian")
    local.run_custodian(site)


def full_disk_at_the_coordinator(stage: Stage) -> None:
    """The disk with the study's results fills up; the study breaks off, and is resumed when there is room."""
    with _small_disk(stage.local.federation.runs) as fill:
        stage.local.run_coordinator()  # whoever ran before still sees the large disk
        study = stage.begin("full-at-coordinator")
        stage.await_rounds(study, 1)
        with fill():
            stage.say("the coordinator's disk is full")
            wait(study.ended, STUDY_PATIENCE)
        said = " ".join(study.failures)
        stage.say(said)
        if "disk is full" not in said and "No space left" not in said:
            stage.findings.append(f"a full disk was told as {said!r}")
        stage.complete(study, resumes=1)
    stage.local.run_coordinator()


def doors(stage: Stage) -> None:
    """Certificates that ran out or are another's, an unknown key, a site that is revoked."""
    local, site = stage.local, stage.local.sites[0]
    courier, federation = local.site(site) / "courier", local.federation
    ours = Credentials(federation.authority.read_bytes(), (federation.path / "ca" / "ca.key").read_bytes())
    other = found_authority("another")
    expired = certify_courier(ours, site, OVER)
    expired_server = certify_server(ours, [federation.settings.host, "localhost", "127.0.0.1"], OVER)
    strange = certify_courier(other, site)
    wrong = (
        ({"courier.crt": expired.certificate, "courier.key": expired.key}, r"courier\.crt ran out on"),
        ({"ca.crt": other.certificate}, r"shows a certificate that is refused"),
        ({"courier.crt": strange.certificate, "courier.key": strange.key}, r"does not take .*courier\.crt"),
        ({"node.key": make_node_key().private}, r"SuperLink doesn't know its"),
    )
    for files, says in wrong:
        with _instead(courier, files):
            _courier_says(stage, site, says)
    with _instead(
        federation.path, {"server.crt": expired_server.certificate, "server.key": expired_server.key}
    ):
        local.run_gateway()
        _courier_says(stage, site, r"certificate has expired")
    local.run_gateway()
    local.await_nodes()
    done = local.call("federation", "revoke", federation.path, site)
    stage.say(done.stdout.splitlines()[0] if done.stdout else done.stderr)
    local.run_gateway()
    stage.expect(f"{site} courier", r"has revoked site")
    if (status := local.nodes().get(site)) != "revoked":
        stage.findings.append(f"{site} is {status} after it was revoked")
    stage.complete(stage.begin("without-the-revoked"))


CONDITIONS: dict[str, Callable[[Stage], None]] = {
    "lost-network": lost_network,
    "bad-line": bad_line,
    "wrong-clock": wrong_clock,
    "full-disk-site": full_disk_at_a_site,
    "full-disk-coordinator": full_disk_at_the_coordinator,
    "doors": doors,
}
"""By what goes wrong."""


def _courier_says(stage: Stage, site: str, pattern: str) -> None:
    """Start a site's courier again and wait for what it has to say."""
    since = stage.heard(f"{site} courier")
    stage.local.run_courier(site)
    stage.expect(f"{site} courier", pattern, since)


@contextlib.contextmanager
def _clock(local: Local, place: str, shift: str) -> Iterator[None]:
    """Let a place's programs that start within see another time of day, by so many seconds."""
    found = sorted(Path("/").glob(CLOCK.removeprefix("/")))
    if not found:
        raise UserError(
            "a wrong clock needs libfaketime (Debian: apt-get install libfaketime): it is not here"
        )
    local.environments[place] = {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME": shift,
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "FAKETIME_CACHE_DURATION": "1000000",  # nginx clears its environment, and it isn't to be read again
    }
    try:
        yield
    finally:
        del local.environments[place]


@contextlib.contextmanager
def _small_disk(folder: Path) -> "Iterator[Callable[[], contextlib.AbstractContextManager[None]]]":
    """Let a folder with all in it lie on a disk of its own, of few bytes; gives what fills it."""
    kept = folder.with_name(f"{folder.name}-kept")
    shutil.copytree(folder, kept, copy_function=shutil.copy2)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=700", "drill", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"no small disk can be mounted: {done.stderr.strip()}")

    @contextlib.contextmanager
    def fill() -> Iterator[None]:
        ballast = folder / ".ballast"
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield
        ballast.unlink()

    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield fill
        shutil.rmtree(kept)
        shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("*.sock"))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        shutil.rmtree(kept)


@contextlib.contextmanager
def _instead(folder: Path, files: dict[str, bytes]) -> Iterator[None]:
    """Let files hold something else meanwhile."""
    before = {name: (folder / name).read_bytes() for name in files}
    try:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        yield
    finally:
        for name, content in before.items():
            (folder / name).write_bytes(content)
