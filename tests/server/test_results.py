"""What is written down: every round on disk as it ends, and a summary in which no number flatters."""

import json
from pathlib import Path

import pytest

from common.config import RunConfig
from common.datasets import load_public
from common.plan import plan_of
from common.rounding import at_most
from common.runs import RunFolder
from common.summary import Results, Round, read, statistic
from server.admission import Admitted
from server.metrics import RunMetrics
from server.results import ROUNDS, Journal, Record, in_words, metrics_of

SIZES = {"east": 200, "north": 300, "west": 400}
ABSENT = {"node 9": "a malformed answer: not a greeting"}
CONFIG = RunConfig.from_run_config({"num-rounds": 4})
SCORES = {"auroc": 0.9, "accuracy": 0.8, "log_loss": 1.7}


@pytest.fixture(scope="module")
def public():
    return load_public(CONFIG)


def admitted(
    answered: str = "", idle: str = "", sizes: dict[str, int] | None = None, **left_out: str
) -> Admitted:
    sizes = sizes or dict.fromkeys(answered.split(), 489)
    wire = {name: size + 150 for name, size in sizes.items()}
    return Admitted(tuple(answered.split()), left_out, frozenset(idle.split()), {}, {}, {}, sizes, wire)


@pytest.fixture
def journal(tmp_path, public):
    with RunFolder.open(tmp_path / "run") as folder:
        plan = plan_of(CONFIG, study="run", proxy_digest=public.proxy.digest, classes=2)
        yield (
            Journal(folder, CONFIG, plan, Record(plans=dict.fromkeys(SIZES, plan)), RunMetrics()),
            folder.path,
        )


def finish(journal: Journal, folder: Path, public):
    score = {"auroc": statistic([0.9]), "accuracy": statistic([0.8])}
    journal.finish(public, SIZES, Results(federation=score))
    return read(folder / "summary.json")


def test_every_round_is_on_disk_when_it_ends(journal):
    journal, folder = journal
    for number in (1, 2):
        journal.note(number, admitted("east north west"), SIZES, ABSENT, SCORES)
        lines = (folder / ROUNDS).read_text().splitlines()
        assert len(lines) == number
        assert json.loads(lines[-1])["round"] == number


def test_a_round_names_who_was_left_out_and_why(journal):
    journal, folder = journal
    journal.note(1, admitted("east", north="no answer in time", west="answered twice"), SIZES, ABSENT, SCORES)
    line = json.loads((folder / ROUNDS).read_text())
    assert line["answered"] == ["east"]
    assert {one["site"]: one["reason"] for one in line["left_out"]} == {
        "node 9": "a malformed answer: not a greeting",
        "north": "no answer in time",
        "west": "answered twice",
    }


def test_only_who_said_in_every_round_that_it_took_no_step_has_spent_nothing(journal, public):
    journal, folder = journal
    journal.note(1, admitted("east north", idle="west", west="its budget is spent"), SIZES, ABSENT, SCORES)
    journal.note(
        2, admitted("east", idle="west", north="no answer in time", west="spent"), SIZES, ABSENT, SCORES
    )
    summary = finish(journal, folder, public)
    spent = {line.site: line.epsilon for line in summary.privacy}
    assert spent["west"] == 0
    # The plan was reserved in full, though two rounds of four were held and one answer was lost.
    assert spent["east"] == spent["north"] > 0.97


def test_a_site_that_was_idle_once_has_spent_all_the_same(journal, public):
    journal, folder = journal
    journal.note(1, admitted("east north west"), SIZES, ABSENT, SCORES)
    journal.note(2, admitted("east north", idle="west", west="its budget is spent"), SIZES, ABSENT, SCORES)
    summary = finish(journal, folder, public)
    assert {line.site for line in summary.privacy if line.epsilon > 0.9} == set(SIZES)


def test_each_site_pays_for_its_own_plan_and_only_for_the_rounds_that_it_was_asked(tmp_path, public):
    plan = plan_of(CONFIG, study="run", proxy_digest=public.proxy.digest, classes=2)
    poor = plan.within(0.3, 2)
    with RunFolder.open(tmp_path / "run") as folder:
        record = Record(plans={"east": plan, "north": poor})
        journal = Journal(folder, CONFIG, plan, record, RunMetrics())
        journal.note(1, admitted("north"), ["north"], {"east": "nobody answered to this name"}, SCORES)
        journal.note(2, admitted("east north"), ["east", "north"], {}, SCORES)
        journal.note(3, admitted("east"), ["east"], {"north": "its own plan ended with round 2"}, SCORES)
        spent = [line.epsilon_spent for line in record.rounds]
        # A late site has not spent more by round 3 than two rounds cost, though its whole plan is charged.
        assert spent == [
            poor.guarantee(1).epsilon,
            max(poor.guarantee().epsilon, plan.guarantee(1).epsilon),
            plan.guarantee(2).epsilon,
        ]
        assert Record.model_validate_json(record.model_dump_json()) == record
        summary = finish(journal, folder.path, public)
    lines = {line.site: line for line in summary.privacy}
    assert lines["east"].epsilon == plan.guarantee().epsilon
    assert lines["north"].epsilon == poor.guarantee().epsilon <= 0.3
    assert lines["north"].noise_multiplier == poor.noise_multiplier() > plan.noise_multiplier()


def test_nothing_was_spent_where_nobody_took_a_step(journal):
    journal, folder = journal
    journal.note(1, admitted(idle="east north west"), SIZES, ABSENT, SCORES)
    assert json.loads((folder / ROUNDS).read_text())["epsilon_spent"] == 0


def test_bytes_are_averaged_over_sites_and_rounds(journal, public):
    journal, folder = journal
    journal.note(1, admitted("east north", sizes={"east": 500, "north": 500}), SIZES, ABSENT, SCORES)
    journal.note(2, admitted("east", sizes={"east": 200}), SIZES, ABSENT, SCORES)
    summary = finish(journal, folder, public)
    assert summary.bytes_up_per_site_per_round.model_dump() == {"mean": 400.0, "max": 500}
    assert summary.wire_bytes_up_per_site_per_round.model_dump() == {"mean": 550.0, "max": 650}
    assert summary.rounds == 2


def test_the_summary_says_what_was_public_and_what_was_declared(journal, public):
    journal, folder = journal
    journal.note(1, admitted("east north west"), SIZES, ABSENT, SCORES)
    summary = finish(journal, folder, public)
    assert summary.public.model_dump() == {
        "proxy": 184,
        "proxy_labelled": 60,
        "validation": 30,
        "test": 230,
        "by_assumption": True,
    }
    assert summary.declared_sizes == {"east": 200, "north": 300, "west": 400}
    assert summary.proxy_digests == (public.proxy.digest.hex(),)
    assert summary.run_config["num-rounds"] == 4
    assert summary.backend is None
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_scores_that_are_no_fractions_are_left_out():
    assert set(metrics_of(SCORES)) == {"auroc", "accuracy"}
    assert set(metrics_of({"accuracy": 0.5})) == {"accuracy"}


def test_a_round_in_words(journal):
    journal, folder = journal
    journal.note(1, admitted("east north", west="answered twice"), SIZES, {}, SCORES)
    line = Round.model_validate_json((folder / ROUNDS).read_text())
    assert in_words(line) == f"auroc 90.0, accuracy 80.0, ε {at_most(line.epsilon_spent, 3)}, without west"
