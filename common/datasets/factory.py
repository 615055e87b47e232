"""A user's own data by code: `data.factory = "module:function"`.

The function takes nothing and returns a torch `Dataset` of (x, y), (x, y, patient) or (x, y, patient, site):
x a tensor or array (one number a feature, or an image of shape (C, H, W)), y a class number or -1 for
unlabelled, patient and site anything with a text form. A `classes` attribute, as torchvision's datasets have,
names the classes.

The dataset is one pool: public parts and, with `data.partition = iid` or `dirichlet`, sites are drawn from it
by the seed. This is for simulations: a run configuration can't make a served site import code.
"""

import importlib
from collections.abc import Sized
from functools import lru_cache
from typing import Any

import numpy as np

from common.datasets.pooled import Pool
from common.datasets.scenario import Sizes
from common.errors import ConfigError, UserError
from common.preprocessing import FeatureSpec, NumericSpec, PixelsSpec
from common.records import AnyArray, Records


@lru_cache(maxsize=1)
def pool_from(factory: str) -> Pool:
    """Call the factory and take all its items into one pool.

    Args:
        factory: `module:function`.

    Raises:
        UserError: if it can't be imported or returns something else.
    """
    dataset = _call(factory)
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        raise UserError(f"{factory} returned {type(dataset).__name__}, not a torch Dataset with items")
    items = [dataset[position] for position in range(len(dataset))]
    lengths = {len(item) if isinstance(item, tuple | list) else 0 for item in items}
    if len(lengths) > 1 or not lengths <= {2, 3, 4}:
        raise UserError(f"{factory}: items must all be (x, y), (x, y, patient) or (x, y, patient, site)")
    fields = [list(field) for field in zip(*items, strict=True)]
    cases = [np.asarray(case) for case in fields[0]]
    if len({case.shape for case in cases}) > 1:
        raise UserError(f"{factory}: the x of its items differ in shape")
    numbers = np.asarray([int(number) for number in fields[1]])
    classes = _classes(dataset, numbers, factory)
    labels = np.asarray([*classes, ""])[numbers]
    columns, features = _columns(np.stack(cases))
    patients, site_names = (_texts(fields[place]) if len(fields) > place else None for place in (2, 3))
    labelled = numbers >= 0
    records = Records(columns, target=labels, patients=patients, groups={}).take(labelled)
    count = len(records)
    return Pool(
        records=records,
        site_names=None if site_names is None else site_names[labelled],
        declared=_declared(site_names, count),
        features=features,
        classes=classes,
        sizes=Sizes(
            test=max(1, count // 5),
            validation=max(1, count // 20),
            proxy=max(1, count // 5),
            proxy_labels=max(1, count // 10),
        ),
    )


def _call(factory: str) -> object:
    module, _, function = factory.partition(":")
    expected = "module:function, importable from where the run starts"
    if not module or not function:
        raise ConfigError("run config", "data.factory", factory, expected)
    try:
        return getattr(importlib.import_module(module), function)()
    except Exception as error:  # the user's code may raise anything
        raise ConfigError("run config", "data.factory", factory, f"{expected} ({error})") from error


def _classes(dataset: object, numbers: AnyArray, factory: str) -> tuple[str, ...]:
    named = getattr(dataset, "classes", None)
    classes = tuple(map(str, named)) if named else tuple(map(str, range(max(2, int(numbers.max()) + 1))))
    if numbers.min() < -1 or numbers.max() >= len(classes):
        raise UserError(f"{factory}: y must be -1 or a class number below {len(classes)}")
    return classes


def _columns(cases: AnyArray) -> tuple[dict[str, AnyArray], tuple[FeatureSpec, ...]]:
    if cases.ndim > 2:
        return {"pixels": cases if cases.dtype == np.uint8 else cases.astype(np.float32)}, (PixelsSpec(),)
    table = cases.reshape(len(cases), -1).astype(np.float64)
    names = [f"x{place}" for place in range(table.shape[1])]
    return dict(zip(names, table.T, strict=True)), tuple(NumericSpec(name=name) for name in names)


def _texts(values: list[Any]) -> AnyArray:
    return np.asarray([str(value.item() if hasattr(value, "item") else value) for value in values])


def _declared(site_names: AnyArray | None, count: int) -> dict[str, int]:
    """Let every site of a simulation declare an even share: only a description can say more."""
    names = [] if site_names is None else sorted(set(site_names.tolist()))
    return {name: max(1, count // 2 // len(names)) for name in names}
