"""The teacher: the central model, its soft labels, and how it learns from the ensemble.

It starts from the labelled public cases, from a safetensors file, or not at all (`teacher.model = "none"`: z starts at zero). Its logits on the run's
proxy cases are the first z; after every round it is distilled from the new z, warm from where it was.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from common import seeds
from common.architectures import Architecture
from common.config import Network, RunConfig
from common.datasets import PublicData
from common.distillation import Learner, build_learner, fit_labels, fit_soft_labels, trunk_name
from common.errors import ConfigError
from common.losses import log_soft_labels
from common.metrics import scores
from common.models import ModelCard, load_model, model_bytes
from common.proxy import Proxy
from common.records import Cases

Floats = NDArray[np.float32]
NONE = "none"


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
    def open(cls, config: RunConfig, public: PublicData, cases_P: NDArray[np.int32], settings: Network) -> "Teacher":
        """Build an untaught learner of these settings."""
        model = config.student.model if settings.model == NONE else settings.model
        architecture = Architecture(model, settings.features, settings.feature_size)
        own_paths = (config.teacher.model, config.student.model)
        learner = build_learner(architecture, public.proxy, seeds.torch_seed(config.seed, "teacher"), own_paths)
        return cls(
            architecture,
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
            ConfigError: if `teacher.path` names no model that fits.
        """
        teacher = cls.open(config, public, cases_P, config.teacher)
        if config.teacher.path:
            teacher.load(Path(config.teacher.path))
        elif config.teacher.model != NONE:
            teacher.learn_labels()
        return teacher

    def load(self, path: Path) -> None:
        """Take weights from a file."""
        try:
            load_model(path, into=self.learner.whole())
        except (OSError, ValueError) as error:
            raise ConfigError("run config", "teacher.path", str(path), f"a model that fits: {error}") from None

    def learn_labels(self) -> None:
        """Train on the labelled proxy cases."""
        labelled = np.flatnonzero(self.proxy.y >= 0)
        phi = self.learner.phi_public(self.proxy.x[labelled])
        fit_labels(self.learner, phi, self.proxy.y[labelled], self.settings, self.seed)

    def logits(self) -> Floats:
        """The teacher's logits on the run's proxy cases, `(cases, classes)`; zeros where there is no teacher yet."""
        if self.settings.model == NONE:
            return np.zeros((len(self.cases_P), len(self.proxy.preprocessing.classes)), dtype=np.float32)
        return self.learner.logits(self.phi_P)

    def learn(self, z_PC: NDArray[np.float64]) -> None:
        """Distil z, from the present weights."""
        temperature = self.settings.temperature
        soft_PC = log_soft_labels(z_PC.astype(np.float32), temperature)
        hard_P = self.proxy.y[self.cases_P]
        fit_soft_labels(self.learner, self.phi_P, soft_PC, hard_P, self.settings, self.seed)

    def model_bytes(self) -> bytes:
        """The model as a safetensors file that says how it was built."""
        preprocessing = self.proxy.preprocessing
        trunk = trunk_name(self.proxy) if self.architecture.features == "teacher" else ""
        card = ModelCard(
            model=self.architecture.model,
            case_shape=preprocessing.case_shape,
            classes=preprocessing.classes,
            features=self.learner.features.card(trunk),
        )
        return model_bytes(self.learner.whole(), card)

    def validation_scores(self) -> dict[str, float]:
        """Scores on the public validation cases: for choices."""
        return _scored(self.learner, self.phi_validation, self.public.validation)

    def test_scores(self) -> dict[str, float]:
        """Scores on the public test cases: for the report."""
        return _scored(self.learner, self.phi_test, self.public.test)


def _scored(learner: Learner, phi: Tensor, cases: Cases) -> dict[str, float]:
    return scores(learner.logits(phi), cases.y)
