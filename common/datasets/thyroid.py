"""Thyroid disease by referral source: does this patient's blood show any condition of the thyroid?

UCI Thyroid Disease, the Garvan Institute's records in Sydney (Quinlan 1987, doi:10.24432/C5D010, CC BY 4.0):
9,172 patients with their history and up to five laboratory values. The target is any of the 31 recorded
diagnoses against none (26 % have one). The sites are the clinics that referred them, from 71 patients to more
than 5,000. The README beside this file has the changes that were made.

Which test was ordered is information, so each laboratory value has a missing flag; and since both too much
and too little of a hormone is an illness, each has flags for the proxy's outer quantiles (`tails`).
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from common.datasets import pooled
from common.datasets.scenario import Sizes
from common.datasets.table import read_table
from common.preprocessing import CategoricalSpec, FeatureSpec, NumericSpec
from common.records import Records, bands

CLASSES = ("none", "some")

SIZES = Sizes(test=2300, validation=200, proxy=1000, proxy_labels=200)

DECLARED = {"stmw": 160, "svhc": 600, "svhd": 50, "svi": 1500, "other": 3400}
"""Round numbers near what is left to each referral source: declared, not counted."""

OLDEST = 120.0
"""Four ages between 455 and 65526 are typing errors; they count as missing."""

_HISTORY = (
    "on-thyroxine",
    "query-on-thyroxine",
    "on-antithyroid-meds",
    "sick",
    "pregnant",
    "thyroid-surgery",
    "i131-treatment",
    "query-hypothyroid",
    "query-hyperthyroid",
    "lithium",
    "goitre",
    "tumor",
    "hypopituitary",
    "psych",
    "tbg-measured",
)
_LABORATORY = ("tsh", "t3", "tt4", "t4u", "fti")
_TAILS = (0.02, 0.05, 0.1, 0.2)

FEATURES: tuple[FeatureSpec, ...] = (
    NumericSpec(name="age", high=OLDEST),
    CategoricalSpec(name="sex", categories=("female", "male")),
    *(CategoricalSpec(name=name, categories=("no", "yes"), reference=True) for name in _HISTORY),
    *(NumericSpec(name=name, transform="log", missing_flag=True, tails=_TAILS) for name in _LABORATORY),
)


@lru_cache(maxsize=1)
def _pool() -> pooled.Pool:
    columns = read_table(Path(__file__).with_name("thyroid.json"))
    site_names, condition, age = columns.pop("site"), columns.pop("condition"), columns["age"]
    records = Records(
        columns=columns,
        target=condition,
        patients=None,
        groups={
            "sex": np.where(columns["sex"] == "", "unknown", columns["sex"]),
            "age": bands(np.where(age > OLDEST, np.nan, age), (40, 65)),
        },
    )
    # Three patients came from West: too few for a site of their own.
    site_names = np.where(site_names == "west", "other", site_names)
    return pooled.Pool(records, site_names, DECLARED, FEATURES, CLASSES, SIZES)


SCENARIO = pooled.scenario(_pool)
