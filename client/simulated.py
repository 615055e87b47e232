"""A site of a simulation: the same custodian, with a permissive policy and a ledger of its own for this run.

Its data are the scenario's share for this site, its declared size is the scenario's, and its private
randomness follows the run's seed, so that a simulation can be repeated to the bit. None of this is
reachable from a served custodian.
"""

from functools import cache, partial
from hashlib import sha256
from pathlib import Path

from flwr.app import Context

from client.custodian import Custodian
from client.ledger import Ledger
from client.noise import PrivateRandomness
from client.policy import ANY, AllowPolicy, BudgetPolicy, DataPolicy, SitePolicy
from client.private_data import HoldOut, scenario_records
from client.shelf import Shelf
from common.accounting import Unit
from common.architectures import mixed_architecture
from common.config import RunConfig
from common.datasets import sites
from common.messages import Task
from common.runs import final_folder, working_folder


def simulated_site(context: Context) -> Custodian:
    """Return this node's custodian, resident in the process.

    Args:
        context: Flower's; its node config names the partition, its run config the scenario.
    """
    config = RunConfig.from_run_config(context.run_config)
    return _open_site(
        config, working_folder(final_folder(config, context.run_id)), int(context.node_config["partition-id"])
    )


HELD_OUT = 0.2
"""Share of a simulated site's patients that is held out where the accuracy on them is bought."""

_OPEN: list[Custodian] = []


@cache
def _open_site(config: RunConfig, folder: Path, place: int) -> Custodian:
    site = sites(config)[place]
    state = folder / "sites" / site.name
    state.mkdir(parents=True, exist_ok=True)
    most_epsilon = config.privacy.most_epsilon(place)
    policy = permissive_policy(config, site.name, site.declared_size, most_epsilon, state)
    hold_out = HoldOut(_key(config.seed, site.name), policy.data.hold_out)
    custodian = Custodian(
        policy=policy,
        open_records=partial(scenario_records, config, site.name, hold_out),
        ledger=open_ledger(state, config.seed, site.name, config.privacy.unit),
        shelf=Shelf(proxies=folder / "sites", students=state),
        randomness=partial(_seeded, config.seed, site.name),
        mixed=partial(mixed_architecture, place=place),
    )
    _OPEN.append(custodian)
    return custodian


def close_sites() -> None:
    """Close the ledgers of a simulation that is over and let go of its records."""
    while _OPEN:
        _OPEN.pop().ledger.close()
    _open_site.cache_clear()


def settle_ledgers(config: RunConfig, folder: Path) -> None:
    """Leave one file of each ledger of a finished run, whose sites may have been ended anyhow.

    Args:
        config: What the run was.
        folder: Where its results are.
    """
    for path in (folder / "sites").glob("*/ledger.db"):
        # Whoever closes it last writes out what SQLite keeps beside it.
        open_ledger(path.parent, config.seed, path.parent.name, config.privacy.unit).close()


def permissive_policy(
    config: RunConfig, site: str, declared_size: int, most_epsilon: float, state: Path
) -> SitePolicy:
    """A policy that allows exactly what the run configuration asks for, at the site's own ε."""
    epsilon, student = config.privacy.epsilon, config.student.model
    rounds, steps_per_round = config.schedule
    return SitePolicy(
        site=site,
        state=str(state),
        approval=False,
        data=DataPolicy(
            description="",
            unit=config.privacy.unit,
            declared_size=declared_size,
            hold_out=HELD_OUT if config.privacy.hold_out_share else 0.0,
        ),
        # A ledger of its own for every run: the lifetime is the run's, and its filter (looser than one
        # run's accountant) need not bind.
        budget=BudgetPolicy(
            delta=config.privacy.delta,
            lifetime_epsilon=10 * epsilon,
            study_epsilon=10 * epsilon,
            run_epsilon=most_epsilon,
        ),
        allow=AllowPolicy(
            studies=(ANY,),
            methods=(ANY,),
            models=(ANY, student),
            features=(ANY,),
            proxies=(ANY,),
            codecs=(ANY,),
            purchases=(ANY,),
            rounds=rounds,
            steps_per_round=steps_per_round,
            epochs=config.student.epochs,
            clipping_norm=config.privacy.clipping_norm,
            noise_multiplier=1e-9,
        ),
    )


def open_ledger(state: Path, seed: int, site: str, unit: Unit) -> Ledger:
    """Open this run's ledger for the site, or begin it."""
    path, key = state / "ledger.db", _key(seed, site)
    if path.exists():
        return Ledger.open(path, key)
    return Ledger.create(path, key, data_source_id=f"simulated-{site}", unit=unit)


def _key(seed: int, site: str) -> bytes:
    """A site's key, which in a simulation is no secret."""
    return sha256(f"simulation {seed} {site}".encode()).digest()


def _seeded(seed: int, site: str, task: Task) -> PrivateRandomness:
    return PrivateRandomness.seeded(seed, site, task.round)
