"""Founding a site: its policy with comments, its secret key, its empty ledger and the identity of its data.

This happens once for a data source. The identity that is minted here is what all spending is booked under,
whatever later becomes of the data or of the names of studies: a site founded anew on the same patients has
a fresh ledger and would spend their budget twice.
"""

import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from client.ledger import Ledger
from client.policy import ServedPolicy
from client.served import require_patients
from common.accounting import Unit
from common.datasets.description import read_description, require_site
from common.errors import ConfigError, UserError
from common.runs import write_new
from common.settings_files import parse_settings
from common.site_files import render


@dataclass(frozen=True)
class Choices:
    """What only a person at the hospital can know.

    `description` and `listen` are as they are to stand in the policy: relative to its folder, or absolute.
    """

    site: str
    description: str
    unit: Unit
    declared_size: int
    delta: float
    lifetime_epsilon: float
    run_epsilon: float
    studies: Sequence[str]
    listen: str


def found(folder: Path, choices: Choices) -> Path:
    """Write a new site's files and return the path of its policy.

    Raises:
        UserError: if a choice is none that a policy can have, the data description isn't right, there is a
            site in the folder already, or a file can't be written.
    """
    parse_settings(ServedPolicy, written(choices), "the new site")
    if choices.run_epsilon > choices.lifetime_epsilon:
        # Later the lifetime's cap may well be lowered below a run's, to end all spending.
        expected = f"at most lifetime-epsilon = {choices.lifetime_epsilon:g}"
        raise ConfigError("the new site", "budget.run-epsilon", choices.run_epsilon, expected)
    data = Path(os.path.normpath(folder.resolve() / choices.description))  # the folder may not be there yet
    described = read_description(data)
    require_patients(data, described, choices.unit)
    require_site(data, described, choices.site)
    policy, key = folder / "site.toml", folder / "site.key"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)  # its group may reach the socket
        (folder / "state").mkdir(mode=0o700)
        secret = secrets.token_bytes(32)
        write_new(key, secret)
        Ledger.create(
            folder / "state" / "ledger.db",
            secret,
            data_source_id=secrets.token_hex(16),
            unit=choices.unit,
            anchor=folder / "ledger.anchor",
        ).close()
        write_new(policy, written(choices).encode())
    except FileExistsError as error:
        raise UserError(f"{error.filename} is there already: a site is founded once") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder} can't be written: {error.strerror}") from None
    return policy


def written(choices: Choices) -> str:
    """The policy file's text."""
    values = asdict(choices) | {
        "delta": repr(choices.delta),
        "lifetime_epsilon": float(choices.lifetime_epsilon),
        "run_epsilon": float(choices.run_epsilon),
        "studies": list(choices.studies),
    }
    return render("site.toml", values)
