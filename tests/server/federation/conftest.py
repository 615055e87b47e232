"""A federation that is founded once and looked at by many tests."""

import pytest

from common.config import RunConfig
from server.federation.provisioning import Made, found_federation
from server.federation.settings import Federation, Settings, open_federation

SITES = ("cleveland", "hungary", "switzerland", "long-beach")
STUDY = RunConfig.from_run_config({"scenario": "heart", "run-id": "trial", "num-rounds": 2})


def settings(**other: object) -> Settings:
    values = {
        "name": "trial",
        "host": "127.0.0.1",
        "port": 8443,
        "superlink_host": "127.0.0.1",
        "superlink_port": 8000,
        "bundle": "0" * 64,
        "sites": SITES,
    }
    return Settings.model_validate(values | other)


@pytest.fixture(scope="session")
def founded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, list[Made]]:
    folder = tmp_path_factory.mktemp("coordinator") / "federation"
    made = found_federation(folder, settings(), STUDY)
    return open_federation(folder), made
