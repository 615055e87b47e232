"""What a comparison came to, as other programs read it: `compare.json`, schema 1.

`docs/compare-schema.md` says what each field means. Scores are fractions between 0 and 1; statistics keep
their values, one per seed in the order of `seeds`, so that methods can be held against each other pair by
pair, on the same splits.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, Field, ValidationError

from common.config import Scalar
from common.errors import UserError
from common.runs import write_whole
from common.summary import Amount, Count, Metrics, Part, Statistic

SCHEMA: Final = 1

Epsilon = Annotated[float, Field(gt=0)]


class Cell(Part):
    """One method with one seed, at one ε or at none."""

    method: str
    epsilon: Epsilon | None
    seed: Count


class Question(Part):
    """What is compared; whoever asks the same may go on where another stopped."""

    scenario: str
    run_config: dict[str, Scalar]
    """The run that is compared, without seed, ε, and where its results go."""
    epsilons: tuple[Epsilon, ...]
    seeds: tuple[Count, ...]
    methods: tuple[str, ...]
    settings: dict[str, list[dict[str, Scalar]]]
    """By method, what it changes in the run config: one entry per ε."""

    def digest(self) -> str:
        """Name the question, in hexadecimal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Paid(Part):
    """What each site's units paid at most. An ε means nothing without the rest."""

    epsilon: Amount
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: Literal["record", "patient"]
    adjacency: Literal["add-remove"]
    accountant: str
    horizon: Literal["run", "lifetime"]


class Answer(Part):
    """What one cell came to."""

    cell: Cell
    scores: dict[str, float] | None
    """None where the run has nothing that the method could learn from."""
    paid: Paid | None
    rounds: Count
    bytes_up: Amount
    """What a site sends in a round."""
    bytes_down: Amount
    """What a site gets in a round."""
    seconds: Amount


class Row(Part):
    """One method at one ε, over all seeds."""

    method: str
    label: str
    kind: Literal["public", "sites", "baseline", "federation", "pooled"]
    paper: str
    epsilon: Epsilon | None
    """None for what doesn't depend on ε."""
    settings: dict[str, Scalar]
    """What the method changes in the run config."""
    metrics: Metrics
    paid: Paid | None
    """Of the costliest seed."""
    rounds: Count
    bytes_up_per_round: Amount
    bytes_down_per_round: Amount
    bytes_up: Amount
    """What a site sends in all rounds."""
    bytes_down: Amount
    seconds: Amount
    """Mean over seeds."""

    def headline(self, metric: str) -> Statistic:
        """The score that tables and pictures are about."""
        return self.metrics[metric]


class Comparison(Part):
    """All rows, and what was asked."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    question: Question
    headline_metric: str
    rows: tuple[Row, ...]
    not_computable: tuple[str, ...]
    """Methods that this run has nothing for, such as public labels."""
    finished: AwareDatetime
    versions: dict[str, str]

    def of(self, method: str) -> Iterator[Row]:
        """A method's rows, by ε."""
        return (row for row in self.rows if row.method == method)


def write(part: Part, path: Path) -> None:
    """Write a part whole or not at all.

    Raises:
        UserError: if the place can't be written.
    """
    write_whole(path, (part.model_dump_json(indent=1) + "\n").encode())


def read(path: Path) -> Comparison:
    """Read a comparison.

    Raises:
        UserError: if there is no such file, or it is not a comparison of this schema.
    """
    try:
        return Comparison.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except ValidationError as error:
        worst = error.errors(include_url=False)[0]
        where = "".join(f"{part}: " for part in worst["loc"])
        raise UserError(f"{path} is not a comparison of schema {SCHEMA}: {where}{worst['msg']}") from None
