"""The app bundle: what a coordinator sends to every site, and the digest by which sites know it.

Flower builds a bundle from a folder, and the same folder always makes the same bytes. A federation keeps the
folder as the bundle holds it, so that what was agreed at its founding runs until somebody agrees on another.
"""

import contextlib
import hashlib
import io
import json
import shutil
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlsplit

from common.errors import UserError


def find_project() -> Path:
    """Return this project's folder, since Flower bundles an app from its source.

    Looks around this file, in the working directory and above it, then where pip installed this software
    from.

    Raises:
        UserError: if it isn't there.
    """
    here, source = Path(__file__).resolve().parents[2], _installed_from()
    for folder in (here, Path.cwd(), *Path.cwd().parents, *source):
        with contextlib.suppress(OSError, tomllib.TOMLDecodeError, KeyError):
            settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
            if settings["project"]["name"] == "grandrounds" and "app" in settings["tool"]["flwr"]:
                return folder
    raise UserError(
        "the project's own folder is needed, with its pyproject.toml, and it is neither around the installed "
        f"package ({here}) nor where that was installed from ({source[0] if source else 'not known'}): cd to "
        "a clone of the installed version, and type this again there"
    )


def _installed_from() -> list[Path]:
    """The folder from which pip installed this software, where it noted one (PEP 610)."""
    with contextlib.suppress(PackageNotFoundError, TypeError, ValueError):
        noted = json.loads(distribution("grandrounds").read_text("direct_url.json") or "{}")
        url = urlsplit(noted["url"] if "dir_info" in noted else "")
        if url.scheme == "file":
            return [Path(unquote(url.path))]
    return []


def build(folder: Path) -> bytes:
    """Build the bundle of the app in a folder."""
    from flwr.cli.build import build_fab_from_disk

    return build_fab_from_disk(folder)


def digest_of(bundle: bytes) -> str:
    """SHA-256 in hexadecimal, as Flower names a bundle."""
    return hashlib.sha256(bundle).hexdigest()


def unpack(bundle: bytes, folder: Path) -> None:
    """Put a bundle's files into a folder, from which the same bundle can be built again."""
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:  # our own, built a moment ago
        archive.extractall(folder)
    shutil.rmtree(folder / ".info")


def known_keys(folder: Path) -> frozenset[str]:
    """The run-config keys that the app in a folder has; Flower takes no others."""
    from flwr.common.config import flatten_dict

    settings = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    return frozenset(flatten_dict(settings["tool"]["flwr"]["app"]["config"]))


def require_agreed(folder: Path, agreed: str) -> None:
    """Refuse an app that isn't the one that the sites' kits name.

    Raises:
        UserError: with both digests.
    """
    if (found := digest_of(build(folder))) != agreed:
        raise UserError(
            f"{folder} makes the bundle {found}, and {agreed} was agreed: sites refuse any other. Put the "
            "app back, or agree with every site on another: grandrounds federation adopt"
        )
