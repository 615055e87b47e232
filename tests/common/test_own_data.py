"""A user's own data: round trips through the three formats, and errors that name file, key or column."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.config import RunConfig
from common.datasets import load_private, load_public, sites
from common.datasets.own import check_schema, read_site_records
from common.errors import ConfigError, UserError

FEATURES = """
target = "died"
classes = ["no", "yes"]
patient = "patient"

[[features]]
name = "age"
kind = "numeric"
high = 120.0

[[features]]
name = "stays"
kind = "numeric"
missing-flag = true

[[features]]
name = "ward"
kind = "categorical"

[groups.sex]
[groups.age]
edges = [50]
"""

FILES = """
[sites.north]
declared-size = 30
file = "north{suffix}"

[sites.south]
declared-size = 40
file = "south{suffix}"

[public-files]
proxy = "proxy{suffix}"
test = "test{suffix}"
"""

POOLED = """
[pooled]
file = "all.csv"
site-column = "hospital"

[sites.north]
declared-size = 30

[sites.south]
declared-size = 40
label = "South & Co"

[public-sample]
proxy-size = 20
proxy-labels = 8
validation-size = 5
test-size = 15
"""


def frame(count: int, seed: int) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            "unused": np.arange(count),
            "age": generator.integers(20, 90, count),
            "stays": np.where(generator.random(count) < 0.2, np.nan, generator.integers(0, 5, count)),
            "ward": generator.choice(["medical", "surgical"], count),
            "sex": generator.choice(["f", "m"], count),
            "patient": [f"{seed}-{number // 2}" for number in range(count)],
            "died": generator.choice(["no", "yes"], count),
        }
    )


WRITERS: Mapping[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".parquet": lambda table, path: table.to_parquet(path),
    ".npz": lambda table, path: np.savez(
        path,
        **{
            name: values.to_numpy(dtype=None if values.dtype.kind in "if" else "U")
            for name, values in table.items()
        },
    ),
}


def write(folder: Path, suffix: str = ".csv", text: str = FEATURES + FILES) -> RunConfig:
    for seed, (name, count) in enumerate({"north": 31, "south": 44, "proxy": 20, "test": 25}.items()):
        WRITERS[suffix](frame(count, seed), folder / f"{name}{suffix}")
    return described(folder, text.replace("{suffix}", suffix))


def described(folder: Path, text: str, **data: object) -> RunConfig:
    (folder / "data.toml").write_text(text)
    return RunConfig.model_validate(
        {"scenario": "own", "data": {"description": str(folder / "data.toml"), **data}}
    )


def with_data(run: RunConfig, **data: object) -> RunConfig:
    return run.model_copy(update={"data": run.data.model_copy(update=data)})


def test_a_line_is_counted_as_editors_count_it(tmp_path):
    config = write(tmp_path)
    lines = (tmp_path / "north.csv").read_text().splitlines()
    lines[4] += "\r,9"  # what `sed 5s/$/,9/` makes of a line that Windows has ended
    (tmp_path / "north.csv").write_bytes("\r\n".join(lines).encode())
    with pytest.raises(UserError, match="line 5"):
        load_private(config, "north")


@pytest.mark.parametrize("file", ["north", "test"])
def test_a_file_without_a_labelled_record_is_named(tmp_path, file):
    config = write(tmp_path)
    WRITERS[".csv"](frame(8, 1).assign(died=""), tmp_path / f"{file}.csv")
    with pytest.raises(UserError, match=rf"{file}\.csv.*(no labelled records|no record has a label)"):
        load_private(config, "north")
        load_public(config)


@pytest.mark.parametrize("suffix", WRITERS)
def test_the_three_formats_say_the_same(tmp_path: Path, suffix: str) -> None:
    run = write(tmp_path, suffix)
    assert [(info.name, info.declared_size) for info in sites(run)] == [("north", 30), ("south", 40)]
    public = load_public(run)
    assert (len(public.proxy), len(public.validation), len(public.test)) == (20, 5, 20)
    assert np.all(public.proxy.y >= 0) and public.proxy_labels is not None
    north = load_private(run, "north")
    original = frame(31, 0)
    np.testing.assert_array_equal(north.columns["age"], original["age"])
    np.testing.assert_array_equal(north.columns["stays"], original["stays"])
    assert north.target.tolist() == original["died"].tolist()
    assert north.patients is not None and north.patients.tolist() == original["patient"].tolist()
    assert set(north.groups["age"]) == {"under 50", "50 and over"}
    assert set(north.groups["sex"]) == {"f", "m"}
    assert check_schema(read_site_records(run.data.description, "north"), public.proxy.preprocessing) == []


def test_digests_agree_across_formats(tmp_path: Path) -> None:
    assert len({load_public(write(tmp_path, suffix)).proxy.digest for suffix in WRITERS}) == 1


def test_changing_private_records_changes_nothing_public(tmp_path: Path) -> None:
    run = write(tmp_path)
    before = load_public(run)
    frame(500, 9).assign(age=1, ward="surgical").to_csv(tmp_path / "north.csv", index=False)
    assert load_public(run).proxy.digest == before.proxy.digest
    assert sites(run)[0].declared_size == 30


def test_an_unlabelled_proxy_is_welcome(tmp_path: Path) -> None:
    run = write(tmp_path)
    frame(20, 2).drop(columns="died").to_csv(tmp_path / "proxy.csv", index=False)
    public = load_public(run)
    assert np.all(public.proxy.y == -1) and public.proxy_labels is None
    with pytest.raises(ConfigError, match=r"data.proxy-labels = 5 is refused: expected at most 0"):
        load_public(with_data(run, proxy_labels=5))


def test_fewer_public_cases_can_be_asked_for(tmp_path: Path) -> None:
    run = with_data(write(tmp_path), proxy_size=10, proxy_labels=4, test_size=7)
    public = load_public(run)
    assert (len(public.proxy), int(np.sum(public.proxy.y >= 0)), len(public.test)) == (10, 4, 7)
    with pytest.raises(ConfigError, match=r"data.proxy-size = 21 is refused: expected at most 20"):
        load_public(with_data(run, proxy_size=21))
    with pytest.raises(ConfigError, match=r"data.private-size"):
        load_public(with_data(run, private_size=5))


# ---- pooled files --------------------------------------------------------------------------------


def write_pooled(folder: Path, text: str = POOLED) -> RunConfig:
    north, south = frame(60, 0).assign(hospital="north"), frame(60, 1).assign(hospital="South & Co")
    pd.concat([north, south, frame(6, 2).assign(hospital="elsewhere")]).to_csv(
        folder / "all.csv", index=False
    )
    return described(folder, FEATURES + text)


def test_a_pooled_file_with_a_site_column(tmp_path: Path) -> None:
    run = write_pooled(tmp_path)
    public = load_public(run)
    patients = {info.name: load_private(run, info.name).patients for info in sites(run)}
    assert list(patients) == ["north", "south"]
    for some, prefix in zip(patients.values(), ("0-", "1-"), strict=True):
        assert some is not None and all(patient.startswith(prefix) for patient in some)
    # Sizes count patients, each of whom has two records here.
    assert (len(public.proxy), len(public.validation), len(public.test)) == (40, 10, 30)
    assert int(np.sum(public.proxy.y >= 0)) == 8


def test_a_pooled_file_is_dealt_by_patients(tmp_path: Path) -> None:
    text = POOLED[: POOLED.index("[sites.north]")].replace('site-column = "hospital"', "")
    run = write_pooled(tmp_path, text + POOLED[POOLED.index("[public-sample]") :])
    with pytest.raises(ConfigError, match=r"data.partition"):
        sites(run)
    for partition in ("iid", "dirichlet"):
        dealt = with_data(run, partition=partition, num_sites=3)
        patients = [load_private(dealt, info.name).patients for info in sites(dealt)]
        together = [patient for some in patients if some is not None for patient in set(some.tolist())]
        assert len(together) == len(set(together)) == 63 - 40


def test_a_sample_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.proxy-size = 43 is refused: expected at most 42"):
        load_public(with_data(write_pooled(tmp_path), proxy_size=43))


def test_a_custodian_reads_its_part_of_a_pooled_file_but_not_a_sample(tmp_path: Path) -> None:
    run = write_pooled(tmp_path, POOLED[: POOLED.index("[public-sample]")])
    assert len(read_site_records(run.data.description, "south")) == 60
    with pytest.raises(UserError, match=r"\[public-sample\]"):
        read_site_records(write_pooled(tmp_path).data.description, "south")


# ---- images --------------------------------------------------------------------------------------


def test_images_come_as_npz(tmp_path: Path) -> None:
    text = FILES.replace("{suffix}", ".npz")
    for name in ("north", "south", "proxy", "test"):
        pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8)).astype(np.uint8)
        np.savez(tmp_path / f"{name}.npz", scan=pixels, died=np.arange(12) % 2)
    head = 'target = "died"\nclasses = ["0", "1"]\n[[features]]\nname = "scan"\nkind = "pixels"\n'
    run = described(tmp_path, head + text)
    assert load_public(run).proxy.x.shape == (12, 1, 8, 8)
    assert load_private(run, "north").columns["scan"].shape == (12, 1, 8, 8)


# ---- errors --------------------------------------------------------------------------------------

BAD_DESCRIPTIONS = {
    'declared-size = "30"': r"data.toml: sites.north.declared-size = '30' is refused",
    "declared-size = 30\nname = 1": r"data.toml: sites.north.name = 1 is refused",
    "declared-size = 0": r"data.toml: sites.north.declared-size = 0 is refused",
}


@pytest.mark.parametrize("bad", BAD_DESCRIPTIONS)
def test_a_bad_description_is_refused_by_key(tmp_path: Path, bad: str) -> None:
    run = write(tmp_path, text=(FEATURES + FILES).replace("declared-size = 30", bad))
    with pytest.raises(ConfigError, match=BAD_DESCRIPTIONS[bad]):
        sites(run)


@pytest.mark.parametrize(
    ("find", "put", "expected"),
    [
        (
            'kind = "categorical"',
            'kind = "words"',
            r"features.2.kind = 'words' is refused: .* one of 'numeric', ",
        ),
        ('["no", "yes"]', '["no"]', r"classes = \['no'\] is refused: expected at least 2"),
        ("high = 120.0", "high = 5.0\nlow = 7.0", r"low and high of age = .* expected low below high"),
        ("edges = [50]", "edges = [50, 40]", r"groups.age.edges = .* expected numbers that rise"),
        ("missing-flag = true", "missing_flag = true", r"missing_flag"),
        ('target = "died"', 'target = "age"', r"data.toml: target = 'age' is refused"),
        (
            "[groups.sex]",
            POOLED[POOLED.index("[public-sample]") :] + "[groups.sex]",
            r"sections = .* expected one of them",
        ),
        ("[groups.sex]", '[pooled]\nfile = "all.csv"\n[groups.sex]', r"none beside \[pooled\]"),
        ("[groups.sex]", "[groups.sex", r"isn't TOML"),
        ('target = "died"', "", r"data.toml: target is missing"),
        ("[groups.sex]", "[grouped.sex]", r"grouped = .* expected no such key"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, find: str, put: str, expected: str) -> None:
    run = write(tmp_path, text=(FEATURES + FILES).replace(find, put))
    with pytest.raises(UserError, match=expected):
        sites(run)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda table: table.drop(columns="ward"), r"proxy.csv: there is no column 'ward'"),
        (lambda table: table.drop(columns="patient"), r"proxy.csv: there is no column 'patient'"),
        (
            lambda table: table.astype({"age": str}).replace(
                {"age": {table["age"].astype(str)[3]: "SECRET"}}
            ),
            r"proxy.csv: column 'age', line 5: not a number",
        ),
        (
            lambda table: table.assign(died="SECRET"),
            r"proxy.csv: column 'died', line 2 and 19 more: none of the classes no, yes",
        ),
        (lambda table: table.head(0), r"proxy.csv has no records"),
        (
            lambda table: pd.concat([table, table["age"]], axis=1),
            r"proxy.csv: there are 2 columns 'age': one is right",
        ),
    ],
)
def test_a_bad_file_is_refused_by_column_and_no_value_is_quoted(
    tmp_path: Path, change: Callable[[pd.DataFrame], pd.DataFrame], expected: str
) -> None:
    run = write(tmp_path)
    change(frame(20, 2)).to_csv(tmp_path / "proxy.csv", index=False)
    with pytest.raises(UserError, match=expected) as refusal:
        load_public(run)
    assert "SECRET" not in str(refusal.value)


def test_files_as_windows_writes_them_say_the_same(tmp_path: Path) -> None:
    run = write(tmp_path)
    before = load_public(run).proxy.digest
    for name in ("data.toml", "proxy.csv", "test.csv"):
        body = (tmp_path / name).read_bytes().replace(b"\n", b"\r\n")
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + body)
    assert load_public(run).proxy.digest == before


@pytest.mark.parametrize("separator", [";", "\t"])
def test_fields_are_parted_by_commas(tmp_path: Path, separator: str) -> None:
    run = write(tmp_path)
    frame(20, 2).to_csv(tmp_path / "proxy.csv", index=False, sep=separator)
    with pytest.raises(UserError, match=r"proxy.csv: its first line is a single field: commas part fields"):
        load_public(run)


@pytest.mark.parametrize("public", [True, False])
def test_in_a_simulation_a_site_that_the_pooled_file_never_names_is_a_mistake(
    tmp_path: Path, public: bool
) -> None:
    text = POOLED.replace("[sites.north]", "[sites.nroth]")
    run = write_pooled(tmp_path, text if public else text[: text.index("[public-sample]")])
    with pytest.raises(UserError, match=r"data.toml: \[sites.nroth\] has no record: column 'hospital'"):
        load_private(run, "south")


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_that_are_not_what_they_seem(tmp_path: Path, suffix: str) -> None:
    run = write(tmp_path, suffix)
    path = tmp_path / f"proxy{suffix}"
    path.unlink()
    with pytest.raises(UserError, match=r"proxy.*can't be read"):
        load_public(run)
    for content in (b"", b"\xff\xfe\x00\x01" * 50, b"PK\x03\x04" + bytes(60)):
        path.write_bytes(content)
        with pytest.raises(UserError, match="proxy"):
            load_public(run)


def test_pickles_are_refused(tmp_path: Path) -> None:
    run = write(tmp_path, ".npz")
    np.savez(tmp_path / "proxy.npz", age=np.asarray([{}], dtype=object))
    with pytest.raises(UserError, match=r"proxy.npz isn't a readable .npz file"):
        load_public(run)


def test_what_the_run_config_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.description"):
        sites(RunConfig(scenario="own"))
    with pytest.raises(UserError, match=r"nowhere.toml can't be read"):
        sites(RunConfig.model_validate({"scenario": "own", "data": {"description": "nowhere.toml"}}))
    with pytest.raises(UserError, match=r"no \[sites.west\]"):
        load_private(write(tmp_path), "west")


# ---- a factory -----------------------------------------------------------------------------------

FACTORY = """
import torch
from torch.utils.data import TensorDataset

def table():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(100, 4), torch.arange(100) % 3)

class Images:
    classes = ["cat", "dog"]
    def __len__(self):
        return 40
    def __getitem__(self, i):
        return torch.full((1, 6, 6), float(i)), i % 2, f"patient {i // 2}", f"site {i % 3}"

def nothing():
    return 7
"""


@pytest.fixture
def factory_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_own_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_factory", raising=False)
    return "my_own_factory"


def made(factory: str, **data: object) -> RunConfig:
    return RunConfig.model_validate({"scenario": "own", "data": {"factory": factory, **data}})


def test_a_factorys_table_is_dealt(factory_module: str) -> None:
    run = made(f"{factory_module}:table", partition="iid", num_sites=3)
    public = load_public(run)
    assert public.proxy.x.shape == (20, 4) and public.proxy.preprocessing.classes == ("0", "1", "2")
    assert [len(load_private(run, info.name)) for info in sites(run)] == [19, 18, 18]


def test_a_factorys_images_name_patients_and_sites(factory_module: str) -> None:
    run = made(f"{factory_module}:Images")
    assert [info.name for info in sites(run)] == ["site 0", "site 1", "site 2"]
    public = load_public(run)
    assert public.proxy.x.shape[1:] == (1, 6, 6) and public.proxy.preprocessing.classes == ("cat", "dog")


@pytest.mark.parametrize("factory", ["nowhere:table", "my_own_factory", "my_own_factory:absent"])
def test_a_factory_that_is_not_there_is_refused_by_key(factory_module: str, factory: str) -> None:
    with pytest.raises(ConfigError, match=r"data.factory"):
        sites(made(factory))


def test_a_factory_that_returns_something_else_is_named(factory_module: str) -> None:
    with pytest.raises(UserError, match=r"my_own_factory:nothing returned int"):
        sites(made(f"{factory_module}:nothing"))
