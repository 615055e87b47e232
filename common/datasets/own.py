"""A user's own data: by a description file and no code, or by a factory.

`data.description` names a `data.toml`; paths in it are relative to its folder. With one file for each site:

    target = "died"
    classes = ["no", "yes"]               # as they stand in the files, in the order of the logits
    patient = "patient_id"                # optional: records of one patient share one unit of privacy
    missing = ["", "NA"]                  # how a missing value is written

    [[features]]
    name = "age"
    kind = "numeric"                      # scaled by the proxy's mean and deviation
    low = 0.0                             # what lies outside low and high counts as missing
    high = 120.0

    [[features]]
    name = "troponin"
    kind = "numeric"
    transform = "log"
    missing-flag = true                   # add a column that says where it is missing
    tails = [0.05, 0.2]                   # add columns that say where it is low or high

    [[features]]
    name = "ward"
    kind = "categorical"                  # one-hot; without `categories`, those of the proxy
    categories = ["medical", "surgical"]

    [groups.sex]                          # broken down in the report; needn't be a feature
    [groups.age]
    edges = [45, 65]

    [sites.north]
    declared-size = 400                   # denominator and weight: public, round, not its count
    file = "north.csv"                    # .csv, .parquet or .npz; left out where it isn't ours to open

    [sites.south]
    declared-size = 900
    file = "south.parquet"

    [public-files]                        # in simulations also [public-sample], see below
    proxy = "proxy.csv"                   # its target may be missing, wholly or in part
    validation = "validation.csv"
    test = "test.csv"

A simulation may draw its public part from the sites' files instead, and may name one file for all sites. That
has either a site column (then `[sites.NAME]` gives `declared-size`, and `label` where the column says another
thing than NAME), or none, and is dealt by `data.partition`:

    [pooled]
    file = "all.csv"
    site-column = "hospital"

    [public-sample]
    proxy-size = 200
    proxy-labels = 60
    validation-size = 40
    test-size = 200

Images come as an array (N, C, H, W) or (N, H, W) in an .npz file, with the other columns beside it and one
feature of `kind = "pixels"` that names it; free text is a column of a CSV or Parquet file and one feature of
`kind = "text"`. All constants (means, deviations, tails, categories) are fitted on
the proxy.

`data.factory` is for those who prefer code: see `common.datasets.factory`.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.config import RunConfig
from common.datasets import pooled
from common.datasets.description import (
    Description,
    PooledFile,
    PublicFiles,
    read_description,
    require_site,
)
from common.datasets.factory import pool_from
from common.datasets.files import Complain, Table, read_table, refuse
from common.datasets.scenario import PublicData, Scenario, SiteInfo, Sizes, public_data
from common.errors import ConfigError, UserError
from common.preprocessing import check_schema
from common.records import AnyArray, Records, concatenate
from common.seeds import generator

__all__ = ["SCENARIO", "check_schema", "load_private", "load_public", "read_site_records", "sites"]


def sites(config: RunConfig) -> tuple[SiteInfo, ...]:
    """Return the sites that the description declares, or those that pooled rows are dealt to."""
    if (pool := _pool(config)) is not None:
        return pooled.sites(pool, config)
    path, description = _described(config)
    _refuse_sizes(config)
    if config.data.partition != "natural":
        if description.pooled is None:
            raise ConfigError(
                "run config", "data.partition", config.data.partition, "natural: each has its own file"
            )
        size = description.pooled.declared_size
        return tuple(SiteInfo(name, size) for name in pooled.dealt_names(config))
    if not description.sites:
        raise ConfigError(
            "run config", "data.partition", "natural", f"iid or dirichlet: {path} names no sites"
        )
    return tuple(SiteInfo(name, site.declared_size) for name, site in description.sites.items())


def load_public(config: RunConfig) -> PublicData:
    """Return proxy, validation and test, from files of their own or drawn from the sites' files."""
    if (pool := _pool(config)) is not None:
        return pooled.load_public(pool, config)
    path, description = _described(config)
    _refuse_sizes(config)
    files = description.public_files
    if files is None:
        raise UserError(
            f"{path} has neither [public-files] nor [public-sample]: there is nothing to teach on"
        )
    proxy = _public_table(path, description, files.proxy, optional_target=True)
    proxy = _part(proxy, config, "proxy-size", config.data.proxy_size)
    validation, test = _validation_and_test(config, path, description, files)
    labels, known = config.data.proxy_labels, int(np.sum(proxy.target != ""))
    if labels > known:
        expected = f"at most {known}, the labelled cases of {files.proxy}"
        raise ConfigError("run config", "data.proxy-labels", labels, expected)
    public = public_data(
        proxy=proxy,
        validation=_part(validation, config, "validation-size", config.data.validation_size),
        test=_part(test, config, "test-size", config.data.test_size),
        specs=description.features,
        classes=description.classes,
        num_labels=None if labels < 0 else labels,
        seed=config.seed,
    )
    return replace(public, by_assumption=False)


def load_private(config: RunConfig, site: str) -> Records:
    """Return one site's labelled records, in a simulation."""
    if (pool := _pool(config)) is not None:
        return pooled.load_private(pool, config, site)
    path, description = _described(config)
    names = [info.name for info in sites(config)]
    if description.pooled is None:
        records = _labelled(_site_records(path, description, site))
        if len(records) == 0:
            raise UserError(f"{_file(path, description.sites[site].file)} has no labelled records")
        return records
    table = _read_all(path, description, description.pooled)
    labelled = table.records.target != ""
    site_names = None if table.site_labels is None else _names_of(description, table.site_labels)[labelled]
    return pooled.site_records(table.records.take(labelled), site_names, names, config, site)


SCENARIO = Scenario(sites, load_public, load_private)


def read_site_records(description: str | Path, site: str, complain: Complain = refuse) -> Records:
    """Return a site's records as its own description has them: what a custodian serves.

    Nothing is drawn and nothing dealt, so a description with a [public-sample] is refused: its proxy would be
    made of the records that are to be protected.

    Args:
        description: Path of the site's `data.toml`; `file` under its [sites.NAME] is what is read.
        site: Its name there.
        complain: Is told what single records get wrong (`common.datasets.files.read_table`).

    Raises:
        UserError: naming file, key, column or line; it quotes no value of any record.
    """
    path = Path(description)
    described = read_description(path)
    if described.public_sample is not None:
        raise UserError(
            f"{path}: [public-sample] is for simulations: it would publish records that are private"
        )
    return _site_records(path, described, site, complain)


def _described(config: RunConfig) -> tuple[Path, Description]:
    if not config.data.description:
        raise ConfigError(
            "run config", "data.description", "", "the path of a data.toml (or set data.factory)"
        )
    path = Path(config.data.description)
    return path, read_description(path)


def _pool(config: RunConfig) -> pooled.Pool | None:
    """Return the pool where the public part is drawn from it, None where that comes in files of its own."""
    if config.data.factory:
        if config.data.description:
            raise ConfigError(
                "run config", "data.factory", config.data.factory, "either it or data.description"
            )
        return pool_from(config.data.factory)
    path, description = _described(config)
    if description.public_sample is None:
        return None
    names = [site.file for site in description.sites.values()]
    files = [
        path,
        *(_file(path, name) for name in ([description.pooled.file] if description.pooled else names)),
    ]
    return _sampled(path, tuple(file.stat().st_mtime_ns for file in files if file.exists()))


@lru_cache(maxsize=1)
def _sampled(path: Path, stamps: tuple[int, ...]) -> pooled.Pool:
    """Read all sites' files once in a process; the stamps tell a changed file from a known one."""
    description = read_description(path)
    if description.public_sample is None:
        raise UserError(f"{path}: [public-sample] is missing")
    if description.pooled:
        table = _read_all(path, description, description.pooled)
        records = table.records
        site_names = None if table.site_labels is None else _names_of(description, table.site_labels)
    else:
        parts = [_site_records(path, description, name) for name in description.sites]
        records = concatenate(parts)
        site_names = np.repeat(list(description.sites), [len(part) for part in parts])
    labelled = records.target != ""
    return pooled.Pool(
        records=records.take(labelled),
        site_names=None if site_names is None else site_names[labelled],
        declared={name: site.declared_size for name, site in description.sites.items()},
        features=description.features,
        classes=description.classes,
        sizes=Sizes(
            test=description.public_sample.test_size,
            validation=description.public_sample.validation_size,
            proxy=description.public_sample.proxy_size,
            proxy_labels=description.public_sample.proxy_labels,
        ),
    )


def _site_records(path: Path, description: Description, site: str, complain: Complain = refuse) -> Records:
    require_site(path, description, site)
    if description.pooled:
        table = _read_pooled(path, description, description.pooled, complain)
        if table.site_labels is None:
            raise UserError(f"{path}: [pooled] names no site-column, so no record is known to be {site}'s")
        return table.records.take(_names_of(description, table.site_labels) == site)
    if not description.sites[site].file:
        raise UserError(f"{path}: [sites.{site}] names no file")
    return read_table(_file(path, description.sites[site].file), description, complain=complain).records


def _read_all(path: Path, description: Description, pooled_file: PooledFile) -> Table:
    """Read a pooled file for a simulation, in which a site without a record is a name mistyped."""
    table = _read_pooled(path, description, pooled_file)
    if table.site_labels is not None:
        named = set(_names_of(description, table.site_labels))
        if absent := [name for name in description.sites if name not in named]:
            column = f"column {pooled_file.site_column!r} of {_file(path, pooled_file.file)}"
            raise UserError(f"{path}: [sites.{absent[0]}] has no record: {column} never says so")
    return table


def _read_pooled(
    path: Path, description: Description, pooled_file: PooledFile, complain: Complain = refuse
) -> Table:
    file, site_column = _file(path, pooled_file.file), pooled_file.site_column
    return read_table(file, description, site_column=site_column, complain=complain)


def _names_of(description: Description, labels: AnyArray) -> AnyArray:
    """Turn what a site column says into the sites' names; "" for sites that aren't described."""
    names = np.full(len(labels), "", dtype=object)
    for name, site in description.sites.items():
        names[labels == (site.label or name)] = name
    return names.astype(str)


def _public_table(
    path: Path, description: Description, file: str, *, optional_target: bool = False
) -> Records:
    records = read_table(_file(path, file), description, optional_target=optional_target).records
    if len(records) == 0:
        raise UserError(f"{_file(path, file)} has no records")
    return records


def _validation_and_test(
    config: RunConfig, path: Path, description: Description, files: PublicFiles
) -> tuple[Records, Records]:
    test = _labelled_table(path, description, files.test)
    if files.validation:
        return _labelled_table(path, description, files.validation), test
    order = generator(config.seed, "split").permutation(len(test))
    fifth = max(1, len(test) // 5)
    return test.take(np.sort(order[:fifth])), test.take(np.sort(order[fifth:]))


def _labelled_table(path: Path, description: Description, file: str) -> Records:
    records = _labelled(_public_table(path, description, file))
    if len(records) == 0:
        raise UserError(f"{_file(path, file)}: no record has a label in {description.target!r}")
    return records


def _part(records: Records, config: RunConfig, key: str, size: int) -> Records:
    """Return as many of a public file's records as the run config asks for; 0 asks for all."""
    if size == 0:
        return records
    if size > len(records):
        raise ConfigError(
            "run config", f"data.{key}", size, f"at most {len(records)}, as many as the file has"
        )
    return records.take(np.sort(generator(config.seed, "split", key).permutation(len(records))[:size]))


def _labelled(records: Records) -> Records:
    return records.take(records.target != "")


def _refuse_sizes(config: RunConfig) -> None:
    if config.data.private_size:
        expected = "0: sites bring files of their own"
        raise ConfigError("run config", "data.private-size", config.data.private_size, expected)


def _file(path: Path, file: str) -> Path:
    return path.parent / file
