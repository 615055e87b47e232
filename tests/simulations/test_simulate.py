"""A simulation from seeds to a folder of results, which is whole or not there."""

import threading
import time

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import UserError
from common.summary import Round, read
from simulations.settings import run_settings
from simulations.simulate import MODELS, check, rounds_watched, simulate


def run(config: RunConfig, seeds, final):
    stages, rounds = [], []
    summary = simulate(config, seeds, "inprocess", final, lambda *stage: stages.append(stage), rounds.append)
    return summary, stages, rounds


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    final = tmp_path_factory.mktemp("simulated") / "results"
    return final, *run(run_settings("heart", ["num-rounds=3"]), [4, 1], final)


def test_the_folder_has_the_whole_and_each_seed(simulated):
    final, summary, _, _ = simulated
    shown = {"summary.json", "report.html", "teacher.safetensors", "student.safetensors", "seed-4", "seed-1"}
    assert {path.name for path in final.iterdir()} == shown
    assert [path.name for path in final.parent.iterdir()] == ["results"]
    kept = {path.name for path in (final / "seed-4" / "sites").rglob("*") if path.is_file()}
    assert {name for name in kept if name.startswith("ledger")} == {"ledger.db"}
    assert read(final / "summary.json") == summary
    for model in MODELS:
        assert (final / model).read_bytes() == (final / "seed-4" / model).read_bytes()
        assert (final / model).read_bytes() != (final / "seed-1" / model).read_bytes()


def test_seeds_are_merged_in_the_order_given(simulated):
    final, summary, _, _ = simulated
    assert summary.seeds == (4, 1) and summary.rounds == 3 and summary.backend == "inprocess"
    single = [read(final / f"seed-{seed}" / "summary.json") for seed in (4, 1)]
    for name in ("federation", "pooled_dp", "sites_alone", "public_only"):
        values = getattr(summary.results, name)["auroc"].values
        assert values == tuple(getattr(one.results, name)["auroc"].mean for one in single)
    assert summary.run_id == "results"


def test_progress_is_told_round_by_round(simulated):
    _, summary, stages, rounds = simulated
    assert stages == [(4, "rounds"), (4, "comparisons"), (1, "rounds"), (1, "comparisons")]
    assert tuple(rounds) == summary.history


def test_a_seed_gives_the_same_whoever_else_was_run_before(simulated, tmp_path):
    final, _, _, _ = simulated
    run(run_settings("heart", ["num-rounds=3"]), [1], tmp_path / "again")
    for model in MODELS:
        assert (tmp_path / "again" / model).read_bytes() == (final / "seed-1" / model).read_bytes()


@pytest.mark.parametrize(
    ("pairs", "seeds", "complaint"),
    [
        ("", [1, 2, 1], "--seeds 1,2,1: a seed occurs twice"),
        ('privacy.unit="patient"', [0], r"privacy.unit = 'patient' is refused: expected record"),
        ("proxy-cases=200", [0], r"proxy-cases = 200 is refused"),
        ("data.proxy-size=900", [0], r"data.proxy-size = 900 is refused"),
        ("min-sites=9", [0], r"min-sites = 9 is refused"),
        ('privacy.site-epsilons="1,2,3,4,5"', [0], "expected at most the 4 sites there are"),
        ('patience=2 method="oneshot"', [0], "patience = 2 is refused: expected 0: the run has one round"),
        (
            'resumable=true run-id="x"',
            [0],
            "resumable = True is refused: expected false: a simulation starts anew",
        ),
    ],
)
def test_what_can_be_known_before_is_refused_before_anything_is_written(tmp_path, pairs, seeds, complaint):
    config = run_settings("heart", [pairs])
    with pytest.raises(UserError, match=complaint):
        check(config, seeds)
    with pytest.raises(UserError, match=complaint):
        run(config, seeds, tmp_path / "results")
    assert not list(tmp_path.iterdir())


def own_data(folder, patient: bool):
    """Two hospitals with ninety records of sixty patients each, described in a `data.toml`."""
    rng = np.random.default_rng(0)
    for hospital in ("north", "south"):
        rows = ["who,age,dose,ill"]
        for _ in range(90):
            age, dose = rng.normal(), rng.normal()
            ill = "yes" if age - dose + 0.5 * rng.normal() > 0 else "no"
            rows.append(f"{hospital}-{rng.integers(60)},{age},{dose},{ill}")
        (folder / f"{hospital}.csv").write_text("\n".join(rows) + "\n")
    (folder / "data.toml").write_text(
        'target = "ill"\nclasses = ["no", "yes"]\n'
        + ('patient = "who"\n' if patient else "")
        + '[[features]]\nname = "age"\nkind = "numeric"\n'
        + '[[features]]\nname = "dose"\nkind = "numeric"\n'
        + '[sites.north]\ndeclared-size = 40\nfile = "north.csv"\n'
        + '[sites.south]\ndeclared-size = 40\nfile = "south.csv"\n'
        + "[public-sample]\nproxy-size = 20\nproxy-labels = 10\nvalidation-size = 8\ntest-size = 20\n"
    )
    pairs = f'num-rounds=2 privacy.unit="patient" data.description="{folder / "data.toml"}"'
    return run_settings("own", [pairs])


def test_ones_own_data_with_patients_as_the_unit(tmp_path):
    summary, _, _ = run(own_data(tmp_path, patient=True), [0], tmp_path / "results")
    assert {line.unit for line in summary.privacy} == {"patient"}
    assert [line.site for line in summary.privacy] == ["north", "south"]
    assert all(line.answered == ("north", "south") for line in summary.history)
    with pytest.raises(UserError, match=r"privacy.unit = 'patient' is refused"):
        run(own_data(tmp_path, patient=False), [0], tmp_path / "others")


def texts(folder, settings: str):
    """Two hospitals with sixty notes each, which say in many words whether somebody is ill."""
    rng = np.random.default_rng(0)
    about = {"no": ["well", "rested", "better"], "yes": ["severe pain", "worse", "feverish"]}
    for hospital in ("north", "south"):
        rows = ["ill,note"]
        for ill in rng.choice(["no", "yes"], 60):
            rows.append(f'{ill},"Seen today, {rng.choice(about[ill])}; {rng.choice(about[ill])}."')
        (folder / f"{hospital}.csv").write_text("\n".join(rows) + "\n")
    (folder / "data.toml").write_text(
        'target = "ill"\nclasses = ["no", "yes"]\n'
        + '[[features]]\nname = "note"\nkind = "text"\nlength = 60\nvocabulary = 1024\n'
        + '[sites.north]\ndeclared-size = 30\nfile = "north.csv"\n'
        + '[sites.south]\ndeclared-size = 30\nfile = "south.csv"\n'
        + "[public-sample]\nproxy-size = 40\nproxy-labels = 8\nvalidation-size = 10\ntest-size = 20\n"
    )
    pairs = f'num-rounds=2 privacy.epsilon=20.0 data.description="{folder / "data.toml"}" {settings}'
    return run_settings("own", [pairs])


WORDS = 'student.features="words" teacher.features="words"'
TEXT = 'student.model="text" student.features="none"'


@pytest.mark.parametrize(
    "settings",
    [
        f'{WORDS} student.model="mlp"',
        pytest.param(f'{TEXT} students="mixed" teacher.model="text"', marks=pytest.mark.slow),
        pytest.param(f'{TEXT} student.private-layers="all" teacher.features="words"', marks=pytest.mark.slow),
    ],
)
def test_ones_own_texts(tmp_path, settings):
    summary, _, _ = run(texts(tmp_path, settings), [0], tmp_path / "results")
    assert all(line.answered == ("north", "south") for line in summary.history)
    assert summary.results.federation["auroc"].mean > 0.9


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            WORDS.replace('"words"', '"pca"', 1),
            "student.features = 'pca' is refused: expected words, or model",
        ),
        (
            WORDS.replace('"words"', '"none"', 1),
            "student.model = 'linear' is refused: expected text, or features",
        ),
        (
            f'{WORDS} teacher.model="text"',
            "teacher.model = 'text' is refused: expected linear or mlp for cases",
        ),
    ],
)
def test_what_is_not_for_texts_is_refused_by_key(tmp_path, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        run(texts(tmp_path, settings), [0], tmp_path / "results")


def test_rounds_are_followed_while_the_folder_gets_its_name(tmp_path):
    """The server app writes in another thread or process, and renames its folder at the end."""
    lines = [Round(seed=0, round=number) for number in range(1, 31)]
    seen = []

    def write() -> None:
        work = tmp_path / ".run.partial"
        work.mkdir()
        for line in lines:
            with (work / "rounds.jsonl").open("a") as file:
                text = line.model_dump_json() + "\n"
                file.write(text[:5])
                file.flush()
                time.sleep(0.005)
                file.write(text[5:])
        work.rename(tmp_path / "run")

    writer = threading.Thread(target=write)
    with rounds_watched(tmp_path / "run", seen.append):
        writer.start()
        writer.join()
    assert seen == lines


def test_following_ends_with_the_run_even_if_nothing_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), rounds_watched(tmp_path / "run", pytest.fail):
        raise KeyboardInterrupt
    assert threading.active_count() < 20
