"""The summary is a contract: what it accepts, what it refuses, and how seeds are put together."""

import json
import math
import os
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from common.errors import UserError
from common.summary import (
    Bytes,
    LeftOut,
    Metrics,
    PublicSizes,
    Results,
    Round,
    SitePrivacy,
    Summary,
    contenders,
    merge,
    read,
    statistic,
    to_json,
    write,
)

CONTRACT = """
{"schema": 1, "scenario": "heart", "seeds": [0, 1],
 "results": {"federation": {"auroc": {"mean": 0.87, "std": 0.01, "values": [0.86, 0.88]},
                            "accuracy": {"mean": 0.8, "std": 0.0, "values": [0.8, 0.8]}}},
 "privacy": [{"site": "cleveland", "epsilon": 0.99, "delta": 1e-5,
              "unit": "record", "adjacency": "add-remove", "accountant": "gaussian-exact"}],
 "bytes_up_per_site_per_round": {"mean": 700, "max": 700},
 "rounds": 20, "seconds": 11.2, "peak_memory_mib": 600}
"""

RESULT_KEYS = (
    "teacher_alone",
    "public_only",
    "public_only_if_labelled",
    "sites_alone",
    "sites_alone_each",
    "federation",
    "student",
    "pooled_dp",
    "pooled_no_privacy",
)


def metrics(auroc: float) -> Metrics:
    return {"auroc": statistic([auroc]), "accuracy": statistic([0.9 * auroc])}


def one_seed(seed: int, auroc: float = 0.87, epsilon: float = 0.99, **changes: Any) -> Summary:
    """One seed of `heart`, with everything filled in."""
    return Summary(
        **{
            "scenario": "heart",
            "seeds": (seed,),
            "results": Results(
                teacher_alone=metrics(0.85),
                sites_alone=metrics(0.66),
                sites_alone_each={"cleveland": metrics(0.86), "st. gallen": metrics(0.46)},
                federation=metrics(auroc),
                pooled_dp=None,
            ),
            "privacy": tuple(
                SitePrivacy(
                    site=site,
                    epsilon=epsilon,
                    delta=1e-5,
                    unit="record",
                    adjacency="add-remove",
                    accountant="gaussian-exact",
                    noise_multiplier=17.3,
                )
                for site in ("cleveland", "st. gallen")
            ),
            "bytes_up_per_site_per_round": Bytes(mean=260.0 + seed, max=270 + seed),
            "wire_bytes_up_per_site_per_round": Bytes(mean=700.0, max=710),
            "rounds": 20,
            "seconds": 10.0,
            "peak_memory_mib": 600.0 + seed,
            "method": "descent",
            "backend": "inprocess",
            "run_id": f"heart-{seed}",
            "finished": datetime(2025, 11, 24, 9, seed, tzinfo=UTC),
            "classes": ("no disease", "disease"),
            "public": PublicSizes(proxy=184, proxy_labelled=60, validation=0, test=230 + seed),
            "declared_sizes": {"cleveland": 167 + 2 * seed, "st. gallen": 68},
            "proxy_digests": (f"{seed:064x}",),
            "run_config": {"scenario": "heart", "seed": seed, "privacy.epsilon": 1.0, "out": f"runs/{seed}"},
            "history": (
                Round(
                    seed=seed,
                    round=1,
                    metrics={"auroc": 0.8},
                    epsilon_spent=0.2,
                    answered=("cleveland",),
                    left_out=(LeftOut(site="st. gallen", reason="no answer"),),
                    bytes_up=Bytes(mean=260.0, max=260),
                ),
            ),
            "versions": {"flwr": "1.41.0"},
            **changes,
        }
    )


# ---- Schema


def test_contract_of_other_programs_is_a_summary() -> None:
    summary = Summary.model_validate_json(CONTRACT, strict=True)
    assert summary.results.federation["auroc"].values == (0.86, 0.88)
    assert summary.privacy[0].horizon == "run"


def test_json_has_every_key_of_the_contract_and_null_for_what_is_absent() -> None:
    written = json.loads(to_json(one_seed(0)))
    for key in json.loads(CONTRACT):
        assert key in written
    assert tuple(written["results"]) == RESULT_KEYS
    assert written["results"]["pooled_dp"] is None
    assert written["schema"] == 1
    assert "schema_version" not in written


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("surprise",), 1),
        (("seeds",), []),
        (("seeds",), [0, 0]),
        (("seeds",), [0, 1, 2]),
        (("rounds",), -1),
        (("seconds",), float("nan")),
        (("headline_metric",), "f1"),
        (("results", "federation"), {}),
        (("results", "federation"), None),
        (("results", "someone_else"), {}),
        (("results", "federation", "auroc", "mean"), 87.0),
        (("results", "federation", "auroc", "values"), [0.86]),
        (("results", "federation", "auroc", "values"), []),
        (("privacy", 0, "epsilon"), -0.1),
        (("privacy", 0, "epsilon"), float("inf")),
        (("privacy", 0, "delta"), 1.0),
        (("privacy", 0, "unit"), "hospital"),
        (("privacy", 0, "adjacency"), "replace-one"),
        (("privacy", 0, "horizon"), "week"),
        (("status",), "fine"),
    ],
)
def test_what_breaks_the_contract_is_refused(path: tuple[str | int, ...], value: object) -> None:
    document = json.loads(CONTRACT)
    branch = document
    for step in path[:-1]:
        branch = branch[step]
    branch[path[-1]] = value
    with pytest.raises(ValidationError):
        Summary.model_validate(document)


def test_is_frozen() -> None:
    with pytest.raises(ValidationError):
        one_seed(0).rounds = 3  # type: ignore[misc]


def test_sites_are_all_that_were_expected() -> None:
    assert one_seed(0).sites == ("cleveland", "st. gallen")
    assert one_seed(0, declared_sizes={}, privacy=()).sites == ("st. gallen",)


def test_every_field_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "summary-schema.md").read_text(encoding="utf-8")
    parts = (Summary, Results, SitePrivacy, Bytes, PublicSizes, Round, LeftOut)
    fields = {field.alias or name for part in parts for name, field in part.model_fields.items()}
    assert [name for name in sorted(fields) if f"`{name}`" not in page] == []


# ---- Statistics


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_statistic_agrees_with_the_standard_library(values: list[float]) -> None:
    found = statistic(values)
    assert found.values == tuple(values)
    assert math.isclose(found.mean, statistics.fmean(values), abs_tol=1e-12)
    assert math.isclose(found.std, statistics.stdev(values), abs_tol=1e-9)
    assert min(values) <= found.mean <= max(values)


def test_single_value_has_no_spread() -> None:
    assert statistic([0.3]).std == 0.0


@pytest.mark.parametrize("values", [[], [1.2], [-0.1], [float("nan")]])
def test_statistic_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError):
        statistic(values)


# ---- Merging


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_merged_statistics_are_those_of_all_seeds(scores: list[float]) -> None:
    merged = merge([one_seed(seed, score) for seed, score in enumerate(scores)])
    assert merged.results.federation["auroc"] == statistic(scores)
    assert merged.seeds == tuple(range(len(scores)))
    assert all(
        len(score.values) == len(scores)
        for _, found in contenders(merged.results)
        for score in found.values()
    )


def test_merging_in_steps_gives_the_same_results() -> None:
    runs = [one_seed(seed, 0.8 + seed / 50) for seed in range(4)]
    at_once, in_steps = merge(runs), merge([merge(runs[:2]), merge(runs[2:])])
    assert at_once.results == in_steps.results
    assert at_once.privacy == in_steps.privacy
    assert at_once.bytes_up_per_site_per_round == in_steps.bytes_up_per_site_per_round


def test_merge_of_one_changes_nothing() -> None:
    assert merge([one_seed(3)]) == one_seed(3)


def test_merge_puts_the_rest_together() -> None:
    merged = merge([one_seed(0, epsilon=0.9), one_seed(2, epsilon=0.95)])
    assert [line.epsilon for line in merged.privacy] == [0.95, 0.95]
    assert merged.bytes_up_per_site_per_round == Bytes(mean=261.0, max=272)
    assert merged.wire_bytes_up_per_site_per_round == Bytes(mean=700.0, max=710)
    assert (merged.seconds, merged.peak_memory_mib, merged.rounds) == (20.0, 602.0, 20)
    assert merged.declared_sizes == {"cleveland": 169, "st. gallen": 68}
    assert merged.public == PublicSizes(proxy=184, proxy_labelled=60, validation=0, test=231)
    assert merged.proxy_digests == (f"{0:064x}", f"{2:064x}")
    assert [row.seed for row in merged.history] == [0, 2]
    assert merged.run_config == {"scenario": "heart", "privacy.epsilon": 1.0}
    assert merged.run_id is None
    assert merged.finished == datetime(2025, 11, 24, 9, 2, tzinfo=UTC)
    assert Summary.model_validate_json(to_json(merged), strict=True) == merged


def test_one_stopped_run_makes_the_whole_incomplete() -> None:
    stopped = one_seed(1, rounds=7, status="incomplete", incomplete_because="too few sites")
    merged = merge([one_seed(0), stopped])
    assert (merged.status, merged.incomplete_because, merged.rounds) == ("incomplete", "too few sites", 7)


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (one_seed(0), "share a seed"),
        (one_seed(1, scenario="thyroid"), "scenario"),
        (one_seed(1, method="fedmd"), "method"),
        (one_seed(1, run_config={"scenario": "heart", "privacy.epsilon": 3.0}), "privacy.epsilon"),
        (one_seed(1, results=Results(federation=metrics(0.8))), "teacher_alone"),
        (
            one_seed(
                1,
                privacy=(
                    SitePrivacy(
                        site="cleveland",
                        epsilon=1,
                        delta=1e-5,
                        unit="patient",
                        adjacency="add-remove",
                        accountant="pld",
                    ),
                ),
            ),
            "cleveland",
        ),
    ],
)
def test_different_experiments_are_not_merged(other: Summary, named: str) -> None:
    with pytest.raises(UserError, match=named):
        merge([one_seed(0), other])


def test_nothing_is_not_merged() -> None:
    with pytest.raises(UserError, match="no summary"):
        merge([])


# ---- Files


def test_file_gives_back_the_summary(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write(one_seed(0), path)
    write(one_seed(1), path)
    assert read(path) == one_seed(1)
    assert os.listdir(tmp_path) == ["summary.json"]


def test_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "summary.json"
    write(one_seed(0), path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"summary\.json can't be written: No space left on device"):
        write(one_seed(1), path)
    assert read(path) == one_seed(0)
    assert os.listdir(tmp_path) == ["summary.json"]


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(one_seed(0), tmp_path / "summary.json")
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be written"):
        write(one_seed(0), tmp_path / "nowhere" / "summary.json")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (CONTRACT.replace('"schema": 1', '"schema": 2'), "has schema 2; this version reads schema 1"),
        (CONTRACT.replace('"rounds": 20', '"rounds": "20"'), "rounds: "),
        (CONTRACT[:200], "is not a summary"),
        ("[]", "is not a summary"),
        ("", "is not a summary"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=complaint):
        read(path)


def test_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="can't be read"):
        read(tmp_path / "summary.json")
