"""What can't end well is refused before any site is asked, in the terms of the run configuration."""

from dataclasses import replace

import numpy as np
import pytest

from common.config import RunConfig
from common.datasets import load_public
from common.errors import UserError
from server.preconditions import check


def checked(**flat) -> None:
    config = RunConfig.from_run_config({k.replace("__", ".").replace("_", "-"): v for k, v in flat.items()})
    check(config, load_public(config))


@pytest.mark.parametrize(
    "flat",
    [
        {},
        {"method": "oneshot"},
        {"method": "fedmd", "aggregation__rule": "class-weighted"},
        {"teacher__model": "none", "data__proxy_labels": 0},
        {"student__model": "mlp", "student__features": "pca"},
        {"min_sites": 4},
        {"proxy_cases": 184},
    ],
)
def test_what_can_run_may(flat):
    checked(**flat)


@pytest.mark.parametrize(
    ("flat", "complaint"),
    [
        ({"min_sites": 5}, r"min-sites = 5 is refused: expected at most the 4 sites there are"),
        ({"proxy_cases": 185}, r"proxy-cases = 185 is refused: expected at most the 184 cases"),
        ({"data__proxy_labels": 0}, r"teacher.model = 'linear' is refused: expected none, or a file"),
        ({"data__proxy_size": 900}, r"data.proxy-size = 900 is refused: expected at most 659"),
        ({"student__model": "lineer"}, r"student.model = 'lineer' is refused.*did you mean 'linear'"),
        ({"teacher__model": "lineer"}, r"teacher.model = 'lineer' is refused.*did you mean 'linear'"),
        ({"student__model": "cnn"}, r"student.model = 'cnn' is refused.*takes images"),
        ({"student__features": "scattering"}, r"student.features = 'scattering' is refused"),
        ({"student__model": "no_such:Model"}, r"student.model = 'no_such:Model' is refused"),
        ({"aggregation__rule": "class-weighted"}, r"aggregation.rule = 'class-weighted' is refused"),
        ({"method": "fedmd", "aggregation__rule": "stacking"}, r"stacking weighs movements"),
        ({"aggregation__rule": "stacking", "data__validation_size": 1}, r"1 labelled validation cases"),
        (
            {"privacy__epsilon": 1e-6, "privacy__delta": 1e-12},
            r"privacy.epsilon = 1e-06 is refused: expected one that 20 private steps can be priced for",
        ),
        ({"data__test_size": 1}, r"data.test-size = 1 is refused: expected test cases of both classes"),
        ({"data__partition": "dirichlet"}, r"data.num-sites = 0 is refused"),
    ],
)
def test_what_can_not_is_refused_by_its_key(flat, complaint):
    with pytest.raises(UserError, match=complaint):
        checked(**flat)


def test_a_student_that_nobody_may_train_in_private_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mixing.py").write_text(
        "from torch import nn\n"
        "class Mixing(nn.Module):\n"
        "    def __init__(self, case_shape, num_classes):\n"
        "        super().__init__()\n"
        "        self.rnn = nn.LSTM(case_shape[0], num_classes, batch_first=True)\n"
        "    def forward(self, x):\n"
        "        return self.rnn(x[:, None])[0][:, 0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"rnn \(LSTM\) can't be trained in private"):
        checked(student__model="mixing:Mixing")
    checked(teacher__model="mixing:Mixing")


@pytest.mark.parametrize("key", ["aggregation.validated", "patience"])
def test_nothing_is_chosen_by_validation_cases_that_have_no_label(key):
    config = RunConfig.from_run_config({key: True if key.endswith("validated") else 3})
    public = load_public(config)
    check(config, public)
    blind = replace(public.validation, y=np.full_like(public.validation.y, -1))
    with pytest.raises(UserError, match=rf"{key} = .* is refused: expected labelled public validation cases"):
        check(config, replace(public, validation=blind))
