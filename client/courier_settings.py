"""The courier's settings, `courier.toml`, and the files that lie beside it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from client.policy import require_own, require_secret
from common.kit import AUTHORITY, CERTIFICATE, CERTIFICATE_KEY, NODE_KEY, Address, Digest, SiteName
from common.runs import disk_errors
from common.settings_files import read_settings
from common.strict import Strict

EXECUTOR_KEY = "superexec.key"
"""The secret between SuperNode and its executor, made at the site."""


class CourierSettings(Strict):
    """What `courier.toml` says."""

    site: SiteName
    address: Address
    """Where the coordinator's gateway listens."""
    bundle: Digest
    """SHA-256 of the only app bundle whose courier starts here."""
    custodian: Annotated[str, Field(pattern=r'^(unix:/[^"\s]+|tcp:[^"\s]+)$')]


@dataclass(frozen=True)
class CourierFolder:
    """A courier's folder, opened.

    Attributes:
        path: The folder.
        settings: Its `courier.toml`.
    """

    path: Path
    settings: CourierSettings

    @property
    def authority(self) -> Path:
        """Who signed the coordinator's certificate."""
        return self.path / AUTHORITY

    @property
    def certificate(self) -> Path:
        """What the gateway asks for."""
        return self.path / CERTIFICATE

    @property
    def certificate_key(self) -> Path:
        """Its key."""
        return self.path / CERTIFICATE_KEY

    @property
    def node_key(self) -> Path:
        """What Flower knows this site's SuperNode by."""
        return self.path / NODE_KEY

    @property
    def executor_key(self) -> Path:
        """The secret between SuperNode and executor."""
        return self.path / EXECUTOR_KEY

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME: of its own for each bundle, so that nothing that another one left is ever loaded."""
        return self.path / "flower" / self.settings.bundle


def read_courier(path: Path) -> CourierFolder:
    """Read `courier.toml` and see that the secrets beside it are ours alone.

    Raises:
        UserError: naming the file and key that are wrong, and what would be right.
    """
    require_own(path, "no settings, no courier")
    with disk_errors(path, "read"):
        settings = read_settings(CourierSettings, path)
    folder = CourierFolder(path.absolute().parent, settings)
    for secret in (folder.certificate_key, folder.node_key, folder.executor_key):
        require_secret(secret)
    for public in (folder.authority, folder.certificate):
        require_own(public, "the kit brought it")
    return folder
