"""The benchmark of hostile sites: what counts as met, and a run through the real apps."""

import pytest

from common.errors import UserError
from simulations.benchmarks.hostile import NOBODY, PROMISED, Cell, as_table, cases_of, measure_all, met
from simulations.settings import run_settings


def cell(hostile: int, *scores: float, public: tuple[float, ...] = (80.0, 81.0)) -> Cell:
    return Cell(PROMISED, "flip", hostile, scores, public)


@pytest.mark.parametrize(
    ("attacked", "expected"),
    [
        (cell(1, 82.1, 83.0), True),
        (cell(1, 81.0, 82.9), False),
        (cell(2, 81.0, 82.9), False),
        (cell(4, 80.0, 81.0), True),
        (cell(4, 90.0, 80.9), False),
    ],
)
def test_few_may_cost_two_points_and_many_nothing_that_public_cases_give(attacked, expected):
    assert met(attacked, cell(0, 84.0, 85.0)) == expected


def test_a_loud_site_is_in_the_table_with_a_mark():
    config = run_settings("heart", ["data.partition='dirichlet' data.num-sites=10 num-rounds=2"])
    cells = measure_all(config, cases_of(["mean", PROMISED], ["flip-loud:1"]), [300])
    clean, ruined, clean_too, held = cells
    assert not met(ruined, clean) and met(held, clean_too)
    table = as_table(cells)
    assert list(table.columns[0].cells) == [NOBODY, "1 × flip-loud"]
    assert [str(column.header) for column in table.columns[1:]] == ["mean", PROMISED]


@pytest.mark.parametrize(("defence", "case"), [("prayer", "flip:1"), ("mean", "flop:1"), ("mean", "flip:11")])
def test_what_there_is_not_is_refused_by_name(defence, case):
    with pytest.raises(UserError, match=r"'prayer'|'flop:1'|'flip:11'"):
        cases_of([defence], [case])
