"""Founding a site: its policy with comments, its secret key, its empty ledger and the identity of its data.

This happens once for a data source. The identity that is minted here is what all spending is booked under,
whatever later becomes of the data or of the names of studies: a site founded anew on the same patients has
a fresh ledger and would spend their budget twice.
"""

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.ledger import Ledger
from client.policy import parse_policy
from client.served import require_patients
from common.accounting import Unit
from common.datasets.description import read_description
from common.errors import ConfigError, UserError

POLICY = """\
# What this site allows, whatever a coordinator asks. Nobody but its owner may write this file.
# Paths are relative to the folder that it lies in.

site = {site}
# Ledger, public sets, students, log of releases. Nobody else needs to read it.
state = "state"
# The site's secret: it seals the ledger. Keep a copy in a safe place; without it the ledger can't be read.
key = "site.key"
# The ledger's last seal, to notice an older copy of the ledger. Move it to where a restored backup of `state`
# doesn't reach.
anchor = "ledger.anchor"
# Must a person approve a plan (`grandrounds site approve`) before it runs?
approval = true

[data]
# Which file, which columns, which of them names the patient: see docs/own-data.md.
description = {description}
# What one unit of privacy is: a "patient" with all records, or a "record".
unit = {unit}
# The public size of this site: denominator of every step and weight in the ensemble. A round number, known to
# everybody, that a person chose; how many records there are is nobody's business.
declared-size = {declared_size}
# Share of the patients that no student is ever trained on (see allow.purchases).
hold-out = 0.0

[budget]
# Caps on ε, each at this δ, for everything that is ever done to these patients, for one study, for one run.
delta = {delta}
lifetime-epsilon = {lifetime_epsilon}
study-epsilon = {run_epsilon}
run-epsilon = {run_epsilon}
# How often one task may be started anew after a failure. Every start is charged.
attempts = 3

[allow]
# "*" allows anything of its kind, but never code by import path: "module:Class" must stand here itself.
studies = {studies}
methods = ["descent", "oneshot", "fedmd"]
models = ["linear", "mlp", "cnn", "resnet-gn"]
features = ["none", "pca", "scattering"]
# Digests of public sets (sha256, hexadecimal). "*" lets a study bring its own.
proxies = ["*"]
codecs = ["int8", "fp16"]
rounds = 200
clipping-norm = 10.0
# The least σ of a private step.
noise-multiplier = 0.5
# Statistics that a study may buy out of its own ε: "label-histogram" counts its labels, "hold-out-accuracy"
# how often its student is right on the patients that data.hold-out keeps from all training.
purchases = []

[replies]
# A release leaves at a whole multiple of so many seconds after its task began, so that its time doesn't tell
# how many records there are. Choose more than a task ever takes. 0 switches this off.
every-seconds = 30.0

[service]
# A Unix socket, for the owner and the group of its folder. Or "tcp:127.0.0.1:7443" with three files:
# certificate and key of this service, and courier-authority, the certificate of who signed the courier's.
listen = {listen}
"""


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
    parse_policy(written(choices), "the new site")
    if choices.run_epsilon > choices.lifetime_epsilon:
        # Later the lifetime's cap may well be lowered below a run's, to end all spending.
        expected = f"at most lifetime-epsilon = {choices.lifetime_epsilon:g}"
        raise ConfigError("the new site", "budget.run-epsilon", choices.run_epsilon, expected)
    data = Path(os.path.normpath(folder.resolve() / choices.description))  # the folder may not be there yet
    require_patients(data, read_description(data), choices.unit)
    policy, key = folder / "site.toml", folder / "site.key"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o750)  # its group may reach the socket
        (folder / "state").mkdir(mode=0o700)
        secret = secrets.token_bytes(32)
        _write_new(key, secret)
        Ledger.create(
            folder / "state" / "ledger.db",
            secret,
            data_source_id=secrets.token_hex(16),
            unit=choices.unit,
            anchor=folder / "ledger.anchor",
        ).close()
        _write_new(policy, written(choices).encode())
    except FileExistsError as error:
        raise UserError(f"{error.filename} is there already: a site is founded once") from None
    except OSError as error:
        raise UserError(f"{error.filename or folder} can't be written: {error.strerror}") from None
    return policy


def written(choices: Choices) -> str:
    """The policy file's text."""
    return POLICY.format(
        site=_quoted(choices.site),
        description=_quoted(choices.description),
        unit=_quoted(choices.unit),
        declared_size=choices.declared_size,
        delta=repr(choices.delta),
        lifetime_epsilon=float(choices.lifetime_epsilon),
        run_epsilon=float(choices.run_epsilon),
        studies=f"[{', '.join(map(_quoted, choices.studies))}]",
        listen=_quoted(choices.listen),
    )


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # as TOML writes text, too


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that wasn't there, for the owner's eyes only."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
