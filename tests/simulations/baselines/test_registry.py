"""The table of methods: each runs, each under settings that a run config takes."""

import pytest

from simulations.baselines import tuning
from simulations.baselines.registry import (
    METHODS,
    TUNED,
    configured,
    read_tuned,
    settings_of,
    tuned_for,
    tuned_name,
)
from simulations.baselines.tuning import GRIDS, points
from simulations.settings import run_settings, scenario_names


def at(epsilon: float, scenario: str = "heart"):
    return run_settings(scenario, [f"privacy.epsilon={epsilon}"])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_runs_and_pays_no_more_than_it_may(name, bench):
    config = at(1.0)
    found = METHODS[name].run(configured(name, config), bench)
    assert 0.5 < found.scores["auroc"] <= 1
    assert (found.guarantee is not None) == METHODS[name].private
    if found.guarantee:
        assert 0.95 < found.guarantee.epsilon <= 1.0
    travels = METHODS[name].kind in ("baseline", "federation")
    assert bool(found.rounds) == bool(found.bytes_up) == bool(found.bytes_down) == travels
    assert METHODS[name].kind != "baseline" or METHODS[name].paper


@pytest.mark.parametrize("scenario", [path.stem for path in TUNED.glob("*.toml")])
def test_what_was_tuned_is_a_run_config_of_a_method_at_an_epsilon(scenario):
    name, _, number = scenario.partition("-")
    assert name in scenario_names()
    for entry in read_tuned(scenario):
        config = at(entry["epsilon"], name)
        if number:
            config = config.changed({"data.num-sites": int(number)})
        assert tuned_name(config) == scenario
        settings = settings_of(entry["method"], config)
        assert settings == {key: entry[key] for key in entry.keys() - {"method", "epsilon"}}
        assert configured(entry["method"], config).flat().items() >= settings.items()


def test_the_nearest_tuned_epsilon_serves_on_a_scale_of_factors():
    assert settings_of("dp-fedsgd", at(1.7)) == settings_of("dp-fedsgd", at(1.0))
    assert settings_of("dp-fedsgd", at(4.0)) == settings_of("dp-fedsgd", at(3.0))
    assert settings_of("dp-fedsgd", at(900.0)) == settings_of("dp-fedsgd", at(8.0))


def test_another_number_of_sites_has_settings_of_its_own_where_they_were_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr("simulations.baselines.registry.TUNED", tmp_path)
    read_tuned.cache_clear()
    entry = '[[settings]]\nmethod = "dp-fedavg"\nepsilon = 1.0\n"privacy.step-size" = '
    (tmp_path / "fashion.toml").write_text(f"{entry}5.0\n")
    (tmp_path / "fashion-200.toml").write_text(f"{entry}0.2\n")
    try:
        for number, step in ((5, 5.0), (20, 5.0), (200, 0.2)):
            config = run_settings("fashion", [f"data.num-sites={number}"])
            assert settings_of("dp-fedavg", config) == {"privacy.step-size": step}
        # A method that wasn't tuned for two hundred keeps what five sites found; one never tuned stays out.
        (tmp_path / "fashion.toml").write_text(f"{entry}5.0\n{entry.replace('dp-fedavg', 'fedmd')}7.0\n")
        read_tuned.cache_clear()
        assert settings_of("fedmd", config) == {"privacy.step-size": 7.0}
        assert tuned_for("federation-tuned", config) == []
    finally:
        read_tuned.cache_clear()


def test_tuning_some_methods_keeps_what_was_found_for_others(tmp_path, monkeypatch):
    for module in ("registry", "tuning"):
        monkeypatch.setattr(f"simulations.baselines.{module}.TUNED", tmp_path)
    found = [({"method": "fedmd", "epsilon": 1.0, "privacy.step-size": 9.0}, "found now")]
    monkeypatch.setattr(tuning, "tune", lambda *_: found)
    old = '[[settings]]\nmethod = "{}"\nepsilon = {}\n"privacy.step-size" = 5.0\n'
    content = "".join(old.format(*of) for of in (("fedmd", 1.0), ("fedmd", 8.0), ("dp-fedavg", 1.0)))
    (tmp_path / "fashion.toml").write_text(content)
    read_tuned.cache_clear()
    try:
        tuning.main("fashion", methods="fedmd", epsilons="1")
        steps = {(one["method"], one["epsilon"]): one["privacy.step-size"] for one in read_tuned("fashion")}
        assert steps == {("fedmd", 1.0): 9.0, ("fedmd", 8.0): 5.0, ("dp-fedavg", 1.0): 5.0}
    finally:
        read_tuned.cache_clear()


def test_where_nothing_was_tuned_the_usual_serves_and_the_run_keeps_the_rest():
    config = run_settings("own", ["privacy.step-size=0.7 num-rounds=33"])
    assert settings_of("dp-fedavg", config) == METHODS["dp-fedavg"].usual
    ours = configured("dp-fedavg", config)
    assert (ours.num_rounds, ours.privacy.steps_per_round, ours.privacy.step_size) == (10, 3, 0.7)
    assert configured("federation", config) == configured("pooled-dp", config) == config


def test_a_public_method_without_public_labels_has_nothing_to_say(bench):
    config = run_settings("heart", ['data.proxy-labels=0 teacher.model="none"'])
    from simulations.baselines.bench import Bench

    assert METHODS["teacher-alone"].run(config, bench) is None
    assert METHODS["public-only"].run(config, Bench.open(config)) is None


@pytest.mark.parametrize("name", GRIDS)
def test_every_point_of_a_grid_is_a_run_config(name):
    config = run_settings("fashion", [])
    tried = list(points(name, config))
    assert len({tuple(sorted(point.items())) for point in tried}) == len(tried) > 5
    for point in tried:
        assert type(config).from_run_config({**config.flat(), **point})
