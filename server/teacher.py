"""The teacher: the central model, its soft labels, and how it learns from the ensemble.

It starts from the labelled public cases, from a safetensors file, or not at all (`teacher.model = "none"`: z
starts at zero, and a twin of the student learns). Its logits on the run's proxy cases are the first z; after
every round it is distilled from the new z, warm from where it was.

Where public validation cases choose (`aggregation.validated`), they choose the weight decay of that start
too: another than the run's own where its log-loss is less by more than a standard error, so that few cases
don't choose by chance. A start that is held back too much is less sure of itself than it is right, and then
any step that makes logits larger lowers the log-loss, noise as well as learning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common import seeds
from common.architectures import Architecture, architecture_of
from common.config import Network, RunConfig
from common.datasets import PublicData
from common.distillation import (
    Learner,
    build_learner,
    fit_labels,
    fit_soft_labels,
    outline_learner,
)
from common.errors import ConfigError
from common.losses import log_soft_labels
from common.metrics import log_losses, scores
from common.models import ModelCard, ModelFileError, load_weights, model_bytes, read_card
from common.proxy import Proxy
from common.records import Cases
from server.stacking import Jury

Floats = NDArray[np.float32]
NONE = "none"
WEIGHT_DECAYS = (1e-3, 1e-2, 1e-1)
"""Of fits to labels, that are tried beside a network's own where validation chooses."""


@dataclass
class Teacher:
    """A learner with its views of the public cases, so that features are computed once.

    Attributes:
        architecture: What the model is.
        learner: The model behind its features.
        settings: How it distils.
        cases_P: The run's proxy cases.
    """

    architecture: Architecture
    learner: Learner
    settings: Network
    proxy: Proxy
    cases_P: NDArray[np.int32]
    phi_P: Tensor
    phi_validation: Tensor
    phi_test: Tensor
    public: PublicData
    seed: int

    @classmethod
    def open(
        cls, config: RunConfig, public: PublicData, cases_P: NDArray[np.int32], settings: Network
    ) -> "Teacher":
        """Build an untaught learner of these settings, with its views."""
        learner = learner_of(config, public.proxy, settings)
        return cls(
            _architecture(config, settings),
            learner,
            settings,
            public.proxy,
            cases_P,
            phi_P=learner.phi_public(public.proxy.x[cases_P]),
            phi_validation=learner.phi_public(public.validation.x),
            phi_test=learner.phi_public(public.test.x),
            public=public,
            seed=config.seed,
        )

    @classmethod
    def start(cls, config: RunConfig, public: PublicData, cases_P: NDArray[np.int32]) -> "Teacher":
        """Open the run's teacher, loaded, trained on the labelled public part, or untaught.

        Raises:
            ConfigError: if `teacher.path` names no model that fits, or no case is labelled.
        """
        check_start(config, public.proxy)
        teacher = cls.open(config, public, cases_P, config.teacher)
        if config.teacher.path:
            teacher.load(Path(config.teacher.path))
        elif config.teacher.model != NONE:
            teacher.learn_labels(choose=config.aggregation.validated)
        return teacher

    def load(self, path: Path) -> None:
        """Take weights from a file, whose model must have the same cases and classes, in the same order."""
        ours = self.card()
        try:
            theirs = read_card(path)
            if (theirs.case_shape, theirs.classes) != (ours.case_shape, ours.classes):
                raise ModelFileError(f"it judges cases {theirs.case_shape} as {', '.join(theirs.classes)}")
            load_weights(path.read_bytes(), into=self.learner.whole())
        except (OSError, ModelFileError) as error:
            raise ConfigError(
                "run config", "teacher.path", str(path), f"a model that fits ({error})"
            ) from None

    def learn_labels(self, *, choose: bool) -> None:
        """Train on the labelled proxy cases; with `choose`, validation may take another weight decay."""
        labelled = np.flatnonzero(self.proxy.y >= 0)
        phi, y_N = self.learner.phi_public(self.proxy.x[labelled]), self.proxy.y[labelled]
        if not choose:
            fit_labels(self.learner, phi, y_N, self.settings, self.seed)
            return
        untaught, learned = self.learner.state(), dict[float, tuple[NDArray[np.float64], bytes]]()
        own = self.settings.weight_decay
        for decay in decays_beside(own):
            self.learner.restore(untaught)
            settings = self.settings.model_copy(update={"weight_decay": decay})
            fit_labels(self.learner, phi, y_N, settings, self.seed)
            losses_V = log_losses(self.learner.logits(self.phi_validation), self.public.validation.y)
            learned[decay] = losses_V, self.learner.state()
        best = min(learned, key=lambda decay: learned[decay][0].mean())
        gain_V = learned[own][0] - learned[best][0]
        surely = gain_V.mean() > gain_V.std() / np.sqrt(len(gain_V))
        self.learner.restore(learned[best if surely else own][1])

    def logits(self) -> Floats:
        """Logits `(cases, classes)` on the run's proxy cases; zeros where there is no teacher."""
        if self.settings.model == NONE:
            return np.zeros((len(self.cases_P), len(self.proxy.preprocessing.classes)), dtype=np.float32)
        return self.learner.logits(self.phi_P)

    def learn(self, z_PC: NDArray[np.float64], rows: NDArray[np.int64] | None = None) -> None:
        """Distil z, from the present weights; with `rows`, z on these of the run's proxy cases only."""
        temperature = self.settings.temperature
        soft_PC = log_soft_labels(z_PC.astype(np.float32), temperature)
        chosen = slice(None) if rows is None else rows
        hard_P = self.proxy.y[self.cases_P[chosen]]
        fit_soft_labels(self.learner, self.phi_P[chosen], soft_PC, hard_P, self.settings, self.seed)

    def learn_best(self, candidates: Sequence[NDArray[np.float64]]) -> int:
        """Distil each candidate for z, from the present weights; keep the one that validation finds best.

        Returns:
            Its place; the first of equals. A single candidate is learned unseen.
        """
        before, learned = self.learner.state(), list[tuple[float, bytes]]()
        for z_PC in candidates:
            self.learner.restore(before)
            self.learn(z_PC)
            if len(candidates) == 1:
                return 0
            learned.append((self.validation_scores()["log_loss"], self.learner.state()))
        best = min(range(len(learned)), key=lambda place: learned[place][0])
        self.learner.restore(learned[best][1])
        return best

    def model_bytes(self) -> bytes:
        """The model as a safetensors file that says how it was built."""
        return model_bytes(self.learner.whole(), self.card())

    def card(self) -> ModelCard:
        """What the model's file says about it."""
        preprocessing = self.proxy.preprocessing
        return ModelCard(
            model=self.architecture.model,
            case_shape=preprocessing.case_shape,
            classes=preprocessing.classes,
            features=self.learner.features.card(),
            trunk=self.learner.features.trunk,
        )

    def validation_scores(self) -> dict[str, float]:
        """Scores on the public validation cases: for choices."""
        return _scored(self.learner, self.phi_validation, self.public.validation)

    def test_scores(self) -> dict[str, float]:
        """Scores on the public test cases: for the report."""
        return _scored(self.learner, self.phi_test, self.public.test)


def decays_beside(own: float) -> list[float]:
    """Weight decays that validation may choose from, a network's own among them."""
    return sorted({*WEIGHT_DECAYS, own})


def choose_cases(config: RunConfig, proxy_size: int) -> NDArray[np.int32]:
    """Rows of the proxy that z is kept on: all, or the `proxy-cases` drawn for every round alike.

    Raises:
        ConfigError: if there are not so many.
    """
    wanted = config.proxy_cases or proxy_size
    if wanted > proxy_size:
        raise ConfigError("run config", "proxy-cases", wanted, f"at most the {proxy_size} cases of the proxy")
    if config.proxy_subsets == "per-round":
        wanted = proxy_size
    chosen = seeds.generator(config.seed, "proxy cases").choice(proxy_size, wanted, replace=False)
    return np.sort(chosen).astype(np.int32)


def seat_jury(student: Teacher, rows_R: NDArray[np.int64]) -> Jury:
    """Let the validation cases judge movements on a round's cases, through the student's features."""
    phi_RD, validation = student.phi_P[rows_R], student.public.validation
    return Jury.seated(phi_RD.numpy(), student.phi_validation.numpy(), validation.y)


def learner_of(config: RunConfig, proxy: Proxy, settings: Network) -> Learner:
    """Build the untaught learner of these settings, the run's teacher's or student's.

    Raises:
        ConfigError: if there is no such model, or it doesn't take such cases.
    """
    seed = seeds.torch_seed(config.seed, "teacher")
    return build_learner(_architecture(config, settings), proxy, seed, _own_paths(config))


def outline_of(config: RunConfig, proxy: Proxy, settings: Network) -> Learner:
    """Build that learner on a trunk that nobody has trained, to see what can be known beforehand.

    Raises:
        ConfigError: as `learner_of`.
    """
    return outline_learner(_architecture(config, settings), proxy, _own_paths(config))


def _own_paths(config: RunConfig) -> tuple[str, ...]:
    # Whoever may name code in a coordinator's own run config may run code there anyway.
    return config.teacher.model, config.student.model


def check_start(config: RunConfig, proxy: Proxy) -> None:
    """Refuse a teacher that has nothing to start from.

    Raises:
        ConfigError: naming the key of the teacher's that is wrong.
    """
    teacher = config.teacher
    if teacher.path:
        if teacher.model == NONE:
            raise ConfigError(
                "run config", "teacher.path", teacher.path, "no file, since teacher.model is none"
            )
        if not Path(teacher.path).is_file():
            raise ConfigError("run config", "teacher.path", teacher.path, "a file that is there")
    elif teacher.model != NONE and not (proxy.y >= 0).any():
        expected = "none, or a file in teacher.path: no proxy case is labelled"
        raise ConfigError("run config", "teacher.model", teacher.model, expected)


def _architecture(config: RunConfig, settings: Network) -> Architecture:
    """The settings' own, or the student's for the teacher that is none."""
    return architecture_of(config.student if settings.model == NONE else settings)


def _scored(learner: Learner, phi: Tensor, cases: Cases) -> dict[str, float]:
    # What private steps have blown up beyond all numbers has no opinion.
    return scores(np.nan_to_num(learner.logits(phi)), cases.y)
