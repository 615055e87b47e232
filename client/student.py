"""The student's lesson in one task: fit the teacher's soft labels, take private steps, say what it thinks.

1. The student starts from public or already released state and fits the soft labels on the public cases (no
   private data, no budget).
2. Its logits on them are b.
3. It takes the plan's private steps on the site's own patients.
4. Its logits are now a. `movement` returns a − b, so that the student's error of fit isn't mistaken for
   learning; `logits` returns a.
5. Where the codec is coarse, what it cuts off a movement is kept, case by case, and added to the next one
   (error feedback: Seide et al. 2014; Karimireddy et al. 2019, arXiv:1901.09847). It is a function of public
   tasks and of the results of noisy steps, which the accountant counts as if they left whole, so it costs
   no budget. It stays at the site, and like the weights it counts from the last committed release.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from client.bookkeeping import Loss
from client.egress import Opinion
from client.noise import PrivateRandomness
from client.private_data import PrivateRecords
from client.private_step import StepSettings, private_steps
from common import seeds
from common.architectures import Architecture
from common.codec import CODECS, LARGEST_LOGIT, centred
from common.distillation import Learner, build_learner, fit_soft_labels
from common.losses import balanced_softmax_cross_entropy
from common.messages import Task
from common.models import private_ready
from common.plan import HOLD_OUT_ACCURACY, LABEL_HISTOGRAM, Plan
from common.proxy import Proxy

WHOLE = b"the whole proxy"


@dataclass
class Student:
    """A site's student in one run, resident between tasks, in the state of its last committed release."""

    proxy: Proxy
    learner: Learner
    _untaught: bytes
    _unsaid_XC: NDArray[np.float32]
    _seen: dict[bytes, Tensor] = field(default_factory=dict)

    @classmethod
    def enrol(
        cls,
        plan: Plan,
        proxy: Proxy,
        architecture: Architecture,
        site: str,
        allowed_paths: Collection[str] = (),
    ) -> "Student":
        """Build the student from public seeds; a model that can't be trained in private is refused here."""
        learner = build_learner(
            architecture, proxy, seeds.torch_seed(plan.seed, "student", site), allowed_paths
        )
        learner = Learner(learner.features, private_ready(learner.model, learner.features.shape))
        unsaid_XC = np.zeros((len(proxy), len(proxy.preprocessing.classes)), dtype=np.float32)
        return cls(proxy, learner, learner.state(), unsaid_XC)

    def restart(self, state: bytes | None) -> None:
        """Go back to the state of the last committed release, or to the untaught one."""
        self._unsaid_XC[:] = 0.0
        if not state:
            self.learner.restore(self._untaught)
            return
        tensors = load_tensors(state)
        self.learner.restore(tensors["weights"].numpy().tobytes())
        self._unsaid_XC[tensors["cases"].numpy()] = tensors["unsaid"].numpy()

    def state(self) -> bytes:
        """All that the next task starts from: weights, and what was left unsaid on which cases."""
        cases = np.flatnonzero(self._unsaid_XC.any(axis=1))
        tensors = {
            "weights": torch.frombuffer(bytearray(self.learner.state()), dtype=torch.uint8),
            "cases": torch.from_numpy(cases),
            "unsaid": torch.from_numpy(self._unsaid_XC[cases]),
        }
        return save_tensors(tensors)

    def phi(self, cases_P: NDArray[np.int32]) -> Tensor:
        """What the student sees of these public cases; kept for the next task on the same ones.

        Where tasks differ in their cases, the student looks at the whole proxy once.
        """
        key = cases_P.tobytes()
        if key in self._seen:
            return self._seen[key]
        if self._seen:
            if WHOLE not in self._seen:
                self._seen[WHOLE] = self.learner.phi_public(self.proxy.x)
            return self._seen[WHOLE][torch.from_numpy(cases_P.astype(np.int64))]
        self._seen[key] = self.learner.phi_public(self.proxy.x[cases_P])
        return self._seen[key]

    def study_soft_labels(self, task: Task) -> NDArray[np.float32]:
        """Fit the task's soft labels on its public cases; return the student's logits b on them."""
        phi_P = self.phi(task.cases_P)
        fit_soft_labels(
            self.learner,
            phi_P,
            task.log_soft_labels_PC.astype(np.float32),
            self.proxy.y[task.cases_P],
            task.plan.student,
            seeds.torch_seed(task.plan.seed, "soft labels", task.round),
        )
        return self.learner.logits(phi_P)

    def public_lesson(self, task: Task) -> Opinion:
        """A lesson without private steps: what a site says whose budget is spent."""
        before_PC = self.study_soft_labels(task)
        return Opinion(self._answer(task, before_PC), {}, self.state())

    def private_lesson(
        self, task: Task, records: PrivateRecords, declared_size: int, randomness: PrivateRandomness
    ) -> Opinion:
        """A lesson with the plan's private steps. Its events must have been charged before this is called."""
        plan = task.plan
        prices = {one.name: one.epsilon for one in plan.purchases(task.round)}
        bought: dict[str, tuple[int, ...]] = {}
        loss: Loss = nn.functional.cross_entropy
        if LABEL_HISTOGRAM in prices:
            price = prices[LABEL_HISTOGRAM]
            bought[LABEL_HISTOGRAM] = records.for_label_histogram(self.proxy, plan.unit, price, randomness)
            loss = _balanced_loss(bought[LABEL_HISTOGRAM])
        before_PC = self.study_soft_labels(task)
        settings = StepSettings(
            noise_multiplier=plan.noise_multiplier(),
            clipping_norm=plan.clipping_norm,
            sample_rate=plan.sample_rate,
            declared_size=declared_size,
            step_size=plan.step_size,
        )
        units = records.for_private_step(self.proxy, self.learner, plan.unit)
        private_steps(self.learner.model, units, plan.steps_per_round, settings, loss, randomness)
        if HOLD_OUT_ACCURACY in prices:
            price = prices[HOLD_OUT_ACCURACY]
            bought[HOLD_OUT_ACCURACY] = records.for_hold_out_accuracy(
                self.proxy, self.learner, plan.unit, price, randomness
            )
        answer_PC = self._answer(task, before_PC)
        if plan.returns == "movement" and CODECS[plan.codec].feedback:
            answer_PC = self._with_unsaid(task, answer_PC)
        return Opinion(answer_PC, bought, self.state())

    def _answer(self, task: Task, before_PC: NDArray[np.float32]) -> NDArray[np.float32]:
        after_PC = self.learner.logits(self.phi(task.cases_P))
        return centred(after_PC - before_PC if task.plan.returns == "movement" else after_PC)

    def _with_unsaid(self, task: Task, movement_PC: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add what earlier rounds cut off on these cases; keep what this one will."""
        movement_PC = np.nan_to_num(movement_PC, nan=0.0, posinf=0.0, neginf=0.0)
        # What is too large ever to be said is not kept, so that what is kept stays bounded.
        meant_PC = np.clip(movement_PC + self._unsaid_XC[task.cases_P], -LARGEST_LOGIT, LARGEST_LOGIT)
        spoken_PC = centred(meant_PC)
        codec = CODECS[task.plan.codec]
        scale, payload = codec.encode(spoken_PC)
        heard_PC = codec.decode(payload, scale, *spoken_PC.shape)
        self._unsaid_XC[task.cases_P] = spoken_PC - heard_PC
        return spoken_PC


def _balanced_loss(histogram_C: tuple[int, ...]) -> Loss:
    count_C = torch.tensor(histogram_C, dtype=torch.float32).clamp(min=1.0)
    log_prior_C = (count_C / count_C.sum()).log()
    return lambda logits, labels: balanced_softmax_cross_entropy(logits, labels, log_prior_C)
