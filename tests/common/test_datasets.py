"""The shipped scenarios: what is public, what is private, and that the two never meet."""

import gzip
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from common.config import RunConfig
from common.datasets import fashion, load_private, load_public, reviews, sites
from common.datasets.table import read_table
from common.errors import ConfigError, UserError
from common.records import Cases, Records

FOLDER = Path(__file__).parents[2] / "common" / "datasets"


def config(scenario: str, seed: int = 0, **data: object) -> RunConfig:
    return RunConfig.model_validate({"scenario": scenario, "seed": seed, "data": data})


def rows(cases: Cases | np.ndarray) -> list[bytes]:
    x = cases.x if isinstance(cases, Cases) else cases
    return [case.tobytes() for case in x]


# ---- heart and thyroid ---------------------------------------------------------------------------


def test_heart_has_uci_numbers_of_patients_and_diseases() -> None:
    table = read_table(FOLDER / "heart.json")
    counts = {name: int(np.sum(table["site"] == name)) for name in np.unique(table["site"])}
    assert counts == {"cleveland": 303, "hungary": 294, "long-beach": 200, "switzerland": 123}
    ill = {name: int(np.sum(table["narrowing"][table["site"] == name] > 0)) for name in counts}
    assert ill == {"cleveland": 139, "hungary": 106, "long-beach": 149, "switzerland": 115}


def test_thyroid_has_uci_numbers_of_patients_and_conditions() -> None:
    table = read_table(FOLDER / "thyroid.json")
    assert len(table["site"]) == 9172
    assert np.sum(table["condition"] == "some") == 2401
    assert np.sum(np.isnan(table["tsh"])) == 842


EXPECTED: Mapping[str, tuple[int, int, int, int]] = {
    "heart": (184, 60, 30, 230),
    "thyroid": (1000, 200, 200, 2300),
}


@pytest.mark.parametrize("scenario", EXPECTED)
def test_default_sizes(scenario: str) -> None:
    public = load_public(config(scenario))
    labelled = int(np.sum(public.proxy.y >= 0))
    assert (len(public.proxy), labelled, len(public.validation), len(public.test)) == EXPECTED[scenario]
    assert public.proxy_labels is not None and public.proxy_labels.min() == 0
    known = public.proxy.y >= 0
    np.testing.assert_array_equal(public.proxy.y[known], public.proxy_labels[known])
    assert set(public.test.groups) == {"sex", "age"}


@pytest.mark.parametrize("scenario", EXPECTED)
def test_every_patient_is_in_exactly_one_place(scenario: str) -> None:
    run = config(scenario)
    public, total = load_public(run), {"heart": 920, "thyroid": 9172}[scenario]
    private = [public.proxy.preprocessing.encode(load_private(run, info.name)) for info in sites(run)]
    parts = [public.proxy.x, public.validation.x, public.test.x, *(cases.x for cases in private)]
    assert sum(map(len, parts)) == total
    everyone = [row for part in parts for row in rows(part)]
    table = read_table(FOLDER / f"{scenario}.json")
    lost = {"site", "narrowing", "condition"}
    everyone_once = Records({k: v for k, v in table.items() if k not in lost}, np.full(total, ""), None, {})
    assert sorted(everyone) == sorted(rows(public.proxy.preprocessing.encode(everyone_once)))


@pytest.mark.parametrize("scenario", EXPECTED)
def test_the_seed_decides_and_nothing_else(scenario: str) -> None:
    first, again, other = (load_public(config(scenario, seed)) for seed in (0, 0, 1))
    assert first.proxy.digest == again.proxy.digest != other.proxy.digest
    assert rows(first.test) == rows(again.test) != rows(other.test)
    site = sites(config(scenario))[0].name
    some, same = load_private(config(scenario), site), load_private(config(scenario), site)
    np.testing.assert_array_equal(some.columns["age"], same.columns["age"])


def test_declared_sizes_are_round_numbers_that_scale_with_the_run() -> None:
    assert [info.declared_size for info in sites(config("heart"))] == [160, 150, 60, 100]
    assert [info.declared_size for info in sites(config("heart", private_size=238))] == [80, 75, 30, 50]
    assert (
        sum(
            len(load_private(config("heart", private_size=238), info.name)) for info in sites(config("heart"))
        )
        == 238
    )


def test_implausible_values_count_as_missing() -> None:
    run = config("heart")
    preprocessing = load_public(run).proxy.preprocessing
    cases = preprocessing.encode(load_private(run, "switzerland"))
    at = {name: place for place, name in enumerate(preprocessing.encoded_names)}
    np.testing.assert_array_equal(cases.x[:, at["cholesterol missing"]], 1)  # Switzerland measured none
    np.testing.assert_array_equal(cases.x[:, at["cholesterol"]], 0)


def test_patients_can_be_dealt_anew() -> None:
    for partition in ("iid", "dirichlet"):
        run = config("heart", partition=partition, num_sites=7)
        assert [info.name for info in sites(run)] == [f"site-{number}" for number in range(1, 8)]
        assert sum(len(load_private(run, info.name)) for info in sites(run)) == 476


REFUSED = {
    "data.proxy-size": {"proxy_size": 800},
    "data.test-size": {"test_size": 900},
    "data.validation-size": {"validation_size": 507},
    "data.private-size": {"private_size": 477},
    "data.proxy-labels": {"proxy_labels": 185},
    "data.num-sites": {"num_sites": 5},
}


@pytest.mark.parametrize("key", REFUSED)
def test_more_than_there_is_is_refused_by_key_and_value(key: str) -> None:
    for load in (load_public, sites) if key != "data.num-sites" else (sites,):
        with pytest.raises(ConfigError) as refusal:
            load(config("heart", **REFUSED[key]))
        assert (refusal.value.key, refusal.value.value) == (key, *REFUSED[key].values())


def test_the_number_that_is_named_would_be_right() -> None:
    with pytest.raises(ConfigError, match="at most 659"):
        load_public(config("heart", proxy_size=800))
    assert len(load_public(config("heart", proxy_size=659)).proxy) == 659
    with pytest.raises(ConfigError, match="at least 1"):
        sites(config("heart", partition="iid"))


def test_an_unknown_site_is_named() -> None:
    with pytest.raises(UserError, match="'boston'"):
        load_private(config("heart"), "boston")


# ---- reviews -------------------------------------------------------------------------------------


def test_reviews_are_those_that_readers_rated_above_or_below_zero() -> None:
    table = read_table(FOLDER / "reviews.json")
    assert len(table["text"]) == len(set(table["text"])) == 14_166
    counts = {
        (source, opinion): int(np.sum((table["source"] == source) & (table["opinion"] == opinion)))
        for source in ("films", "products")
        for opinion in reviews.CLASSES
    }
    assert counts == {
        ("films", "unfavourable"): 5325,
        ("films", "favourable"): 5241,
        ("products", "unfavourable"): 1480,
        ("products", "favourable"): 2120,
    }


def test_no_sentence_of_the_test_is_ever_anything_else() -> None:
    run = config("reviews", partition="dirichlet", num_sites=5)
    public, other = load_public(run), load_public(run.model_copy(update={"seed": 1}))
    assert rows(public.test) == rows(other.test) and public.proxy.digest != other.proxy.digest
    assert (len(public.proxy), int(np.sum(public.proxy.y >= 0)), len(public.validation)) == (3000, 300, 300)
    private = [load_private(run, info.name) for info in sites(run)]
    assert sum(map(len, private)) + 3000 + 300 + reviews.NUM_TEST == 14_166
    texts = [text for part in private for text in part.columns["text"]]
    tested = set(reviews._read()[1].columns["text"])
    assert len(tested) == reviews.NUM_TEST and not tested & set(texts)
    shares = [float(np.mean(part.target == "favourable")) for part in private]
    assert max(shares) - min(shares) > 0.3
    assert set(public.test.groups) == {"source"}


def test_the_test_of_reviews_can_be_smaller_but_not_larger() -> None:
    run = config("reviews", partition="iid", num_sites=2, test_size=40)
    assert len(load_public(run).test) == 40
    with pytest.raises(ConfigError, match=r"data.test-size = 2501 is refused: expected at most 2500"):
        load_public(config("reviews", partition="iid", num_sites=2, test_size=2501))
    with pytest.raises(
        ConfigError, match=r"data.partition = 'natural' is refused: expected iid or dirichlet"
    ):
        sites(config("reviews"))


# ---- fashion -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idx_files(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Files of Fashion-MNIST's form, in which the first four pixels of an image say which one it is."""
    folder = tmp_path_factory.mktemp("fashion")
    generator = np.random.default_rng(0)
    for part, count in (("train", fashion.NUM_TRAIN), ("t10k", fashion.NUM_TEST)):
        pixels = np.zeros((count, 28, 28), dtype=np.uint8)
        pixels[:, 0, :4] = np.arange(count, dtype=">u4").view(np.uint8).reshape(count, 4)
        labels = generator.integers(0, 10, count).astype(np.uint8)
        for name, values in (
            (f"{part}-images-idx3-ubyte.gz", pixels),
            (f"{part}-labels-idx1-ubyte.gz", labels),
        ):
            header = bytes([0, 0, 8, values.ndim]) + np.asarray(values.shape, ">u4").tobytes()
            (folder / name).write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))
    return str(folder)


def numbers(pixels_NCHW: np.ndarray) -> list[int]:
    return np.ascontiguousarray(pixels_NCHW[:, 0, 0, :4]).view(">u4").ravel().tolist()


def test_fashion_deals_disjoint_images(idx_files: str) -> None:
    run = config("fashion", folder=idx_files)
    public = load_public(run)
    assert (len(public.proxy), int(np.sum(public.proxy.y >= 0))) == (3000, 300)
    assert len(public.test) == 10_000 and public.proxy.x.shape[1:] == (1, 28, 28)
    private = [numbers(load_private(run, info.name).columns["pixels"]) for info in sites(run)]
    assert min(map(len, private)) >= 800
    assert [info.declared_size for info in sites(run)] == [2400] * 5
    seen = [numbers(np.round(part * 255).astype(np.uint8)) for part in (public.proxy.x, public.validation.x)]
    everyone = [number for part in (*seen, *private) for number in part]
    assert len(everyone) == len(set(everyone)) == 15_500


def test_fashion_scales_to_two_hundred_sites(idx_files: str) -> None:
    run = config("fashion", folder=idx_files, num_sites=200, test_size=100)
    counts = [len(load_private(run, info.name)) for info in sites(run)]
    assert sum(counts) == 12_000 and min(counts) >= 20
    assert len(load_public(run).test) == 100


def test_fashion_is_refused_by_key(idx_files: str) -> None:
    for key, value in (("test_size", 10_001), ("private_size", 56_501), ("num_sites", 12_001)):
        with pytest.raises(ConfigError, match=key.replace("_", "-")):
            sites(config("fashion", folder=idx_files, **{key: value}))
    sites(config("fashion", folder=idx_files, private_size=56_500))


def test_missing_and_damaged_files_say_what_to_do(tmp_path: Path) -> None:
    run = config("fashion", folder=str(tmp_path))
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load_public(run)
    for damaged in (b"no gzip", gzip.compress(b"\0\0\x08\x03"), gzip.compress(b"x" * 100)[:-20]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(UserError, match="train-images"):
            load_public(run)
