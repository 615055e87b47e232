"""The site's policy: what the hospital allows, whatever a coordinator asks.

A policy is a TOML file (`site.toml`) of the hospital's own, strict to the key, that nobody else may write.
It names the data and the unit of privacy, declares one public size, caps the budget and lists what may run.
Rules are checked in the order of the table `RULES`; the first that objects gives the refusal. The
coordinator learns the rule's name, the site's log learns why.

Cheap rules come first, and those that bound a plan's size come before the one that prices it, so that no
request makes the site reckon for long.
"""

import os
import pwd
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from client.ledger import Budget
from common.architectures import Architecture
from common.config import Delta, FeatureKind, Layers, RunConfig
from common.errors import ConfigError, UserError
from common.messages import Rule
from common.plan import HOLD_OUT_ACCURACY, LABEL_HISTOGRAM, TERMS, Plan
from common.runs import disk_errors
from common.settings_files import read_settings
from common.strict import Strict

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
ANY = "*"
KNOWN: Mapping[str, Sequence[str]] = {
    "methods": tuple(TERMS),
    "features": get_args(FeatureKind),
    "codecs": get_args(RunConfig.model_fields["codec"].annotation),
    "purchases": (LABEL_HISTOGRAM, HOLD_OUT_ACCURACY),
}
"""What lists of names may hold. Models aren't among it: theirs are known where torch is."""

LONGEST_SOCKET_PATH = 107
"""Bytes; the kernel takes no longer path for a Unix socket."""


class DataPolicy(Strict):
    """What the site has, and the one number it declares about it."""

    description: str
    """Path of the data description (`data.toml`): the file, its columns, the patient column."""
    unit: Literal["record", "patient"]
    declared_size: Count
    """The site's public size: denominator and weight. Declared by a person, never read off the data."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the patients that no student is trained on, so that the accuracy on them may be bought."""


class BudgetPolicy(Strict):
    """Caps on ε, each at `delta`."""

    delta: Delta
    lifetime_epsilon: Positive
    study_epsilon: Positive
    run_epsilon: Positive
    attempts: Count = 3
    """How often one task may be started anew; every start is charged."""


class AllowPolicy(Strict):
    """What may run here. `*` in a list allows anything of its kind, except code by import path."""

    studies: Names
    methods: Names
    models: Names
    """Names from the registry; `module:Class` is imported only if it stands here, letter by letter."""
    features: Names
    proxies: Names
    """Digests of public sets, in hexadecimal."""
    codecs: Names
    rounds: Count
    clipping_norm: Positive
    """The largest."""
    noise_multiplier: Positive
    """The least σ of a private step."""
    purchases: Names = ()
    """Statistics that a plan may buy out of its ε: `label-histogram`, `hold-out-accuracy`."""
    steps_per_round: Count = 100
    epochs: Count = 1000
    """Passes over the public cases in one task: they cost no budget, but time."""

    @field_validator("methods", "features", "codecs", "purchases")
    @classmethod
    def _there_are_such(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = KNOWN[str(info.field_name)]
        if strange := [name for name in names if name != ANY and name not in known]:
            raise ValueError(f"some of {', '.join(known)}, or *; there is no {strange[0]!r}")
        return names

    @field_validator("proxies")
    @classmethod
    def _are_digests(cls, digests: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [one for one in digests if one != ANY and not re.fullmatch("[0-9a-f]{64}", one)]:
            raise ValueError(f"digests of 64 hexadecimal digits, or *; {wrong[0]!r} is neither")
        return digests


class StudentPolicy(Strict):
    """The student this site trains, if not the one that the coordinator proposes."""

    model: str
    features: FeatureKind = "none"
    feature_size: Count = 128
    private_layers: Layers = "head"


class SitePolicy(Strict):
    """Everything a hospital decides about its part in federations."""

    site: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
    state: str
    """Folder for the ledger, proxies, students and logs."""
    approval: bool = True
    """Whether a person must approve a plan before it runs."""
    data: DataPolicy
    budget: BudgetPolicy
    allow: AllowPolicy
    student: StudentPolicy | None = None

    def caps(self) -> Budget:
        """The budget's caps as the ledger takes them."""
        return Budget(**self.budget.model_dump())

    @property
    def import_paths(self) -> tuple[str, ...]:
        """Models that the policy itself names, and so the only ones that may be imported by path."""
        own = (self.student.model,) if self.student else ()
        return (*self.allow.models, *own)

    def architecture(self, proposed: Architecture) -> Architecture:
        """The site's own choice of student, else the proposed one."""
        chosen = self.student
        if chosen is None:
            return proposed
        return Architecture(chosen.model, chosen.features, chosen.feature_size, chosen.private_layers)

    def takes_proxy(self, digest: str) -> bool:
        """Whether a public set of this digest may be kept here."""
        return _listed(digest, self.allow.proxies)

    def refusal(self, plan: Plan) -> tuple[Rule, str] | None:
        """The first rule that objects to a plan, with the reason for the site's own log."""
        for reason, holds in RULES:
            if not holds(self, plan):
                bought = ", ".join(one.name for one in plan.purchases())
                return Rule.NOT_ALLOWED, reason.format(policy=self, plan=plan, bought=bought)
        return None


class RepliesPolicy(Strict):
    """When answers leave (`client.schedule`)."""

    every_seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
    """A release leaves at a multiple of this after its task began; 0 sends it at once, which tells of n."""


class ServicePolicy(Strict):
    """Where the custodian listens (`client.service`)."""

    listen: str
    """`unix:path/of.sock`, or `tcp:127.0.0.1:port` with the three files below."""
    certificate: str = ""
    key: str = ""
    courier_authority: str = ""
    """Certificate of the authority that signed the courier's certificate."""
    largest_message_mib: Annotated[int, Field(ge=1, le=1024)] = 64

    @field_validator("listen")
    @classmethod
    def _is_local(cls, listen: str) -> str:
        if not re.fullmatch(r"unix:.+|tcp:(127\.0\.0\.1|localhost|\[::1\]):[0-9]{1,5}", listen):
            raise ValueError("unix:PATH, or tcp:127.0.0.1:PORT")
        return listen

    @model_validator(mode="after")
    def _whole(self) -> Self:
        given = [bool(file) for file in (self.certificate, self.key, self.courier_authority)]
        if self.listen.startswith("tcp:") and not all(given):
            raise ValueError("certificate, key and courier-authority, since it listens on TCP")
        if self.listen.startswith("unix:") and any(given):
            raise ValueError("no certificate, key or courier-authority, since it listens on a Unix socket")
        return self


class ServedPolicy(SitePolicy):
    """A policy as its file has it: of what follows a simulation needs nothing."""

    key: str
    """File of the site's secret key, which seals the ledger and assigns the hold-out."""
    anchor: str
    """File of the ledger's last seal. Put it where a restored backup of `state` doesn't reach."""
    metrics: str = ""
    """File for a Prometheus textfile collector (`client.site_metrics`); empty: `metrics.prom` in `state`."""
    replies: RepliesPolicy
    service: ServicePolicy

    def beside(self, folder: Path) -> "ServedPolicy":
        """The same policy with its paths relative to the folder that it lies in."""

        def place(path: str) -> str:
            return str(folder / path) if path else ""

        service = self.service
        moved = {name: place(getattr(service, name)) for name in ("certificate", "key", "courier_authority")}
        kind, _, address = service.listen.partition(":")
        if kind == "unix":
            moved["listen"] = f"unix:{place(address)}"
        return self.model_copy(
            update={
                "state": place(self.state),
                "key": place(self.key),
                "anchor": place(self.anchor),
                "metrics": place(self.metrics),
                "data": self.data.model_copy(update={"description": place(self.data.description)}),
                "service": service.model_copy(update=moved),
            }
        )


def _listed(value: str, allowed: tuple[str, ...]) -> bool:
    return value in allowed or ANY in allowed


def _architecture_allowed(policy: SitePolicy, plan: Plan) -> bool:
    if policy.student is not None:
        return True
    # Code by import path runs only where the policy names it; the wildcard doesn't.
    model = plan.student.model
    named = model in policy.allow.models or (ANY in policy.allow.models and ":" not in model)
    return named and _listed(plan.student.features, policy.allow.features)


def _purchases_allowed(policy: SitePolicy, plan: Plan) -> bool:
    return all(_listed(one.name, policy.allow.purchases) for one in plan.purchases())


def _noisy_enough(policy: SitePolicy, plan: Plan) -> bool:
    try:
        return plan.is_as_noisy_as(policy.allow.noise_multiplier)
    except UserError:  # a plan that can't be priced
        return False


RULES: tuple[tuple[str, Callable[[SitePolicy, Plan], bool]], ...] = (
    ("allow.studies does not list {plan.study}", lambda p, plan: _listed(plan.study, p.allow.studies)),
    ("allow.methods does not list {plan.method}", lambda p, plan: _listed(plan.method, p.allow.methods)),
    (
        "allow.models or allow.features does not list {plan.student.model!r:.80} behind "
        "{plan.student.features}",
        _architecture_allowed,
    ),
    ("allow.proxies does not list {plan.proxy_digest}", lambda p, plan: p.takes_proxy(plan.proxy_digest)),
    ("allow.codecs does not list {plan.codec}", lambda p, plan: _listed(plan.codec, p.allow.codecs)),
    ("allow.purchases does not list all of {bought}", _purchases_allowed),
    ("data.hold-out is 0", lambda p, plan: p.data.hold_out > 0 or not plan.hold_out_share),
    (
        "{plan.rounds} rounds are more than allow.rounds = {policy.allow.rounds}",
        lambda p, plan: plan.rounds <= p.allow.rounds,
    ),
    (
        "{plan.steps_per_round} steps a round are more than allow.steps-per-round = "
        "{policy.allow.steps_per_round}",
        lambda p, plan: plan.steps_per_round <= p.allow.steps_per_round,
    ),
    (
        "{plan.student.epochs} epochs are more than allow.epochs = {policy.allow.epochs}",
        lambda p, plan: plan.student.epochs <= p.allow.epochs,
    ),
    (
        "clipping norm {plan.clipping_norm:g} is above allow.clipping-norm = {policy.allow.clipping_norm:g}",
        lambda p, plan: plan.clipping_norm <= p.allow.clipping_norm,
    ),
    ("unit {plan.unit} is not data.unit = {policy.data.unit}", lambda p, plan: plan.unit == p.data.unit),
    (
        "δ = {plan.delta:g} is above budget.delta = {policy.budget.delta:g}",
        lambda p, plan: plan.delta <= p.budget.delta,
    ),
    (
        "ε = {plan.epsilon:g} is above budget.run-epsilon = {policy.budget.run_epsilon:g}",
        lambda p, plan: plan.epsilon <= p.budget.run_epsilon,
    ),
    ("σ is below allow.noise-multiplier = {policy.allow.noise_multiplier:g}", _noisy_enough),
)
"""What is wrong, with the plan's value, and the rule that says so."""


def read_policy(path: Path) -> ServedPolicy:
    """Read and check `site.toml`.

    Raises:
        UserError: if the file is missing, can be written by others, is not TOML, or has a missing, unknown or
            wrong key.
    """
    require_own(path, "no policy, no service")
    with disk_errors(path, "read"):
        policy = read_settings(ServedPolicy, path)
    policy = policy.beside(path.absolute().parent)
    if len((socket_path := policy.service.listen.removeprefix("unix:")).encode()) > LONGEST_SOCKET_PATH:
        expected = f"a path of at most {LONGEST_SOCKET_PATH} bytes"
        raise ConfigError(str(path), "service.listen", socket_path, expected)
    require_own(Path(policy.data.description), "the policy's data.description")
    return policy


def require_own(path: Path, otherwise: str) -> None:
    """Refuse a file that another account could change, itself or by putting another in its place.

    Args:
        path: The file.
        otherwise: What to say, before the reason, where it can't be read.

    Raises:
        UserError: naming the file or folder and the command that mends it.
    """
    try:
        file, folder = path.stat(), path.absolute().parent.stat()
    except OSError as error:
        raise UserError(f"{path}: {otherwise}: {error.strerror}") from None
    for place, found in ((path, file), (path.absolute().parent, folder)):
        if place != path and found.st_mode & stat.S_ISVTX:
            continue  # as in /tmp, nobody can replace another's file
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"{place}: others can write it; make it yours alone: chmod go-w {place}")
        if found.st_uid not in (0, os.geteuid()):
            owner = _name_of(found.st_uid)
            raise UserError(
                f"{place}: it belongs to the account {owner}: type this as that account (sudo -u {owner} …), "
                f"or make it yours: chown {os.geteuid()} {place}"
            )


def _name_of(account: int) -> str:
    try:
        return pwd.getpwuid(account).pw_name
    except KeyError:  # as in a container
        return str(account)


def require_secret(path: Path) -> None:
    """Refuse a secret that another account could read or change.

    Raises:
        UserError: naming the file and the command that mends it.
    """
    require_own(path, "the secret can't be read")
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise UserError(f"{path}: others can read this secret; make it yours alone: chmod 600 {path}")
