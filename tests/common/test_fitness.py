"""A model whose gradients aren't its cases' own is found out by trying it, whatever its layers are."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.fitness import require_cases_apart, require_judgement_apart
from common.models import FOR_TEXTS, REGISTRY, build, private_ready

WIDE, CLASSES = 6, 3


class Plain(nn.Module):
    """What the others below depart from."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(WIDE, 8), nn.Linear(8, CLASSES)
        nn.init.zeros_(self.head.weight)  # so that no gradient reaches `inner` at the start

    def forward(self, x):
        return self.head(torch.relu(self.inner(x)))


class Centred(Plain):
    def forward(self, x):
        return super().forward(x - x.mean(0))


class CentredInside(Plain):
    def forward(self, x):
        hidden = torch.relu(self.inner(x))
        return self.head(hidden / (1e-3 + hidden.pow(2).mean(0).sqrt()))


class Folding(Plain):
    """Treats the halves of a case as two cases, and takes their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDE // 2, 8)

    def forward(self, x):
        return super().forward(x.reshape(-1, WIDE // 2)).reshape(len(x), 2, CLASSES).mean(1)


class Sorting(Plain):
    """Gives the same gradients in another order: each is one case's, but not of the case at its place."""

    def forward(self, x):
        order = x[:, 0].argsort()
        return super().forward(x[order])[order.argsort()]


class SortingDown(Plain):
    """The same, the other way round: of any few cases, one of the two finds them in order."""

    def forward(self, x):
        order = x[:, 0].argsort(descending=True)
        return super().forward(x[order])[order.argsort()]


class Averaging(Plain):
    """Keeps a running mean beside its weights, as batch normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDE), persistent=False)

    def forward(self, x):
        if self.training and len(x):
            self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return super().forward(x)


class Remembering(Plain):
    """Keeps the last batch where no state dict shows it, and says it again when it is used."""

    last = None

    def forward(self, x):
        if self.training and len(x):
            self.last = x.detach().mean()
        said = super().forward(x)
        return said if self.training or self.last is None else said + self.last


class Echoing(Plain):
    last = 0.0

    def forward(self, x):
        said = super().forward(x) + self.last
        self.last = x.detach().sum()
        return said


class Chancy(Plain):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Idle(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Alone(Plain):
    """Fails where Poisson sampling draws nobody."""

    def forward(self, x):
        x.max()
        return super().forward(x)


class Detached(Plain):
    """Weights that no layer of Opacus's holds, used twice and once mixed over the batch."""

    def forward(self, x):
        hidden = torch.relu(self.inner(x))
        return self.head(hidden) + self.inner(x.mean(0)).sum() * torch.ones(len(x), CLASSES)


WRONG = {
    Centred: "depends on the others in the batch",
    CentredInside: "depends on the others in the batch",
    Folding: "a case is folded into several",
    Sorting: "are not those of each case alone",
    SortingDown: "are not those of each case alone",
    Averaging: "changes its weights or buffers",
    Remembering: "remembers cases",
    Echoing: "remembers cases|depends on the others",
    Chancy: "draws chance other than by",
    Idle: "spare.weight takes no part",
    Alone: "on one or on none",
    Detached: "depends on the others in the batch",
}


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_what_mixes_folds_or_remembers_cases_is_refused_with_its_reason(kind):
    with pytest.raises(UserError, match=f"{kind.__name__} can't be trained in private: .*({WRONG[kind]})"):
        private_ready(kind(), (WIDE,))


class Impatient(nn.Module):
    """Takes a few cases and no more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDE, CLASSES)

    def forward(self, x):
        assert len(x) < 50
        return self.layer(x)


def test_a_model_that_fails_on_many_cases_or_has_nothing_to_train_is_refused():
    with pytest.raises(UserError, match=r"it fails on 64 cases, on 4, on one or on none \(AssertionError"):
        private_ready(Impatient(), (WIDE,))
    with pytest.raises(UserError, match="none of its weights can be trained"):
        private_ready(nn.Linear(WIDE, CLASSES).requires_grad_(False), (WIDE,))


def test_a_teacher_judges_each_case_by_itself():
    cases_B = torch.rand(8, WIDE)
    require_judgement_apart(nn.Sequential(nn.Linear(WIDE, CLASSES), nn.BatchNorm1d(CLASSES)), cases_B)
    require_judgement_apart(OfPixels(), cases_B)
    with pytest.raises(UserError, match=r"Centred can't be a teacher: .*depends on the others in the batch"):
        require_judgement_apart(Centred(), cases_B)
    with pytest.raises(UserError, match=r"Together can't be a teacher: it fails on 4 cases, or on one \(Ind"):
        require_judgement_apart(Together(), cases_B)


class OfPixels(Plain):
    """It counts on there being nothing below zero."""

    def forward(self, x):
        return super().forward(x.sqrt())


class Together(Plain):
    """It can't do with a single case."""

    def forward(self, x):
        return super().forward(x.squeeze().flatten(1))


class Words(nn.Module):
    """A sequence in a case, which is no folding: each case keeps its own gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.each(x)).mean(1))


SOUND = {
    "plain": (Plain(), (WIDE,)),
    "dropout": (nn.Sequential(nn.Linear(WIDE, 8), nn.Dropout(0.5), nn.Linear(8, CLASSES)), (WIDE,)),
    "batch norm": (nn.Sequential(nn.Linear(WIDE, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)), (WIDE,)),
    "sequence": (Words(), (5, 4)),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_keeps_cases_apart_passes_and_is_left_as_it_is(name):
    model, case_shape = SOUND[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chance = torch.get_rng_state()
    private_ready(model, case_shape)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert not any(hasattr(weight, "grad_sample") for weight in model.parameters())


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("seed", range(3))
def test_every_architecture_of_the_registry_passes(name, seed):
    case_shape = (1, 30) if name in FOR_TEXTS else (1, 28, 28)
    require_cases_apart(build(name, case_shape, 10, seed), case_shape)


class Reading(nn.Module):
    """A text model of somebody's own; `centred` takes the mean of the batch away."""

    def __init__(self, centred: bool) -> None:
        super().__init__()
        self.centred, self.embedding, self.head = centred, nn.Embedding(64, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        vectors = self.embedding(x.long().flatten(1)).mean(1)
        return self.head(vectors - vectors.mean(0) if self.centred else vectors)


def test_a_text_model_is_tried_on_texts():
    private_ready(Reading(centred=False), (1, 30))
    with pytest.raises(UserError, match="depends on the others in the batch"):
        private_ready(Reading(centred=True), (1, 30))
