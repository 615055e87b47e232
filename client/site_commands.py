"""`grandrounds site`: what a hospital does with its custodian, from its founding to its books.

What a command needs is imported inside it, so that the service starts light and no command waits for torch
in vain.
"""

import getpass
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.accounting import Unit
from common.errors import UserError
from common.logs import VARIABLE, form_named, log_to_stderr
from common.rounding import at_most

if TYPE_CHECKING:
    from client.ledger import Entry
    from common.kit import Kit, Proposal

T = TypeVar("T")
site = typer.Typer(
    help="A hospital's own side: found, check, serve a site; read its books. Exit codes: 0 all is well, 1 a "
    "check failed, nobody serves, the ledger can't be trusted or a plan wasn't approved, 2 something for you "
    "to put right.",
    no_args_is_help=True,
)
screen = Console(soft_wrap=True, highlight=False)

DELTA = 1e-5
PLAN_HELP = "A plan's file, or the digest (its beginning will do) of one that a courier brought."
DataFile = Annotated[Path | None, typer.Option("--data", help="The data description, data.toml.")]
UnitOf = Annotated[Unit | None, typer.Option("--unit", help="Unit of privacy: patient or record.")]
DeclaredSize = Annotated[
    int | None, typer.Option("--declared-size", help="The site's public size: a round number.")
]
LifetimeEpsilon = Annotated[float | None, typer.Option("--lifetime-epsilon", help="Cap on ε, for ever.")]
RunEpsilon = Annotated[float | None, typer.Option("--run-epsilon", help="Cap on ε for one run.")]
Studies = Annotated[list[str] | None, typer.Option("--study", help="A study that may run; may be repeated.")]
KitFile = Annotated[Path, typer.Argument(metavar="KIT", help="The file that the coordinator handed over.")]
Seal = Annotated[str | None, typer.Option("--seal", help="The kit's SHA-256, as the coordinator told it.")]
PolicyFile = Annotated[Path, typer.Option("--policy", help="The site's policy, site.toml.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]


@site.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the site's files go.")],
    name: Annotated[str | None, typer.Option(help="The site's name, as coordinators will see it.")] = None,
    data: DataFile = None,
    unit: UnitOf = None,
    declared_size: DeclaredSize = None,
    lifetime_epsilon: LifetimeEpsilon = None,
    run_epsilon: RunEpsilon = None,
    study: Studies = None,
    delta: Annotated[float, typer.Option(help="δ of all caps.")] = DELTA,
    listen: Annotated[str | None, typer.Option(help="Where to listen; default: a socket in DIR.")] = None,
) -> None:
    """Found a site: its policy with comments, its secret key, its empty ledger.

    What isn't given is asked for. The declared size is never read off the data.
    """
    from client.founding import Choices, found

    described = _asked(data, "--data", "Path of the data description (data.toml)", Path)
    choices = Choices(
        site=_asked(name, "--name", "The site's name, as coordinators will see it", str),
        description=os.path.relpath(described.resolve(), folder.resolve()),
        **_asked_terms(unit, declared_size, lifetime_epsilon, run_epsilon, study, delta),
        listen=listen or "unix:custodian.sock",
    )
    policy = found(folder, choices)
    screen.print(f"{policy}: read it, then run grandrounds site check --policy {policy}", markup=False)


@site.command()
def join(
    kit: KitFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the site's files go.")],
    seal: Seal = None,
    data: DataFile = None,
    unit: UnitOf = None,
    declared_size: DeclaredSize = None,
    lifetime_epsilon: LifetimeEpsilon = None,
    run_epsilon: RunEpsilon = None,
    study: Studies = None,
    delta: Annotated[
        float | None, typer.Option(help="δ of all caps; default: 1e-5, unless another is proposed.")
    ] = None,
) -> None:
    """Make a site from a coordinator's kit: custodian, courier, and the units that start them.

    What isn't given is asked for; the coordinator's proposals stand in brackets. The declared size is never
    read off the data.
    """
    from client.founding import Choices
    from client.joining import door, open_kit
    from client.joining import join as make

    opened = open_kit(kit, seal)
    _show_kit(opened, seal)
    manifest = opened.manifest
    described = _asked(data, "--data", "Path of the data description (data.toml)", Path)
    choices = Choices(
        site=manifest.site,
        description=str(described.resolve()),
        **_asked_terms(unit, declared_size, lifetime_epsilon, run_epsilon, study, delta, manifest.proposal),
        listen=door(folder),
    )
    joined = make(opened, folder, choices)
    screen.print(
        f"{joined.policy}: read it, then run grandrounds site check --policy {joined.policy}\n"
        f"{joined.folder}/README.md says what comes next.",
        markup=False,
    )


@site.command()
def renew(
    kit: Annotated[Path, typer.Argument(metavar="KIT", help="Another kit from the coordinator.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder.")],
    seal: Seal = None,
) -> None:
    """Take keys, certificates, address and bundle of another kit; policy, ledger and budget stay."""
    from client.joining import open_kit
    from client.joining import renew as take

    opened = open_kit(kit, seal)
    _show_kit(opened, seal)
    settings = take(opened, folder)
    screen.print(
        f"{settings}: the courier shows its certificate, good until {opened.manifest.expires}, "
        "once it starts again",
        markup=False,
    )


@site.command()
def courier(
    settings: Annotated[Path, typer.Option(help="The courier's settings, courier.toml.")] = Path(
        "courier.toml"
    ),
) -> None:
    """Run the courier: Flower's SuperNode, with the site's keys, for the agreed bundle. Ends on SIGTERM."""
    from client.courier_process import run_courier
    from client.courier_settings import read_courier

    raise typer.Exit(run_courier(read_courier(settings)))


@site.command()
def serve(
    policy: PolicyFile = Path("site.toml"),
    log_format: Annotated[
        str, typer.Option(envvar=VARIABLE, help="Form of the log on standard error: text or json.")
    ] = "text",
) -> None:
    """Run the custodian until SIGTERM."""
    from client.policy import read_policy
    from client.served import open_site
    from client.service import serve as run

    form, read = form_named(log_format, "command line", "--log-format"), read_policy(policy)
    log_to_stderr(form, site=read.site, quote=False)
    with open_site(read) as opened:
        run(opened)


@site.command()
def status(policy: PolicyFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Show the site at one look: caps, budget, last release, queue, certificates. It only reads.

    Exit code 1 if no custodian serves, or the ledger can't be trusted.
    """
    from client.policy import read_policy
    from client.status import status_of

    with Console(stderr=True).status("checking every entry of the ledger"):
        found = status_of(read_policy(policy))
    if as_json:
        _write_json(found.as_json())
    else:
        screen.print(found.table())
    if not found.well:
        raise typer.Exit(1)


@site.command()
def check(
    policy: PolicyFile = Path("site.toml"),
    coordinator: Annotated[str, typer.Option(help="host:port of the coordinator, to try the way.")] = "",
    authority: Annotated[str, typer.Option(help="Certificate of who signed the coordinator's.")] = "",
    as_json: AsJson = False,
) -> None:
    """Look at everything that can be wrong before serving; exit code 1 if a check fails. Costs no budget."""
    from client.preflight import preflight

    findings = preflight(policy, coordinator, authority)
    if as_json:
        _write_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            verdict = "[green]pass[/]" if finding.passed else "[red]FAIL[/]"
            screen.print(f"{verdict}  {finding.check:<12}", end="")
            screen.print(finding.says, markup=False)
    if not all(finding.passed for finding in findings):
        raise typer.Exit(1)


@site.command()
def quote(
    plan: Annotated[str | None, typer.Argument(help=PLAN_HELP)] = None,
    policy: PolicyFile = Path("site.toml"),
    run_config: Annotated[
        list[str] | None, typer.Option(help="A run-config TOML file, or key=value pairs; may be repeated.")
    ] = None,
    study: Annotated[str, typer.Option(help="The study's name; default: the run config's run-id.")] = "",
    as_json: AsJson = False,
) -> None:
    """Say what a run would cost, before any record is touched."""
    from client.approval import plan_named
    from client.policy import read_policy
    from client.quote import plan_from_run_config
    from client.quote import quote as price
    from client.served import asked_plans, open_ledger

    if (plan is None) == (run_config is None):
        raise UserError("give either a plan or --run-config")
    read = read_policy(policy)
    sources = run_config or []
    wanted = plan_named(asked_plans(read), plan) if plan else plan_from_run_config(read, sources, study)
    with open_ledger(read) as ledger:
        priced = price(read, ledger, wanted)
    if as_json:
        _write_json(priced.as_json())
    else:
        screen.print(str(priced), markup=False)


@site.command()
def approve(
    plan: Annotated[str | None, typer.Argument(help=PLAN_HELP)] = None,
    policy: PolicyFile = Path("site.toml"),
    who: Annotated[str, typer.Option(help="Who approves; default: this account.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Read what a plan would cost, and bind the approval into the ledger; exit code 1 if you say no.

    Without a plan, list those that wait. A plan that was approved before stays so, and nothing is written.
    """
    from client.approval import approve as bind
    from client.approval import plan_named
    from client.policy import read_policy
    from client.quote import quote as price
    from client.served import asked_plans, open_ledger
    from common.messages import Rule

    read = read_policy(policy)
    asked = asked_plans(read)
    if plan is None:
        waiting = asked.all()
        if as_json:
            _write_json(
                [
                    {
                        "plan": one.digest().hex(),
                        "study": one.study,
                        "epsilon": one.epsilon,
                        "delta": one.delta,
                    }
                    for one in waiting
                ]
            )
            return
        for one in waiting:
            cost = f"ε = {at_most(one.epsilon)}, δ = {one.delta:g}"
            screen.print(f"{one.digest().hex()}  study {one.study}, {cost}", markup=False)
        if not waiting:
            screen.print("no plan waits for approval")
        return
    if as_json and not yes:
        raise UserError("--json asks nobody: give --yes with it")
    wanted = plan_named(asked, plan)
    with open_ledger(read) as ledger:
        priced = price(read, ledger, wanted)
        if not as_json:
            screen.print(str(priced), markup=False)
        before = ledger.approved(wanted.study, wanted.digest())
        # A site whose budget is spent goes on without private steps, so a person may still say yes.
        if not before and priced.refused_by not in (None, Rule.NOT_APPROVED, Rule.BUDGET):
            raise UserError(f"not approved, since it would be refused all the same: {priced.reason}")
        if not before:
            if not yes and not _agreed("Approve exactly this plan?"):
                screen.print("not approved")
                raise typer.Exit(1)
            bind(ledger, priced, who or getpass.getuser())
            priced = price(read, ledger, wanted)
        approval = ledger.approved(wanted.study, wanted.digest())
        assert approval is not None
    asked.drop(wanted)
    if as_json:
        _write_json(priced.as_json() | {"approved_by": approval.who, "approved_at": approval.when})
        return
    said = f"approved before, by {before.who}, {before.when}" if before else "approved"
    screen.print(f"{said}: study {wanted.study}, plan {wanted.digest().hex()}", markup=False)


@site.command()
def ledger(policy: PolicyFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Show every entry of the ledger, and what was spent."""
    from client.policy import read_policy
    from client.served import open_ledger

    read = read_policy(policy)
    with open_ledger(read) as opened:
        entries, spending = opened.entries(), opened.spending(read.budget.delta)
        source, unit = opened.data_source_id, opened.unit
    if as_json:
        _write_json(
            {
                "data_source": source,
                "unit": unit,
                "entries": [_as_json(one) for one in entries],
                "lifetime": vars(spending.lifetime),
                "studies": {name: vars(spent) for name, spent in spending.studies.items()},
            }
        )
        return
    table = Table(title=f"data source {source}, unit {unit}")
    for column in ("no.", "when", "what", "study", "round", "events"):
        table.add_column(column)
    for one in entries:
        body = one.body
        events = ", ".join(map(_in_words, body.get("events", ())))
        if one.kind == "approve":
            events = f"plan {body['plan'][:8]}, by {body['who']}"
        place = body.get("study", ""), str(body.get("round", ""))
        table.add_row(*map(Text, (str(one.number), one.when, one.kind, *place, events)))
    screen.print(table)
    for name, spent in spending.studies.items():
        screen.print(f"study {name}: {spent}", markup=False)
    cap = read.budget.lifetime_epsilon
    screen.print(f"in all: {spending.lifetime}; the cap is ε = {cap:g}", markup=False)


@site.command()
def verify(policy: PolicyFile = Path("site.toml"), as_json: AsJson = False) -> None:
    """Check the ledger and every ε by a second accountant, and say what is guaranteed.

    Exit code 1 if anything is wrong with the ledger or the log of releases.
    """
    from client.books import verify as verify_books
    from client.ledger import LedgerError
    from client.policy import read_policy
    from client.served import open_ledger, release_log

    read = read_policy(policy)
    try:
        with open_ledger(read) as opened:
            verdict = verify_books(opened, release_log(read))
    except LedgerError as error:
        if as_json:
            _write_json({"findings": [str(error)], "guarantee": ""})
        raise
    if as_json:
        _write_json(asdict(verdict))
    else:
        for finding in verdict.findings:
            screen.print(f"FAIL  {finding}", markup=False)
        screen.print(verdict.guarantee, markup=False)
    if verdict.findings:
        raise typer.Exit(1)


def _show_kit(kit: "Kit", seal: str | None) -> None:
    """Show whose a kit is, and see that somebody has compared its seal.

    Raises:
        UserError: if nobody has.
    """
    manifest = kit.manifest
    screen.print(
        f"kit of site {manifest.site}, federation {manifest.federation}, for {manifest.address}", markup=False
    )
    screen.print(f"seal (SHA-256) {kit.seal}", markup=False)
    if seal is None and not _asked(
        None, "--seal", "Did the coordinator tell you this seal? (yes or no)", _yes
    ):
        raise UserError("a kit with another seal than the coordinator told isn't the coordinator's")


def _as_json(entry: "Entry") -> dict[str, Any]:
    sealed = {"number": entry.number, "when": entry.when, "kind": entry.kind, "head": entry.head.hex()}
    return sealed | dict(entry.body)


def _in_words(event: Mapping[str, Any]) -> str:
    match event:
        case {"event": "gaussian-steps", "noise_multiplier": sigma, "sample_rate": rate, "steps": steps}:
            return f"{steps} × Gaussian, σ = {sigma:g}, q = {rate:g}"
        case {"event": "discrete-laplace", "epsilon": epsilon}:
            return f"counts at ε = {at_most(epsilon)}"
    return json.dumps(event)


def _asked_terms(
    unit: Unit | None,
    declared_size: int | None,
    lifetime_epsilon: float | None,
    run_epsilon: float | None,
    study: list[str] | None,
    delta: float | None,
    proposal: "Proposal | None" = None,
) -> dict[str, Any]:
    """Ask for the terms of `client.founding.Choices` that aren't given, with what a coordinator proposes.

    δ has a default, and is asked for only where another is proposed.
    """
    from common.kit import Proposal

    proposed = proposal or Proposal()
    size = "Public size of the site (a round number, no count)"
    lifetime = "Cap on ε for all that is ever done"
    studies = "Studies that may run here, with commas between, or *"
    if delta is None and proposed.delta in (None, DELTA):
        delta = DELTA
    return {
        "unit": _asked(unit, "--unit", "Unit of privacy, patient or record", _unit, proposed.unit),
        "declared_size": _asked(declared_size, "--declared-size", size, int, proposed.declared_size),
        "lifetime_epsilon": _asked(lifetime_epsilon, "--lifetime-epsilon", lifetime, float),
        "run_epsilon": _asked(
            run_epsilon, "--run-epsilon", "Cap on ε for one run", float, proposed.run_epsilon
        ),
        "studies": _asked(study, "--study", studies, _names, ",".join(proposed.studies) or None),
        "delta": _asked(delta, "--delta", "δ of all caps", float, proposed.delta),
    }


def _asked(given: Any, flag: str, question: str, kind: Callable[[str], T], proposed: Any = None) -> T:
    """Return what was given, or ask for it; where nobody can answer, say which flag is missing.

    Args:
        given: The flag's value, or None.
        flag: The flag.
        question: What to ask.
        kind: What makes a value of an answer.
        proposed: What Enter stands for. It is taken only by somebody who reads it.
    """
    if given is not None:
        return kind(given) if isinstance(given, str) else given
    if not sys.stdin.isatty():
        raise UserError(f"{flag} is missing, and there is nobody to ask: {question}")
    answer: T = typer.prompt(question, value_proc=kind, default=proposed)
    return answer


def _agreed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except typer.Abort:
        raise UserError("nobody answered; --yes approves without asking") from None


def _yes(answer: str) -> bool:
    return answer.strip().lower() in ("y", "yes")


def _unit(text: str) -> Unit:
    for unit in get_args(Unit):
        if text == unit:
            return text  # type: ignore[return-value]
    raise typer.BadParameter("patient or record")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
