"""The same app through Flower's own door: `flwr run` with Ray.

What a Flower user does by hand, done so that it leaves nothing behind and tells the truth:

1. A SuperLink of our own on a free port, with its own `FLWR_HOME` in a temporary folder, so that neither
   the user's Flower configuration nor a SuperLink that already runs takes part. Flower's habit of building
   a new environment with all dependencies for each run is switched off: the present one is right.
2. `flwr run` submits the project's folder; `flwr log` follows the run into a log file.
3. `flwr list` says how the run ended. The exit code of a streamed run doesn't: it is 0 for a failed one too.
4. Whatever happened, Ctrl-C included, the SuperLink and all that it started are stopped.

Ray takes 10 to 20 s to start; `simulations.inprocess` gives the same result without.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

from common.config import Scalar
from common.errors import UserError
from common.run_config_files import as_toml
from server.flower_programs import flwr, flwr_answer, tail
from simulations.superlink import superlink

CONNECTION = "simulation"
RAY_ENVIRONMENT = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the new default; unset, every worker prints a FutureWarning
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run_ray(
    project_dir: Path,
    run_config: Mapping[str, Scalar],
    num_nodes: int,
    log_file: Path,
    cpus_per_node: int = 1,
) -> None:
    """Run a Flower app with Ray and wait until it has ended.

    The apps' working directory is that of this process, so relative paths in `run_config` mean what the
    user thinks they mean.

    Args:
        project_dir: Folder of the Flower app; see `server.federation.bundle`.
        run_config: Overrides of the app's run config. Flower takes only keys that the app's
            `pyproject.toml` has.
        num_nodes: How many simulated nodes there are.
        log_file: Gets what the apps and Flower log, as it happens.
        cpus_per_node: Cores that Ray reserves for a working node: the machine's cores divided by this work
            at once.

    Raises:
        UserError: if Flower could not start, refused the run, or the run failed, with the reason and the
            end of the log.
    """
    with tempfile.TemporaryDirectory(prefix="grandrounds-ray-", ignore_cleanup_errors=True) as home_name:
        home = Path(home_name)
        overrides = home / "run-config.toml"
        overrides.write_text(as_toml(run_config), encoding="utf-8")
        with (
            log_file.open("w", encoding="utf-8") as log,
            superlink(
                home, CONNECTION, "--simulation", "--isolation", "subprocess", more=RAY_ENVIRONMENT
            ) as running,
        ):
            nodes = {
                "num-supernodes": num_nodes,
                "client-resources-num-cpus": cpus_per_node,
                "init-args-log-to-driver": False,
            }
            arguments = [str(project_dir.resolve()), CONNECTION, "--run-config", str(overrides)]
            settings = " ".join(f"{key}={json.dumps(value)}" for key, value in nodes.items())
            run_id = flwr_answer(running.environment, "run", *arguments, "--federation-config", settings)[
                "run-id"
            ]
            while True:
                # The stream ends with the run, or when the connection breaks.
                flwr(running.environment, "log", run_id, CONNECTION, "--stream", stdout=log)
                status = flwr_answer(running.environment, "list", CONNECTION, "--run-id", run_id)["runs"][0]
                if status["status"].startswith("finished"):
                    break
    if status["status"] != "finished:completed":
        raise UserError(
            f"the Flower run ended as {status['status']!r}: {status['status-details'] or 'no reason given'}\n"
            f"{tail(log_file)}\nThe whole log is in {log_file}"
        )
