"""The coordinator, from start to end. This file is the algorithm; read it first.

1. The labelled public cases make the **teacher**; its logits on the run's proxy cases are the state z.
2. The sites are called; those that don't know the **proxy** are sent it, once. Each gets the plan within
   its own caps, and who comes late is enrolled between rounds (`server.roll`).
3. Every round:
   a. z, on all its cases or on this round's (`server.subsets`), becomes **soft labels** at the students'
      temperature, and with the plan a `Task`;
   b. each site's custodian lets its **student** learn them, take private steps, and say what it thinks
      (`client.custodian`);
   c. releases are admitted as hostile input (`server.admission`), the **ensemble** is formed
      (`server.aggregation`, weights in `server.weights`), and z advances (`server.methods`);
   d. the teacher learns from z and is judged on public test cases. How long a step is and when to end, public
      validation cases decide, if they are to (`aggregation.validated`, `patience`).
   A run that is `resumable` is kept before a task is sent and after each round (`server.checkpoint`).
4. z is distilled into the student that goes back to every site; the results are written.
"""

import atexit
import gc
import logging
import math
from collections.abc import Callable, Mapping, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from common.config import RunConfig
from common.datasets import load_public, sites
from common.errors import UserError
from common.logs import about, follow_environment
from common.losses import log_soft_labels
from common.messages import Task
from common.plan import Plan, plan_of, rule_of
from common.runs import RunFolder, final_folder
from common.summary import Results
from server.admission import Member
from server.aggregation import Contribution, Ensemble, Moment, open_ensemble
from server.checkpoint import Progress, fingerprint, keep, resume
from server.correspondence import ask_round, deliver_student
from server.methods import State, method_of, stalled
from server.metrics import metrics_served
from server.node_owners import read_owners
from server.preconditions import check
from server.public_baselines import public_baselines
from server.results import Journal, Record, metrics_of
from server.roll import Roll
from server.stragglers import Stragglers
from server.subsets import rows_of_round, spread
from server.teacher import NONE, Teacher, choose_cases, seat_jury
from server.weights import weights_of

LEAST_LOG_LABEL = -60.0
"""Soft labels below e^-60 say no more; float16 keeps what is above to 3 decimal digits."""

log = logging.getLogger("flwr")  # shows where a Flower user looks

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one study."""
    # A process that is told to end is to be gone: Python would first look through all that torch has loaded.
    atexit.register(gc.freeze)
    follow_environment()
    config = RunConfig.from_run_config(context.run_config)
    with about(run=final_folder(config, context.run_id).name):
        federate(grid, config, context.run_id)


def federate(grid: Grid, config: RunConfig, flower_run_id: int) -> None:
    """Run one study with the sites behind `grid`.

    Raises:
        UserError: if the configuration is refused, the results can't be written, or fewer than `min-sites`
            answer.
    """
    torch.set_num_threads(1)
    public = load_public(config)
    check(config, public)
    method, rule = method_of(config), rule_of(config)
    with (
        metrics_served(config.metrics_port) as metrics,
        RunFolder.open(final_folder(config, flower_run_id), config.resumable) as folder,
    ):
        cases_P = choose_cases(config, len(public.proxy))
        teacher = Teacher.start(config, public, cases_P)
        student = Teacher.open(config, public, cases_P, config.student)
        known = fingerprint(config, public)
        progress = resume(folder.path, config, known)
        if progress is None:
            progress = Progress(known, State.start(teacher.logits()), teacher.learner.state())
            if config.teacher.model != NONE:
                progress.record.teacher_alone = metrics_of(teacher.test_scores())
        teacher.learner.restore(progress.teacher)

        plan = plan_of(
            config,
            study=folder.name,
            proxy_digest=public.proxy.digest,
            classes=len(public.proxy.preprocessing.classes),
        )
        agreed = {site.name: site.declared_size for site in sites(config)}
        owners = partial(read_owners, Path(config.node_owners)) if config.node_owners else None
        roll = Roll(grid, public.proxy, plan, agreed, progress.record.plans, owners)
        roll.call(config.round_timeout, config.min_sites)
        require_sites(config, "roll call", roll.members, roll.absent)
        journal, stragglers = Journal(folder, config, plan, progress.record, metrics), Stragglers()
        for round_number in range(progress.held + 1, plan.rounds + 1):
            if stalled(progress.record.validation, config.patience):
                break
            z_PC, rows_R = progress.state.z_PC, rows_of_round(config, len(cases_P), round_number)
            progress.task = task = progress.task or draw_up(plan, round_number, cases_P[rows_R], z_PC[rows_R])
            keep(folder, config, progress)
            tasks, done = tasks_of(task, roll.members)
            absent = {**roll.absent, **done}
            weights = weights_of(roll.members)
            jury = seat_jury(student, rows_R) if rule == "stacking" else None
            outlying = progress.record.outlying
            moment = Moment(config.aggregation, math.fsum(weights.values()), z_PC[rows_R], jury, outlying)
            ensemble = open_ensemble(rule, moment)
            hear = hearing(ensemble, weights, progress.histograms)
            admitted = ask_round(grid, tasks, roll.members, progress.heads, config.round_timeout, hear)
            metrics.refused_late(stragglers.refuse(grid, round_number))
            stragglers.expect(round_number, admitted.unanswered)
            if progress.held and admitted.idle >= tasks.keys():
                log.warning("No site has budget left: the run ends with round %d", progress.held)
                break
            left_out = {**absent, **admitted.left_out}
            require_sites(config, f"round {round_number}", admitted.answered, left_out)
            progress.heads |= admitted.heads
            progress.histograms |= admitted.histograms
            combined = ensemble.combined()
            progress.record.outlying |= combined.outlying
            ensemble_PC = spread(
                student, z_PC, rows_R, combined.logits_PC, movement=plan.returns == "movement"
            )
            candidates = method.candidates(progress.state, ensemble_PC, round_number, config)
            choice = teacher.learn_best([one.taught_PC(config.aggregation) for one in candidates])
            progress.state = candidates[choice]
            if config.patience:
                progress.state = watched(progress.state, progress.record, teacher, config)
            journal.note(round_number, admitted, tasks.keys(), absent, teacher.test_scores())
            progress.held, progress.task, progress.teacher = round_number, None, teacher.learner.state()
            keep(folder, config, progress)
            roll.call(0.0)

        outcomes = progress.state.outcomes(config.aggregation)
        final_PC = outcomes[teacher.learn_best(outcomes) if len(outcomes) > 1 else 0]
        student.learn(final_PC)
        folder.keep_model("teacher.safetensors", teacher.model_bytes())
        folder.keep_model("student.safetensors", student.model_bytes())
        missed = deliver_student(grid, student.model_bytes(), roll.members, config.round_timeout)
        for site, why in missed.items():
            log.warning("%s has not got the final student: %s", site, why)
        public_only, public_only_if_labelled = public_baselines(config, public)
        journal.finish(
            public,
            agreed,
            Results(
                federation=metrics_of(teacher.test_scores()),
                student=metrics_of(student.test_scores()),
                teacher_alone=progress.record.teacher_alone,
                public_only=public_only,
                public_only_if_labelled=public_only_if_labelled,
            ),
        )
    log.info("Results: %s", folder.final)


def draw_up(plan: Plan, round_number: int, cases_R: NDArray[np.int32], z_RC: NDArray[np.floating]) -> Task:
    """Make a round's task: z as soft labels at the students' temperature."""
    soft_RC = log_soft_labels(z_RC.astype(np.float32), plan.student.temperature)
    return Task(plan, round_number, cases_R, np.clip(soft_RC, LEAST_LOG_LABEL, 0.0).astype(np.float16))


def tasks_of(task: Task, members: Mapping[str, Member]) -> tuple[dict[str, Task], dict[str, str]]:
    """The round's task under each site's own plan, and why some sites get none."""
    tasks = {
        site: replace(task, plan=member.plan)
        for site, member in members.items()
        if task.round <= member.plan.rounds
    }
    done = {
        site: f"its own plan ended with round {members[site].plan.rounds}"
        for site in members
        if site not in tasks
    }
    return tasks, done


def hearing(
    ensemble: Ensemble, weights: Mapping[str, float], histograms: Mapping[str, tuple[int, ...]]
) -> Callable[[Contribution], None]:
    """Let an ensemble hear contributions at their sites' weights, with histograms of earlier rounds."""

    def hear(one: Contribution) -> None:
        histogram_C = one.histogram_C or histograms.get(one.site, ())
        ensemble.hear(replace(one, weight=weights[one.site], histogram_C=histogram_C))

    return hear


def watched(state: State, record: Record, teacher: Teacher, config: RunConfig) -> State:
    """Note the teacher's log-loss on the public validation cases, and keep what the best one learned."""
    record.validation.append(teacher.validation_scores()["log_loss"])
    best = record.validation[-1] == min(record.validation)
    return replace(state, best_PC=state.taught_PC(config.aggregation)) if best else state


def require_sites(config: RunConfig, when: str, present: Sized, absent: Mapping[str, str]) -> None:
    """Stop the run, with every reason, where fewer than `min-sites` are there."""
    if len(present) < config.min_sites:
        reasons = "; ".join(f"{site}: {why}" for site, why in absent.items())
        raise UserError(
            f"{when}: {len(present)} sites took part, min-sites is {config.min_sites}. "
            f"Left out: {reasons or 'no site is connected'}"
        )
