"""Both backends run the same apps: the same seed gives the same results and the same models, to the bit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OF_THE_MACHINE = {
    "backend",
    "finished",
    "peak_memory_mib",
    "run_id",
    "seconds",
    "wire_bytes_up_per_site_per_round",  # ids are longer where Flower's own SuperLink gives them
}


@pytest.mark.slow
def test_ray_and_inprocess_give_the_same_results_and_models(tmp_path):
    summaries, models = {}, {}
    for backend in ("inprocess", "ray"):
        done = subprocess.run(
            [
                *(sys.executable, "-m", "grandrounds", "simulate", "heart", "--backend", backend, "--json"),
                *("--out", backend, "--seeds", "3", "--run-config", 'num-rounds=3 students="mixed"'),
            ],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        summaries[backend] = json.loads(done.stdout)
        names = ("teacher.safetensors", "student.safetensors")
        models[backend] = [(tmp_path / backend / name).read_bytes() for name in names]
        for site in ("cleveland", "hungary", "switzerland", "long-beach"):
            kept = tmp_path / backend / "seed-3" / "sites" / site / "student.safetensors"
            assert kept.read_bytes() == models[backend][1]
    assert models["ray"] == models["inprocess"]
    assert summaries["ray"].keys() == summaries["inprocess"].keys()
    for key in summaries["ray"].keys() - OF_THE_MACHINE:
        assert summaries["ray"][key] == summaries["inprocess"][key], key
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inprocess", "ray"]
