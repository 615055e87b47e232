"""`grandrounds compare`: the federation and everything it must be held against, for each ε and seed.

The work is a grid of cells (method, ε, seed). A finished cell is a file in the working folder, written whole
or not at all, so that whoever asks the same question again goes on where the last one stopped. Seeds come
outermost: one seed's cases are read, and their features computed, once for all methods and ε.

The folder gets its name only when all cells are there: `compare.json`, `compare.html` and the cells.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from common.config import RunConfig, Scalar
from common.datasets import load_public
from common.errors import ConfigError, UserError
from common.metrics import headline_metric
from common.runs import RunFolder, disk_errors
from common.summary import Metrics, statistic
from server.results import PACKAGES, REPORTED
from simulations.baselines.bench import Bench, Outcome
from simulations.baselines.registry import METHODS, configured, settings_of
from simulations.compare_page import render
from simulations.comparison import Answer, Cell, Comparison, Paid, Question, Row, read, write
from simulations.simulate import check

QUESTION, RESULT, PAGE, CELLS = "question.json", "compare.json", "compare.html", "cells"
_ELSEWHERE = ("seed", "out", "run-id", "privacy.epsilon")
"""Keys that the question holds elsewhere, or that don't matter to it."""

OnCell = Callable[[Cell, int, int], None]
"""Called before each cell with how many are done, and how many there are."""


def ask(
    config: RunConfig, epsilons: Sequence[float], seeds: Sequence[int], methods: Sequence[str]
) -> Question:
    """Put a question together.

    Raises:
        UserError: if a method is unknown, something occurs twice, or a setting is refused.
    """
    for option, values in (("--epsilons", epsilons), ("--seeds", seeds), ("--methods", methods)):
        if len(set(values)) != len(values):
            raise UserError(f"{option} {','.join(map(str, values))}: one of them occurs twice")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UserError(f"--methods {unknown[0]!r} is refused: expected some of {', '.join(METHODS)}")
    if config.privacy.site_epsilons:
        expected = "no caps: a comparison holds every site to one ε under every method"
        raise ConfigError("run config", "privacy.site-epsilons", config.privacy.site_epsilons, expected)
    flat = config.flat()
    at = [
        RunConfig.from_run_config({**flat, "privacy.epsilon": epsilon}, "--epsilons") for epsilon in epsilons
    ]
    return Question(
        scenario=config.scenario,
        run_config={key: value for key, value in flat.items() if key not in _ELSEWHERE},
        epsilons=tuple(epsilons),
        seeds=tuple(seeds),
        methods=tuple(name for name in METHODS if name in methods),
        settings={name: [settings_of(name, one) for one in at] for name in METHODS if name in methods},
    )


def cells_of(question: Question) -> list[Cell]:
    """Every cell, in the order of the work; what doesn't depend on ε has one a seed."""
    return [
        Cell(method=name, epsilon=epsilon, seed=seed)
        for seed in question.seeds
        for epsilon in (None, *question.epsilons)
        for name in question.methods
        if METHODS[name].private == (epsilon is not None)
    ]


def compare(config: RunConfig, question: Question, final: Path, on_cell: OnCell) -> Comparison:
    """Answer a question, or what of it isn't answered yet, and write the folder of results.

    Args:
        config: The run that is compared.
        question: What is asked about it (`ask`).
        final: The folder of results.
        on_cell: Progress.

    Raises:
        UserError: if anything is refused or fails; finished cells stay for the next time.
    """
    if (final / RESULT).exists():
        whole = read(final / RESULT)
        _same(question, whole.question, final)
        return whole
    check(config, question.seeds)
    with RunFolder.open(final, resumes=True) as folder:
        _hold(question, folder)
        answers = _answers(config, question, folder.path / CELLS, on_cell)
        comparison = _sum_up(config, question, answers)
        with disk_errors(final / PAGE):
            (folder.path / PAGE).write_text(render(comparison), encoding="utf-8")
        write(comparison, folder.path / RESULT)
    return comparison


def _hold(question: Question, folder: RunFolder) -> None:
    """Write the question into a fresh folder, or refuse one that holds another."""
    path = folder.path / QUESTION
    try:
        found = Question.model_validate_json(path.read_bytes(), strict=True)
    except FileNotFoundError:
        folder.clear()
        write(question, path)
    except ValidationError:
        raise UserError(f"{path} is not a question of this version: remove {folder.path}") from None
    else:
        _same(question, found, folder.path)
    with disk_errors(folder.path / CELLS):
        (folder.path / CELLS).mkdir(exist_ok=True)


def _same(asked: Question, found: Question, folder: Path) -> None:
    if asked == found:
        return
    ours, theirs = _aspects(asked), _aspects(found)
    what = next(name for name in [*ours, *theirs] if ours.get(name) != theirs.get(name))
    raise UserError(
        f"{folder} holds another comparison ({what} is {theirs.get(what)} there and {ours.get(what)} here): "
        "choose another place with --out, or remove it"
    )


def _aspects(question: Question) -> dict[str, object]:
    """What makes two questions the same, by names that a message can use."""
    return {
        "scenario": question.scenario,
        "--epsilons": question.epsilons,
        "--seeds": question.seeds,
        "--methods": question.methods,
        **question.run_config,
        **{f"settings of {name}": settings for name, settings in question.settings.items()},
    }


def _answers(config: RunConfig, question: Question, folder: Path, on_cell: OnCell) -> list[Answer]:
    cells, benches, answers = cells_of(question), dict[int, Bench](), list[Answer]()
    for done, cell in enumerate(cells):
        on_cell(cell, done, len(cells))
        path = folder / f"{cell.method}-{cell.epsilon or 'any'}-{cell.seed}.json"
        if (kept := _kept(path)) is not None:
            answers.append(kept)
            continue
        if cell.seed not in benches:
            benches = {cell.seed: Bench.open(_at(config, cell))}
        answers.append(_answer(config, cell, benches[cell.seed]))
        write(answers[-1], path)
    return answers


def _kept(path: Path) -> Answer | None:
    """A cell that was finished before; one that can't be read is worked out again."""
    try:
        return Answer.model_validate_json(path.read_bytes(), strict=True)
    except (FileNotFoundError, ValidationError):
        return None


def _at(config: RunConfig, cell: Cell) -> RunConfig:
    """The run config of a cell, before its method's own settings."""
    epsilon = cell.epsilon or config.privacy.epsilon
    privacy = config.privacy.model_copy(update={"epsilon": epsilon})
    return config.model_copy(update={"seed": cell.seed, "privacy": privacy})


def _answer(config: RunConfig, cell: Cell, bench: Bench) -> Answer:
    started = time.monotonic()
    outcome = METHODS[cell.method].run(configured(cell.method, _at(config, cell)), bench)
    found = outcome or Outcome({})
    return Answer(
        cell=cell,
        scores=_reported(outcome.scores) if outcome else None,
        paid=Paid.model_validate(vars(found.guarantee)) if found.guarantee else None,
        rounds=found.rounds,
        bytes_up=found.bytes_up,
        bytes_down=found.bytes_down,
        seconds=time.monotonic() - started,
    )


def _reported(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: scores[name] for name in REPORTED if name in scores}


def _sum_up(config: RunConfig, question: Question, answers: Sequence[Answer]) -> Comparison:
    rows: list[Row] = []
    nothing: list[str] = []
    for name in question.methods:
        for place, epsilon in enumerate(question.epsilons if METHODS[name].private else (None,)):
            some = [one for one in answers if (one.cell.method, one.cell.epsilon) == (name, epsilon)]
            if any(one.scores is None for one in some):
                nothing.append(name)
            else:
                rows.append(_row(name, question.settings[name][place], some))
    classes = load_public(config.model_copy(update={"seed": question.seeds[0]})).proxy.preprocessing.classes
    return Comparison(
        question=question,
        headline_metric=headline_metric(classes),
        rows=tuple(rows),
        not_computable=tuple(dict.fromkeys(nothing)),
        finished=datetime.now(UTC),
        versions={name: version(name) for name in PACKAGES},
    )


def _row(name: str, settings: dict[str, Scalar], answers: Sequence[Answer]) -> Row:
    """One method at one ε; answers come in the order of seeds."""
    method, first = METHODS[name], answers[0]
    up, down = (
        sum(sizes) / len(answers)
        for sizes in ([one.bytes_up for one in answers], [one.bytes_down for one in answers])
    )
    rounds = max(one.rounds for one in answers)
    return Row(
        method=name,
        label=method.label,
        kind=method.kind,
        paper=method.paper,
        epsilon=first.cell.epsilon,
        settings=settings,
        metrics=_statistics([one.scores or {} for one in answers]),
        paid=max((one.paid for one in answers if one.paid), key=lambda paid: paid.epsilon, default=None),
        rounds=rounds,
        bytes_up_per_round=up,
        bytes_down_per_round=down,
        bytes_up=up * rounds,
        bytes_down=down * rounds,
        seconds=sum(one.seconds for one in answers) / len(answers),
    )


def _statistics(scores: Sequence[dict[str, float]]) -> Metrics:
    names = [name for name in scores[0] if all(name in one for one in scores)]
    return {name: statistic(one[name] for one in scores) for name in names}
