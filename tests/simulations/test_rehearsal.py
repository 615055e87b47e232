"""A rehearsal's files hold the very records of the simulation, as a custodian reads them."""

import numpy as np
import pytest

from client.private_data import dealt_records
from common.config import RunConfig
from common.datasets import load_public, sites
from common.datasets.own import read_site_records
from common.errors import UserError
from common.preprocessing import check_schema
from simulations.rehearsal import write_sites


@pytest.mark.parametrize("scenario", ["heart", "thyroid"])
def test_what_is_written_is_read_as_the_simulation_has_it(tmp_path, scenario):
    config = RunConfig.from_run_config({"scenario": scenario})
    paths, preprocessing = write_sites(config, tmp_path), load_public(config).proxy.preprocessing
    assert [path.parent.name for path in paths] == [site.name for site in sites(config)]
    for path in paths:
        ours, theirs = read_site_records(path, path.parent.name), dealt_records(config, path.parent.name)
        assert list(ours.target) == list(theirs.target)
        assert ours.columns.keys() == theirs.columns.keys()
        np.testing.assert_array_equal(preprocessing.encode(ours).x, preprocessing.encode(theirs).x)
        assert check_schema(ours, preprocessing) == []


def test_nothing_is_written_over(tmp_path):
    config = RunConfig.from_run_config({"scenario": "heart"})
    write_sites(config, tmp_path)
    with pytest.raises(UserError, match="can't be written"):
        write_sites(config, tmp_path)
