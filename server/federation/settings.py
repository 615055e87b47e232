"""A federation's folder at the coordinator: what lies where, and the settings that a person may change."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from common.errors import UserError
from common.kit import Digest, SiteName
from common.settings_files import read_settings
from common.strict import Strict

SETTINGS = "federation.toml"
REVOKED = "revoked"
"""What the file of a revoked site's public key ends with."""

Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9._:-]{1,253}$")]


class Settings(Strict):
    """`federation.toml`."""

    name: SiteName
    host: Host
    """Name or address under which sites reach the coordinator."""
    port: Port
    """Where the gateway listens for them."""
    superlink_host: Host
    superlink_port: Port
    """Where the SuperLink listens. Its control API has no login, so only this machine may reach it."""
    bundle: Digest
    """SHA-256 of the app bundle in `app/`."""
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1, strict=False)]


@dataclass(frozen=True)
class Federation:
    """A federation's folder, opened.

    Attributes:
        path: The folder.
        settings: What its `federation.toml` says.
    """

    path: Path
    settings: Settings

    @property
    def authority(self) -> Path:
        """Certificate of the federation's own authority."""
        return self.path / "ca.crt"

    @property
    def certificate(self) -> Path:
        """Certificate of SuperLink and gateway."""
        return self.path / "server.crt"

    @property
    def certificate_key(self) -> Path:
        """Key of that certificate."""
        return self.path / "server.key"

    @property
    def app(self) -> Path:
        """The app that runs, as its bundle holds it."""
        return self.path / "app"

    @property
    def flower_home(self) -> Path:
        """What Flower's programs take for FLWR_HOME."""
        return self.path / "flower"

    @property
    def state(self) -> Path:
        """SuperLink's database and nodes, process ids, the secret between SuperLink and SuperExec."""
        return self.path / "state"

    @property
    def node_owners(self) -> Path:
        """Which of the SuperLink's nodes is which site's (`server.node_owners`)."""
        return self.state / "nodes.json"

    @property
    def logs(self) -> Path:
        """What the programs say."""
        return self.path / "logs"

    @property
    def runs(self) -> Path:
        """Results of studies."""
        return self.path / "runs"

    @property
    def superlink(self) -> str:
        """Where programs on this machine reach the SuperLink."""
        host = self.settings.superlink_host
        host = "127.0.0.1" if host == "0.0.0.0" else host
        return f"{bracketed(host)}:{self.settings.superlink_port}"

    def node_keys(self) -> Mapping[str, Path]:
        """Each site's public key; a revoked site's has another ending."""
        return {site: self.path / "nodes" / f"{site}.{self._ending(site)}" for site in self.settings.sites}

    def certificates(self) -> dict[str, Path]:
        """Every certificate that lets somebody in, by whose it is."""
        taken = [site for site in self.settings.sites if self._ending(site) != REVOKED]
        sites = {f"site {site}": self.path / "nodes" / f"{site}.crt" for site in taken}
        return {"authority": self.authority, "coordinator": self.certificate, **sites}

    def revoked(self) -> list[str]:
        """Sites that may take part no more."""
        return [site for site in self.settings.sites if self._ending(site) == REVOKED]

    def _ending(self, site: str) -> str:
        return REVOKED if (self.path / "nodes" / f"{site}.{REVOKED}").exists() else "pub"


def bracketed(host: str) -> str:
    """Write an IPv6 address as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def open_federation(path: Path) -> Federation:
    """Read a federation's settings.

    Raises:
        UserError: if there is no federation in the folder, or its settings are wrong.
    """
    file = path / SETTINGS
    try:
        settings = read_settings(Settings, file)
    except OSError as error:
        raise UserError(
            f"{file}: no federation here: {error.strerror}; grandrounds federation init makes one"
        ) from None
    return Federation(path.absolute(), settings)
