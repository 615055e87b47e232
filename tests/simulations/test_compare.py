"""`grandrounds compare`: a grid of cells that survives interruption, and what comes of it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from common.codec import CODECS
from common.config import RunConfig
from common.errors import UserError
from simulations.baselines.registry import METHODS
from simulations.compare import CELLS, PAGE, RESULT, ask, cells_of, compare
from simulations.compare_page import bytes_picture, comparison_table, epsilon_picture
from simulations.comparison import Comparison, Question, read
from simulations.settings import run_settings

ROOT = Path(__file__).resolve().parents[2]
SOME = ["public-only", "sites-alone", "dp-fedsgd", "federation"]


def heart(pairs: str = "num-rounds=2") -> RunConfig:
    return run_settings("heart", [pairs])


def question(config: RunConfig, **changes) -> Question:
    asked = {"epsilons": [1.0, 8.0], "seeds": [4, 1], "methods": SOME} | changes
    return ask(config, **asked)


class Stop(Exception):
    pass


def quiet(*_) -> None:
    pass


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> tuple[Path, Comparison]:
    final = tmp_path_factory.mktemp("compared") / "results"
    return final, compare(heart(), question(heart()), final, quiet)


def test_what_does_not_depend_on_epsilon_is_one_cell_a_seed():
    cells = cells_of(question(heart()))
    assert [(one.seed, one.epsilon, one.method) for one in cells[:4]] == [
        (4, None, "public-only"),
        (4, 1.0, "sites-alone"),
        (4, 1.0, "dp-fedsgd"),
        (4, 1.0, "federation"),
    ]
    assert len(cells) == 2 * (1 + 2 * 3)


def test_the_folder_holds_the_whole(answered):
    final, comparison = answered
    assert {path.name for path in final.iterdir()} == {"question.json", RESULT, PAGE, CELLS}
    assert [path.name for path in final.parent.iterdir()] == ["results"]
    assert read(final / RESULT) == comparison
    assert len(list((final / CELLS).iterdir())) == 14


def test_rows_carry_scores_by_seed_bytes_and_what_was_paid(answered):
    _, comparison = answered
    rows = {(row.method, row.epsilon): row for row in comparison.rows}
    assert list(rows) == [
        ("public-only", None),
        *((name, epsilon) for name in SOME[1:] for epsilon in (1.0, 8.0)),
    ]
    ours = rows["federation", 8.0]
    assert len(ours.metrics["auroc"].values) == 2 and ours.rounds == 2
    assert 121 < ours.bytes_up_per_round <= 121 + CODECS["int8"].longest(184, 2)
    assert ours.bytes_up == 2 * ours.bytes_up_per_round
    assert ours.bytes_down == 2 * ours.bytes_down_per_round > 1000
    assert 7.9 < ours.paid.epsilon <= 8 and (ours.paid.delta, ours.paid.unit) == (1e-5, "record")
    assert rows["public-only", None].paid is None and not rows["sites-alone", 1.0].bytes_up
    assert rows["dp-fedsgd", 1.0].settings["privacy.steps-per-round"] == 1


def test_the_federations_score_is_simulates_own(answered, tmp_path):
    from simulations.simulate import simulate

    _, comparison = answered
    alone = simulate(heart(), [4, 1], "inprocess", tmp_path / "run", quiet, quiet)
    (row,) = (row for row in comparison.of("federation") if row.epsilon == 1.0)
    assert row.metrics == alone.results.federation
    (row,) = (row for row in comparison.of("sites-alone") if row.epsilon == 1.0)
    assert row.metrics["auroc"].values == pytest.approx(alone.results.sites_alone["auroc"].values)


def test_an_interrupted_comparison_goes_on_where_it_stopped(answered, tmp_path):
    _, whole = answered
    final, seen = tmp_path / "results", []

    def stop_at_six(cell, done, total):
        seen.append((cell.method, cell.epsilon, cell.seed))
        if done == 6:
            raise Stop

    with pytest.raises(Stop):
        compare(heart(), question(heart()), final, stop_at_six)
    assert not final.exists() and len(seen) == 7
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".results.partial" / CELLS).iterdir()}
    assert len(kept) == 6
    damaged = tmp_path / ".results.partial" / CELLS / sorted(kept)[0]
    damaged.write_text(damaged.read_text()[:40])
    del kept[damaged.name]
    again = compare(heart(), question(heart()), final, quiet)
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in (final / CELLS).iterdir()}.items()
    assert [row.metrics for row in again.rows] == [row.metrics for row in whole.rows]


@pytest.mark.parametrize(
    ("config", "changes", "what"),
    [
        ("num-rounds=3", {}, "num-rounds is 2 there and 3 here"),
        ("num-rounds=2", {"epsilons": [1.0]}, "--epsilons is (1.0, 8.0) there and (1.0,) here"),
        ("num-rounds=2", {"seeds": [1, 4]}, "--seeds is (4, 1) there and (1, 4) here"),
        ("num-rounds=2", {"methods": SOME[1:]}, "--methods is"),
    ],
)
def test_another_question_in_the_same_place_is_refused(answered, tmp_path, config, changes, what):
    final, _ = answered
    other = question(heart(config), **changes)
    with pytest.raises(UserError, match="holds another comparison") as whole:
        compare(heart(config), other, final, pytest.fail)
    assert what in str(whole.value)

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        compare(heart(), question(heart()), tmp_path / "half", stop)
    with pytest.raises(UserError, match="holds another comparison") as half:
        compare(heart(config), other, tmp_path / "half", pytest.fail)
    assert what in str(half.value)


def test_what_a_killed_simulation_left_there_is_no_part_of_it(tmp_path):
    (tmp_path / ".run.partial" / "seed-0").mkdir(parents=True)
    asked = question(heart(), epsilons=[1.0], seeds=[0], methods=["teacher-alone"])
    compare(heart(), asked, tmp_path / "run", quiet)
    assert not (tmp_path / "run" / "seed-0").exists()


def test_the_same_question_again_is_answered_from_the_folder(answered):
    final, comparison = answered
    assert compare(heart(), question(heart()), final, pytest.fail) == comparison


def test_seed_epsilon_and_place_of_the_run_config_do_not_make_another_question():
    config = heart('num-rounds=2 seed=7 privacy.epsilon=2.0 out="else" run-id="x"')
    assert question(config) == question(heart())


def test_a_method_that_has_nothing_to_go_by_is_named(tmp_path):
    config = heart('num-rounds=1 data.proxy-labels=0 teacher.model="none"')
    methods = ["teacher-alone", "public-only", "dp-fedsgd"]
    asked = question(config, epsilons=[1.0], seeds=[0], methods=methods)
    comparison = compare(config, asked, tmp_path / "run", quiet)
    assert comparison.not_computable == ("teacher-alone", "public-only")
    assert [row.method for row in comparison.rows] == ["dp-fedsgd"]
    assert "Not computable in this run: teacher-alone, public-only" in (tmp_path / "run" / PAGE).read_text()


def test_a_file_of_another_schema_is_refused(answered, tmp_path):
    final, _ = answered
    changed = json.loads((final / RESULT).read_text()) | {"schema": 2}
    (tmp_path / RESULT).write_text(json.dumps(changed))
    with pytest.raises(UserError, match="is not a comparison of schema 1"):
        read(tmp_path / RESULT)


def test_every_field_is_documented():
    page = (ROOT / "docs" / "compare-schema.md").read_text()
    from simulations.comparison import Paid, Row

    for part in (Comparison, Question, Row, Paid):
        for name, field in part.model_fields.items():
            assert f"| `{field.alias or name}` |" in page, f"{part.__name__}.{name}"


# ---- What people see ----


def test_the_table_says_score_spread_bytes_and_terms(answered):
    _, comparison = answered
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(comparison_table(comparison))
    text = " ".join(console.export_text().split())
    (ours,) = (row for row in comparison.of("federation") if row.epsilon == 8.0)
    sizes = f"{round(ours.bytes_up_per_round)} bytes"
    for said in ("AUROC × 100, mean ± standard deviation of 2 seeds", "ε = 8", sizes):
        assert said in text
    assert "δ = 1e-5, one record, add/remove one, this run alone, at each site; by exact Gaussian" in text


def test_the_page_opens_offline_and_shows_both_pictures(answered):
    final, comparison = answered
    page = (final / PAGE).read_text()
    assert page.count("<svg ") == 2 and "<script" not in page and "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org/1999/xlink", "")
    for picture in (epsilon_picture(comparison), bytes_picture(comparison)):
        assert "Federation" in picture.alt and "Federation" in picture.svg


def test_without_anybody_who_sends_there_is_no_picture_of_bytes(answered):
    _, comparison = answered
    alone = comparison.model_copy(update={"rows": tuple(comparison.of("sites-alone"))})
    assert bytes_picture(alone) is None and "<svg" in epsilon_picture(alone).svg


# ---- The command ----


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--epsilons", "1,0"], "--epsilons '1,0' is refused: expected numbers above 0"),
        (["--epsilons", "1,x"], "--epsilons '1,x' is refused"),
        (["--epsilons", "1,1"], "--epsilons 1.0,1.0: one of them occurs twice"),
        (["--seeds", "1,1"], "--seeds 1,1: one of them occurs twice"),
        (["--run-config", 'privacy.site-epsilons="0.3,1"'], "a comparison holds every site to one ε"),
        (["--methods", "fedsgd"], "--methods 'fedsgd' is refused: expected some of teacher-alone, "),
        (["--run-config", "privacy.epsilon=2.0"], "a comparison takes it by --epsilons"),
        (["--run-config", "seed=7"], "a comparison takes it by --seeds"),
        (["--run-config", "num-round=2"], "did you mean num-rounds"),
        (["--run-config", "proxy-cases=900"], "proxy-cases = 900 is refused"),
        (["hart"], "there is no scenario 'hart'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_before_anything_is_written(
    tmp_path, arguments, complaint, command
):
    code, out, err = command("compare", "--out", str(tmp_path / "run"), *arguments)
    assert code == 2 and out == "" and complaint in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_json_alone_is_on_standard_output(tmp_path, command):
    few = ["--epsilons", "1", "--seeds", "0", "--methods", "teacher-alone,dp-fedavg"]
    code, out, err = command("compare", "heart", "--json", "--out", str(tmp_path / "run"), *few)
    assert code == 0 and out == (tmp_path / "run" / RESULT).read_text()
    assert json.loads(out)["schema"] == 1 and "2/2" in err


def test_without_a_name_the_same_question_finds_its_folder(tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--epsilons", "1", "--methods", "teacher-alone"]
    for seeds in ("0", "0", "1"):
        assert command("compare", "--seeds", seeds, *few)[0] == 0
    names = [path.name for path in (tmp_path / "runs").iterdir()]
    assert len(names) == 2 and all(name.startswith("compare-heart-") for name in names)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path, command):
    arguments = ["compare", "--out", str(tmp_path / "run"), "--epsilons", "1", "--seeds", "0"]
    arguments += ["--methods", "teacher-alone,federation", "--run-config", "num-rounds=300"]
    process = subprocess.Popen(
        [sys.executable, "-m", "grandrounds", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would whatever they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first, deadline = tmp_path / ".run.partial" / CELLS / "teacher-alone-any-0.json", time.monotonic() + 60
    while not first.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in err
    assert "Traceback" not in err and not (tmp_path / "run").exists()
    before = first.stat().st_mtime_ns
    assert command(*arguments)[0] == 0
    assert (tmp_path / "run" / CELLS / first.name).stat().st_mtime_ns == before


def test_every_method_has_a_marker_and_a_colour():
    from server.report.drawing import COLOURS
    from simulations.compare_page import _MARKERS

    assert len(METHODS) <= len(set(_MARKERS)) and {one.kind for one in METHODS.values()} <= set(COLOURS)
