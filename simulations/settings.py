"""Scenarios by name, and what a person changes about them.

A scenario is a run-config TOML file, so `flwr run . --run-config FILE` takes it as well. Later sources win:
the defaults of `common.config`, the scenario's file, then each `--run-config` in order.
"""

from collections.abc import Sequence
from pathlib import Path

from common.config import RunConfig
from common.errors import UserError
from common.run_config_files import read_run_config

SCENARIOS = Path(__file__).parent / "scenarios"


def scenario_names() -> list[str]:
    """Scenarios that ship with the project."""
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def run_settings(scenario: str, overrides: Sequence[str]) -> RunConfig:
    """Put a run's configuration together.

    Args:
        scenario: A scenario's name, or the path of a run-config TOML file.
        overrides: Each a TOML file, or `key=value` pairs as Flower takes them.

    Raises:
        UserError: naming what is wrong and where.
    """
    config = read_run_config([_scenario_file(scenario), *overrides])
    if scenario in scenario_names() and config.scenario != scenario:
        raise UserError(
            f"--run-config: scenario = {config.scenario!r} is refused: {scenario!r} was asked for, and its "
            f"other settings would stay. To run another scenario, name it: "
            f"grandrounds simulate {config.scenario}"
        )
    return config


def _scenario_file(scenario: str) -> str:
    if scenario.endswith(".toml"):
        return scenario
    if scenario not in scenario_names():
        raise UserError(
            f"there is no scenario {scenario!r}: one of {', '.join(scenario_names())}, or a .toml file"
        )
    return str(SCENARIOS / f"{scenario}.toml")
