"""Heart disease at four hospitals: who has a narrowed coronary artery?

UCI Heart Disease (Janosi, Steinbrunn, Pfisterer, Detrano 1989, doi:10.24432/C52P4X, CC BY 4.0): 920 patients
referred for coronary angiography at the Cleveland Clinic, the Hungarian Institute of Cardiology in Budapest,
the university hospitals of Zurich and Basel, and the V.A. Medical Center in Long Beach. The target is a
narrowing of more than half of a vessel's diameter (`narrowing` > 0). The README beside this file has the
changes that were made.

The hospitals differ, as in life: Switzerland has cholesterol for nobody (0 in the table), vessels and
thallium scan are all but Cleveland's own, and the share of diseased patients runs from 36 to 93 %.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from common.datasets import pooled
from common.datasets.scenario import Sizes
from common.datasets.table import read_table
from common.preprocessing import CategoricalSpec, FeatureSpec, NumericSpec
from common.records import Records, bands

CLASSES = ("absent", "present")

SIZES = Sizes(test=230, validation=30, proxy=184, proxy_labels=60)

DECLARED = {"cleveland": 160, "hungary": 150, "switzerland": 60, "long-beach": 100}
"""Round numbers near what is left to each hospital: declared, not counted."""

FEATURES: tuple[FeatureSpec, ...] = (
    NumericSpec(name="age"),
    CategoricalSpec(name="sex", categories=("female", "male")),
    CategoricalSpec(
        name="chest-pain", categories=("typical angina", "atypical angina", "non-anginal", "asymptomatic")
    ),
    NumericSpec(name="resting-blood-pressure", low=1.0),
    NumericSpec(name="cholesterol", low=1.0, missing_flag=True),
    CategoricalSpec(name="fasting-sugar-over-120", categories=("no", "yes")),
    CategoricalSpec(name="resting-ecg", categories=("normal", "ST-T abnormality", "LV hypertrophy")),
    NumericSpec(name="peak-heart-rate"),
    CategoricalSpec(name="exercise-angina", categories=("no", "yes")),
    NumericSpec(name="st-depression"),
    CategoricalSpec(name="st-slope", categories=("upsloping", "flat", "downsloping")),
    NumericSpec(name="coloured-vessels"),
    CategoricalSpec(name="thallium-scan", categories=("normal", "fixed defect", "reversible defect")),
)


@lru_cache(maxsize=1)
def _pool() -> pooled.Pool:
    columns = read_table(Path(__file__).with_name("heart.json"))
    site_names, narrowing = columns.pop("site"), columns.pop("narrowing")
    records = Records(
        columns=columns,
        target=np.where(narrowing > 0, "present", "absent"),
        patients=None,
        groups={"sex": columns["sex"], "age": bands(columns["age"], (45, 55, 65))},
    )
    return pooled.Pool(records, site_names, DECLARED, FEATURES, CLASSES, SIZES)


SCENARIO = pooled.scenario(_pool)
