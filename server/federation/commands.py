"""`grandrounds federation`: what a coordinator does, from founding a federation to a study's result.

What a command needs is imported inside it, so that no command waits for torch in vain.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.certificates import Term
    from common.config import RunConfig
    from server.federation.settings import Federation

federation = typer.Typer(
    help="The coordinator's side: found, start and watch a federation; run studies on it.",
    no_args_is_help=True,
)
screen = Console(soft_wrap=True, highlight=False)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The federation's folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]
RunConfigs = Annotated[
    list[str] | None, typer.Option(help="A run-config TOML file, or key=value pairs; may be repeated.")
]


@federation.command()
def init(
    folder: Folder,
    sites: Annotated[str, typer.Option(help="The sites' names, with commas between.")],
    host: Annotated[str, typer.Option(help="Name or address under which sites reach this coordinator.")],
    port: Annotated[int, typer.Option(help="Port of the gateway, to which sites connect.")] = 8443,
    superlink_port: Annotated[int, typer.Option(help="Port of the SuperLink, on this machine only.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The federation's name; default: the folder's.")] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(
            help="A study that is planned: what it asks of sites stands in their kits as a proposal."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Found a federation: certificates, node keys, the gateway's configuration, one kit a site."""
    from pydantic import ValidationError

    from common.config import first_complaint
    from common.run_config_files import read_run_config
    from server.federation.provisioning import found_federation, parse_sites
    from server.federation.settings import Settings

    try:
        settings = Settings(
            name=name or folder.absolute().name,
            host=host.strip("[]"),
            port=port,
            superlink_host="127.0.0.1",
            superlink_port=superlink_port,
            bundle="0" * 64,
            sites=tuple(parse_sites(sites)),
        )
    except ValidationError as error:
        raise first_complaint(error, "grandrounds federation init") from None
    config = read_run_config(run_config) if run_config else None
    made = found_federation(folder, settings, config)
    if as_json:
        _write_json([{"site": one.site, "kit": str(one.path), "seal": one.seal} for one in made])
        return
    screen.print("Hand each kit to its site alone, and tell its seal (SHA-256) by another way:")
    for one in made:
        screen.print(f"{one.path}\n  {one.seal}", markup=False)
    screen.print(
        f"{folder}/README.md says what lies where. Next: grandrounds federation start {folder}", markup=False
    )


@federation.command()
def adopt(folder: Folder) -> None:
    """Let this software's app be the federation's: after an update, once all sites agree to it."""
    from server.federation.amendments import adopt_app
    from server.federation.settings import open_federation

    opened = open_federation(folder)
    if (digest := adopt_app(opened)) == opened.settings.bundle:
        screen.print(f"the app is the same: {digest}", markup=False)
        return
    screen.print(
        f"bundle = {digest}\nEvery site writes this into its courier.toml and starts its courier again; "
        "until then it refuses studies. Kits that were made before name the bundle of before.",
        markup=False,
    )


@federation.command()
def start(folder: Folder) -> None:
    """Start SuperLink and SuperExec in the background; what runs already is left alone."""
    from server.federation.processes import start as run
    from server.federation.settings import open_federation

    opened = open_federation(folder)
    started = run(opened)
    what = f"started: {', '.join(started)}" if started else "everything runs already"
    screen.print(
        f"{what}; the SuperLink answers at {opened.superlink}; logs are in {opened.logs}", markup=False
    )


@federation.command()
def stop(folder: Folder) -> None:
    """End SuperExec and SuperLink. A study that is under way breaks off, and can be resumed."""
    from server.federation.processes import stop as end
    from server.federation.settings import open_federation

    ended = end(open_federation(folder))
    screen.print(f"ended: {', '.join(ended)}" if ended else "nothing ran", markup=False)


@federation.command()
def superlink(folder: Folder) -> None:
    """Be the SuperLink, in the foreground: for systemd and containers."""
    from server.federation.processes import SUPERLINK, become
    from server.federation.settings import open_federation

    become(open_federation(folder), SUPERLINK)


@federation.command()
def superexec(folder: Folder) -> None:
    """Be SuperExec, in the foreground: for systemd and containers."""
    from server.federation.processes import SUPEREXEC, become
    from server.federation.settings import open_federation

    become(open_federation(folder), SUPEREXEC)


@federation.command()
def register(
    folder: Folder,
    patience: Annotated[float, typer.Option(help="Seconds to wait for the SuperLink.")] = 60.0,
) -> None:
    """Tell the SuperLink the sites' keys, and that no others are taken."""
    from server.federation.flower import await_superlink, register_nodes
    from server.federation.settings import open_federation

    opened = open_federation(folder)
    await_superlink(opened, patience)
    new = register_nodes(opened)
    screen.print(
        f"registered: {', '.join(new)}" if new else "every site was registered already", markup=False
    )


@federation.command()
def kit(
    folder: Folder,
    site: Annotated[str, typer.Argument(metavar="SITE", help="Whose kit it is.")],
    run_config: Annotated[
        list[str] | None, typer.Option(help="A study that is planned, as in init; may be repeated.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a kit for a site that joins later, or another for one whose kit was lost or runs out.

    The keys of its earlier kit are good for nothing after that.
    """
    from common.run_config_files import read_run_config
    from server.federation import flower
    from server.federation.amendments import another_kit
    from server.federation.settings import open_federation

    config = read_run_config(run_config) if run_config else None
    made = another_kit(open_federation(folder), site, config)
    opened = open_federation(folder)  # with the site, if it is new
    if told := flower.answers(opened):
        flower.register_nodes(opened)
    if as_json:
        _write_json({"site": made.site, "kit": str(made.path), "seal": made.seal})
        return
    when = "the SuperLink takes its key" if told else "the SuperLink takes its key once it runs"
    screen.print(f"{made.path}\n  {made.seal}\n{when}, and no other of {site}'s", markup=False)


@federation.command()
def renew(folder: Folder) -> None:
    """Make SuperLink and gateway another certificate, before theirs runs out."""
    from common.certificates import expiry
    from server.federation.amendments import renew_certificate
    from server.federation.settings import open_federation

    opened = open_federation(folder)
    renew_certificate(opened)
    last = expiry(opened.certificate.read_bytes())
    screen.print(
        f"{opened.certificate} is good until {last:%Y-%m-%d}; SuperLink and gateway show it once they start "
        "again",
        markup=False,
    )


@federation.command()
def revoke(
    folder: Folder,
    site: Annotated[str, typer.Argument(metavar="SITE", help="The site that may take part no more.")],
) -> None:
    """Shut a site out for good, whatever keys and certificates it has."""
    from server.federation.processes import nginx
    from server.federation.revocation import revoke as shut_out
    from server.federation.settings import open_federation

    told = shut_out(open_federation(folder), site)
    when = (
        "the SuperLink takes its key no more" if told else "the SuperLink takes its key no more once it runs"
    )
    screen.print(
        f"{site} is revoked: {when}; the gateway refuses its certificate after\n"
        f"{nginx() or 'nginx'} -p {folder.absolute()} -e logs/nginx.log -c nginx.conf -s reload",
        markup=False,
    )


@federation.command()
def status(folder: Folder, as_json: AsJson = False) -> None:
    """Show programs, certificates, the sites' nodes and the runs; exit code 1 if a program doesn't run."""
    from common.certificates import terms
    from server.federation import flower
    from server.federation.processes import running
    from server.federation.settings import open_federation

    opened = open_federation(folder)
    certificates = terms(opened.certificates())
    programs = running(opened)
    reached = flower.answers(opened)
    nodes = flower.nodes(opened) if reached else []
    runs = flower.runs(opened) if reached else []
    if as_json:
        _write_json(
            {
                "federation": opened.settings.name,
                "bundle": opened.settings.bundle,
                "programs": programs,
                "superlink": {"address": opened.superlink, "answers": reached},
                "certificates": [one.as_json() for one in certificates],
                "nodes": [asdict(node) for node in nodes],
                "runs": [asdict(run) for run in runs],
            }
        )
    else:
        for name, pid in programs.items():
            screen.print(
                f"{name:<10} {'does not run' if pid is None else f'runs, process {pid}'}", markup=False
            )
        screen.print(
            f"SuperLink  {opened.superlink} {'answers' if reached else 'does not answer'}", markup=False
        )
        screen.print(f"bundle     {opened.settings.bundle}", markup=False)
        _show_certificates(opened, certificates)
        if reached:
            _show_nodes(nodes)
            _show_runs(runs)
    if None in programs.values() or not reached:
        raise typer.Exit(1)


@federation.command()
def run(folder: Folder, run_config: RunConfigs = None, as_json: AsJson = False) -> None:
    """Run a study to its end and show its result; exit code 1 if it failed.

    Ctrl-C ends the watching, not the study.
    """
    from server.federation.settings import open_federation
    from server.federation.studies import require_new, study_config

    opened = open_federation(folder)
    config = study_config(opened, run_config or [])
    require_new(opened, config)
    _run_to_its_end(opened, config, as_json)


@federation.command()
def resume(
    folder: Folder,
    study: Annotated[str, typer.Argument(metavar="RUN", help="The study's name, its run-id.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder that holds the run's folder; default: the federation's runs/.")
    ] = None,
    run_config: Annotated[
        list[str] | None,
        typer.Option(help="What may differ: where files lie, min-sites, round-timeout; as in run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a study that broke off, also on another machine; then as run.

    Its folder, runs/.RUN.partial, holds all that is needed. Sites answer what they have answered before with
    the same bytes, and at no charge.
    """
    from server.federation.settings import open_federation
    from server.federation.studies import broken_off

    opened = open_federation(folder)
    _run_to_its_end(opened, broken_off(opened, study, out, run_config or []), as_json)


def _run_to_its_end(opened: "Federation", config: "RunConfig", as_json: bool) -> None:
    from common.certificates import terms
    from server.federation.studies import follow, goes_on, is_whole, submit

    messages = Console(stderr=True, soft_wrap=True, highlight=False)
    _warn_of(opened, terms(opened.certificates()), messages)
    run_id = submit(opened, config)
    messages.print(f"study {config.run_id} is Flower's run {run_id}", markup=False)
    ended = follow(opened, run_id)
    results = Path(config.out) / config.run_id
    # A server process may die after its results are whole and before Flower is told.
    completed = ended.completed or is_whole(results)
    if as_json:
        _write_json(asdict(ended) | {"results": str(results) if completed else None})
    elif completed:
        _show_results(results)
    if not completed:
        reason = ended.details or "no reason given"
        messages.print(
            f"study {config.run_id} ended as {ended.status}: {reason}", style="bold red", markup=False
        )
        if goes_on(config):
            again = f"grandrounds federation resume {opened.path} {config.run_id}"
            messages.print(f"What it learned is kept: {again}", markup=False)
        raise typer.Exit(1)


@federation.command()
def plan(
    folder: Folder,
    run_config: RunConfigs = None,
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("plan.json"),
) -> None:
    """Write a study's plan, which sites can price and approve before it starts."""
    from server.federation.settings import open_federation
    from server.federation.studies import public_plan, study_config

    config = study_config(open_federation(folder), run_config or [])
    try:
        out.write_bytes(public_plan(config))
    except OSError as error:
        raise UserError(f"--out {out}: can't be written: {error.strerror}") from None
    screen.print(
        f"{out}: a site prices it by grandrounds site quote {out}, and approves it by site approve",
        markup=False,
    )


def _show_certificates(opened: "Federation", certificates: "Sequence[Term]") -> None:
    """Show whose certificate ends first, and warn of each that ends soon."""
    if certificates:
        first = min(certificates, key=lambda one: one.ends)
        screen.print(f"{'expiry':<10} the first of {len(certificates)} certificates, {first}", markup=False)
    _warn_of(opened, certificates, screen)


def _warn_of(opened: "Federation", certificates: "Sequence[Term]", where: Console) -> None:
    """Tell each certificate that ends soon, with what mends it."""
    for one in certificates:
        if one.soon:
            kind, _, site = one.of.partition(" ")
            mends = {
                "authority": "found another federation, and let the sites renew from its kits",
                "coordinator": f"grandrounds federation renew {opened.path}",
                "site": f"grandrounds federation kit {opened.path} {site}, and there site renew",
            }
            where.print(f"WARNING    {one}: {mends[kind]}", style="bold yellow", markup=False)


def _show_nodes(nodes: list[Any]) -> None:
    table = Table(title="sites")
    for column in ("site", "node", "status", "since"):
        table.add_column(column)
    for node in nodes:
        table.add_row(node.site, str(node.node_id or ""), node.status, _minute(node.seen))
    screen.print(table)


def _show_runs(runs: list[Any]) -> None:
    table = Table(title="runs")
    for column in ("study", "run", "status", "began", "ended", "bytes from sites", "to sites"):
        table.add_column(column)
    for one in runs:
        sent = f"{one.bytes_from_sites:,}", f"{one.bytes_to_sites:,}"
        table.add_row(one.study, str(one.run_id), one.status, _minute(one.began), _minute(one.ended), *sent)
    screen.print(table)


def _show_results(results: Path) -> None:
    from common.summary import read
    from server.report.terminal import results_table

    screen.print(results_table(read(results / "summary.json")))
    screen.print(f"Results: {results}", markup=False)


def _minute(when: str) -> str:
    return when[:16].replace("T", " ")


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
