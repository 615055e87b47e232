"""A public trunk follows from the proxy alone, sees what it was taught to see, and costs a bounded time."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

import common.trunks
from common.features import fit_features
from common.models import build, trunk_of
from common.preprocessing import NumericSpec, PixelsSpec, Preprocessing, Text
from common.proxy import Proxy
from common.records import Records
from common.trunks import public_trunk

CLASSES = ("no", "yes")


def pictures(count: int, seed: int, labelled: bool = True) -> Proxy:
    """Bars that lie or stand, at any place."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=count)
    pixels = rng.normal(scale=0.3, size=(count, 1, 12, 12))
    for picture, standing, place in zip(pixels[:, 0], y, rng.integers(2, 9, size=count), strict=True):
        (picture.T if standing else picture)[place : place + 2] += 2.0
    records = Records({"pixels": pixels.astype(np.float32)}, np.asarray(CLASSES)[y], None, {})
    return public(records, [PixelsSpec()], labelled)


def rows(count: int, seed: int, labelled: bool = True) -> Proxy:
    """Ill are those who have one of two signs, not both: no linear model sees that."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 6))
    records = Records(
        {f"f{n}": column for n, column in enumerate(values.T)},
        np.where(values[:, 0] * values[:, 1] > 0, "yes", "no"),
        None,
        {},
    )
    return public(records, [NumericSpec(name=f"f{n}") for n in range(6)], labelled)


def notes(count: int, seed: int) -> Proxy:
    """Two subjects with a dozen words each, of which a note has a few, among words that tell nothing."""
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=count)
    texts = [
        " ".join([f"subject{subject}{n}" for n in rng.integers(12, size=4)] + [f"any{rng.integers(9)}"] * 6)
        for subject in y
    ]
    records = Records({"note": np.array(texts, dtype=object)}, np.asarray(CLASSES)[y], None, {})
    return public(records, [Text(name="note", pieces="words", length=12)], labelled=False)


def public(records: Records, specs: list, labelled: bool) -> Proxy:
    preprocessing = Preprocessing.fit(records, specs, CLASSES)
    cases = preprocessing.encode(records)
    return Proxy(preprocessing, cases.x, cases.y if labelled else np.full(len(cases.y), -1))


def trained(name: str, proxy: Proxy) -> torch.nn.Module:
    common.trunks._TRUNKS = common.trunks.Memo(capacity=8)
    return public_trunk(name, fit_features("none", proxy.x, 1, 0), proxy)


def seen(trunk: torch.nn.Module, proxy: Proxy) -> np.ndarray:
    with torch.no_grad():
        return trunk(torch.tensor(proxy.x)).flatten(1).numpy()


def test_every_party_trains_the_same_trunk_and_a_process_once(monkeypatch):
    monkeypatch.setattr(common.trunks, "STEPS", 5)
    torch.manual_seed(1)
    first = trained("mlp", rows(80, 0))
    assert public_trunk("mlp", fit_features("none", rows(80, 0).x, 1, 0), rows(80, 0)) is first
    torch.manual_seed(2)
    assert (seen(trained("mlp", rows(80, 0)), rows(9, 1)) == seen(first, rows(9, 1))).all()
    assert (seen(trained("mlp", rows(81, 0)), rows(9, 1)) != seen(first, rows(9, 1))).any()
    assert not first.training and not any(weights.requires_grad for weights in first.parameters())


def test_a_trunk_learns_to_see_what_scattering_sees_without_a_label(monkeypatch):
    monkeypatch.setattr(common.trunks, "STEPS", 120)
    monkeypatch.setattr(common.trunks, "MATCHED", 4)
    proxy, others = pictures(200, 0, labelled=False), pictures(200, 1)
    scattering = fit_features("scattering", proxy.x, 4, 0)
    wanted = [scattering.transform(one.x).numpy() for one in (proxy, others)]
    found = {}  # share of the variance that is missed
    untrained = trunk_of(build("cnn", (1, 12, 12), 2, seed=0))
    for name, trunk in {"trained": trained("cnn", proxy), "untrained": untrained}.items():
        fit = Ridge(alpha=10.0).fit(seen(trunk, proxy), wanted[0])
        found[name] = 1 - fit.score(seen(trunk, others), wanted[1])
    assert found["trained"] < 0.6 * found["untrained"]


def test_a_trunk_narrower_than_the_features_before_it_gives_the_leading_ones_back(monkeypatch):
    """A perceptron's head sees 64 numbers. Here 120 stand before it, the first a hundred times as loud."""
    monkeypatch.setattr(common.trunks, "STEPS_BEHIND_FEATURES", 600)
    names = [f"f{n}" for n in range(120)]
    mixing = np.linalg.qr(np.random.default_rng(0).normal(size=(120, 120)))[0]

    def cases(count: int, seed: int) -> Records:
        independent = np.random.default_rng(seed).normal(size=(count, 120)) / np.geomspace(1, 100, 120)
        columns = dict(zip(names, (independent @ mixing).T, strict=True))
        return Records(columns, np.repeat(CLASSES, count // 2), None, {})

    proxy = public(cases(600, 0), [NumericSpec(name=name) for name in names], labelled=False)
    features = fit_features("pca", proxy.x, 120, 0)
    others = proxy.preprocessing.encode(cases(400, 1))
    learned, asked = features.transform(proxy.x), features.transform(others.x)
    missed = {}  # share of the variance of the first ten, and of all
    untrained = trunk_of(build("mlp", (120,), 2, seed=0))
    for name, trunk in {"trained": public_trunk("mlp", features, proxy), "untrained": untrained}.items():
        with torch.no_grad():
            fit = Ridge(alpha=1e-3).fit(trunk(learned).numpy(), learned.numpy())
            error = (fit.predict(trunk(asked).numpy()) - asked.numpy()) ** 2
        missed[name] = [error[:, :most].sum() / asked[:, :most].square().sum().item() for most in (10, 120)]
    assert missed["trained"][0] < 0.2 * missed["untrained"][0]
    assert missed["trained"][1] < missed["untrained"][1]


def test_a_trunk_learns_what_labels_tell():
    proxy, others = rows(400, 0), rows(400, 1)
    score = {}
    for labelled in (True, False):
        trunk = trained("mlp", rows(400, 0, labelled))
        head = LogisticRegression(max_iter=1000).fit(seen(trunk, proxy), proxy.y)
        score[labelled] = head.score(seen(trunk, others), others.y)
    assert score[True] > 0.85 and score[True] > score[False]


def test_a_trunk_learns_what_a_text_is_about_without_a_label(monkeypatch):
    monkeypatch.setattr(common.trunks, "STEPS", 60)
    monkeypatch.setattr(common.trunks, "MATCHED", 4)
    proxy, others = notes(200, 0), notes(200, 1)
    subject = fit_features("words", proxy.x, 1, 0)
    wanted = [subject.transform(one.x).numpy().ravel() for one in (proxy, others)]
    untrained = trunk_of(build("text", (1, 12), 2, seed=0))
    missed = {}
    for name, trunk in {"trained": trained("text", proxy), "untrained": untrained}.items():
        fit = Ridge(alpha=10.0).fit(seen(trunk, proxy), wanted[0])
        missed[name] = 1 - fit.score(seen(trunk, others), wanted[1])
    assert missed["trained"] < 0.3 * missed["untrained"]


@pytest.mark.parametrize(("name", "least"), [("cnn", 1), ("mlp", 1)])
def test_its_work_is_bounded(monkeypatch, name, least):
    steps = []
    plain = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (steps.append(1), plain(self, *a))[1])
    monkeypatch.setattr(common.trunks, "STEPS", 6)
    for work, expected in ((1.0, least), (4e12, 6)):
        monkeypatch.setattr(common.trunks, "MOST_WORK", work)
        steps.clear()
        trained(name, pictures(40, 0))
        assert len(steps) == expected
