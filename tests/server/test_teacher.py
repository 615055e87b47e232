"""The teacher: what it starts from, what it learns, and that its file says how to build it again."""

import numpy as np
import pytest
import torch

from common.config import RunConfig
from common.datasets import load_public
from common.errors import ConfigError
from common.features import load_featured_model
from common.models import ModelCard, model_bytes
from server.teacher import WEIGHT_DECAYS, Teacher, check_start, choose_cases, learner_of


def configured(**flat) -> RunConfig:
    return RunConfig.from_run_config({k.replace("__", ".").replace("_", "-"): v for k, v in flat.items()})


def started(**flat) -> Teacher:
    config = configured(**flat)
    public = load_public(config)
    return Teacher.start(config, public, choose_cases(config, len(public.proxy)))


def test_a_teacher_that_saw_labels_is_better_than_none():
    assert started().test_scores()["auroc"] > 0.8
    untaught = started(teacher__model="none")
    assert untaught.test_scores()["auroc"] == 0.5
    assert not untaught.logits().any() and untaught.logits().shape == (184, 2)


def start_loss(decay: float, *, validated: bool) -> float:
    teacher = started(teacher__weight_decay=decay, aggregation__validated=validated)
    return teacher.validation_scores()["log_loss"]


def test_validation_chooses_another_start_where_the_runs_own_is_held_back_too_much():
    each = [start_loss(decay, validated=False) for decay in (*WEIGHT_DECAYS, 10.0)]
    assert each.index(min(each)) < len(WEIGHT_DECAYS)
    assert start_loss(10.0, validated=True) == min(each) < 0.9 * each[-1]


def test_a_start_that_few_cases_find_better_by_chance_is_not_taken():
    own = 0.05
    assert start_loss(own, validated=True) == start_loss(own, validated=False)
    assert start_loss(own, validated=True) > min(start_loss(one, validated=False) for one in WEIGHT_DECAYS)


def test_none_is_a_twin_of_the_student_features_and_all():
    twin = started(
        teacher__model="none", student__model="mlp", student__features="pca", student__feature_size=4
    )
    assert (twin.architecture.model, twin.architecture.features, twin.architecture.feature_size) == (
        "mlp",
        "pca",
        4,
    )


@pytest.mark.parametrize("model", ["linear", "mlp"])
@pytest.mark.parametrize("features", ["none", "pca"])
@pytest.mark.parametrize("layers", ["head", "last-block", "all"])
def test_its_file_builds_the_same_model_again(tmp_path, model, features, layers):
    teacher = started(
        teacher__model=model, teacher__features=features, teacher__layers=layers, teacher__epochs=3
    )
    (tmp_path / "t.safetensors").write_bytes(teacher.model_bytes())
    again, card = load_featured_model(tmp_path / "t.safetensors")
    assert card.classes == ("absent", "present")
    with torch.no_grad():
        logits = again.eval()(torch.tensor(teacher.public.test.x)).numpy()
    said = teacher.learner.logits(teacher.learner.phi(teacher.public.test.x))
    np.testing.assert_allclose(logits, said, atol=1e-5)


def test_a_saved_teacher_is_where_another_starts(tmp_path):
    first = started()
    path = tmp_path / "t.safetensors"
    path.write_bytes(first.model_bytes())
    second = started(teacher__path=str(path), data__proxy_labels=0)
    assert (first.logits() == second.logits()).all()


@pytest.mark.parametrize(
    "spoil", ["garbage", "other architecture", "other classes", "other order", "not finite"]
)
def test_a_file_that_does_not_fit_is_refused_by_its_key(tmp_path, spoil):
    path, linear = tmp_path / "t.safetensors", started()
    card = linear.card()
    bodies = {
        "garbage": lambda: b"garbage" * 9,
        "other architecture": lambda: started(teacher__model="mlp", teacher__epochs=1).model_bytes(),
        "other classes": lambda: _with_card(linear, card.model_copy(update={"classes": ("no", "yes")})),
        "other order": lambda: _with_card(linear, card.model_copy(update={"classes": card.classes[::-1]})),
        "not finite": lambda: _spoilt(linear),
    }
    path.write_bytes(bodies[spoil]())
    with pytest.raises(ConfigError, match=r"teacher\.path = .* is refused: expected a model that fits"):
        started(teacher__path=str(path))


def _with_card(teacher: Teacher, card: ModelCard) -> bytes:
    return model_bytes(teacher.learner.whole(), card)


def _spoilt(teacher: Teacher) -> bytes:
    teacher.learner.model.head.weight.data[0, 0] = float("nan")
    return teacher.model_bytes()


@pytest.mark.parametrize(
    ("flat", "key"),
    [
        ({"data__proxy_labels": 0}, "teacher.model"),
        ({"teacher__path": "/there/is/no/such/file"}, "teacher.path"),
        ({"teacher__path": "/etc/hostname", "teacher__model": "none"}, "teacher.path"),
    ],
)
def test_a_teacher_with_nothing_to_start_from_is_refused(flat, key):
    config = configured(**flat)
    with pytest.raises(ConfigError) as refused:
        check_start(config, load_public(config).proxy)
    assert refused.value.key == key


def test_it_learns_z_and_keeps_what_its_linear_model_can_say_of_it():
    teacher = started()
    z_PC = teacher.logits().astype(np.float64) * 2
    teacher.learn(z_PC)
    found = teacher.logits()
    np.testing.assert_allclose(found[:, 1] - found[:, 0], z_PC[:, 1] - z_PC[:, 0], atol=0.1)


def test_its_card_names_what_it_is():
    card = started(teacher__model="mlp", teacher__features="pca", teacher__layers="head").card()
    assert (card.model, card.case_shape) == ("mlp", (26,))
    assert card.features is not None and card.features.kind == "pca"
    assert card.trunk is not None and card.trunk.layers == "head" and card.trunk.raw_width == 64
    assert started(teacher__model="mlp", teacher__epochs=1).card().trunk is None


def test_cases_are_drawn_by_the_seed_in_order_and_not_more_than_there_are():
    assert (choose_cases(configured(), 9) == np.arange(9)).all()
    some = choose_cases(configured(proxy_cases=4), 9)
    assert len(set(some)) == 4 and (np.diff(some) > 0).all() and some.dtype == np.int32
    assert (some == choose_cases(configured(proxy_cases=4), 9)).all()
    assert any((choose_cases(configured(proxy_cases=4, seed=seed), 9) != some).any() for seed in range(1, 9))
    with pytest.raises(ConfigError, match="proxy-cases = 10 is refused: expected at most the 9 cases"):
        choose_cases(configured(proxy_cases=10), 9)


def test_parties_start_alike_from_the_same_seed():
    config = configured(student__model="mlp")
    public = load_public(config)
    one, other = (learner_of(config, public.proxy, config.student) for _ in range(2))
    assert one.state() == other.state()
