"""A scenario's sites as hospitals have them: a folder each with a table and its description.

So a deployment can be rehearsed, from the first command to the result, before any patient's record is near
it. The records are those that a simulation deals to its sites; a custodian that serves them is in nothing
else different.
"""

import csv
import json
from pathlib import Path

import numpy as np

from client.private_data import dealt_records
from common.config import RunConfig
from common.datasets import load_public, sites
from common.errors import UserError
from common.preprocessing import Preprocessing, plausible
from common.records import Records

TABLE, TARGET, PATIENT = "patients.csv", "diagnosis", "patient"


def write_sites(config: RunConfig, folder: Path) -> list[Path]:
    """Write every site's folder and return the paths of the descriptions.

    Raises:
        UserError: if the scenario's cases are no table, or a file can't be written.
    """
    preprocessing = load_public(config).proxy.preprocessing
    if any(feature.kind == "pixels" for feature in preprocessing.features):
        raise UserError(f"{config.scenario}: its cases are images; a rehearsal writes tables")
    written = []
    for site in sites(config):
        records = dealt_records(config, site.name)
        place = folder / site.name
        try:
            place.mkdir(parents=True)
            _write_table(place / TABLE, records, preprocessing)
            text = _description(preprocessing, records, site.name, site.declared_size)
            (place / "data.toml").write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{place} can't be written: {error.strerror}; choose another place") from None
        written.append(place / "data.toml")
    return written


def _write_table(path: Path, records: Records, preprocessing: Preprocessing) -> None:
    columns = {TARGET: records.target} | dict(records.columns)
    for feature in preprocessing.features:
        if feature.kind == "numeric":  # what can't be, such as a cholesterol of 0, counts as missing anyway
            columns[feature.name] = plausible(columns[feature.name], feature.low, feature.high)
    if records.patients is not None:
        columns[PATIENT] = records.patients
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        for row in range(len(records)):
            table.writerow(_spelt(values[row]) for values in columns.values())


def _spelt(value: object) -> str:
    """Write a value so that the very same comes back; a missing one is empty."""
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else repr(float(value))
    return str(value)


def _description(preprocessing: Preprocessing, records: Records, site: str, declared_size: int) -> str:
    features = (
        f"\n[[features]]\nname = {json.dumps(feature.name)}\nkind = {json.dumps(feature.kind)}\n"
        for feature in preprocessing.features
    )
    patient = "" if records.patients is None else f"patient = {json.dumps(PATIENT)}\n"
    return (
        f"target = {json.dumps(TARGET)}\nclasses = {json.dumps(list(preprocessing.classes))}\n{patient}"
        f"{''.join(features)}\n[sites.{json.dumps(site)}]\n"
        f"declared-size = {declared_size}\nfile = {json.dumps(TABLE)}\n"
    )
