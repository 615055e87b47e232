"""What a byte buys: points are whole runs, and the picture shows each."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from common.codec import CODECS
from simulations.benchmarks.bytes import as_table, configurations, draw, measure

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def points():
    asked = argparse.Namespace(
        scenario="heart", run_config=["num-rounds=2"], epsilons="1,8", codecs="int8,int1", cases="50"
    )
    return measure(configurations(asked), [4])


def test_every_combination_is_measured_and_coarse_codecs_send_less(points):
    assert [(one.epsilon, one.codec, one.cases) for one in points] == [
        (epsilon, codec, 50) for epsilon in (1.0, 8.0) for codec in ("int8", "int1")
    ]
    for fine, coarse in (points[:2], points[2:]):
        assert 121 < coarse.bytes_mean <= coarse.bytes_max < fine.bytes_mean <= fine.bytes_max
        assert fine.bytes_max <= 121 + CODECS["int8"].longest(50, 2)
        assert fine.metric == "auroc" and 0.5 < coarse.score <= 1


def test_table_and_picture_name_every_point(points, tmp_path):
    assert as_table(points).row_count == 4
    draw(points, tmp_path / "curve.svg")
    first = (tmp_path / "curve.svg").read_bytes()
    assert first.count(b">int1<") == 2 and b"8, 50 proxy cases" in first
    draw(points, tmp_path / "curve.svg")
    assert (tmp_path / "curve.svg").read_bytes() == first


def test_what_is_wrong_is_said_in_a_line_before_anything_runs():
    command = [sys.executable, "-m", "simulations.benchmarks.bytes", "heart", "--codecs", "int3"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 2 and shown.stderr.count("\n") == 1 and "'int3' is refused" in shown.stderr
