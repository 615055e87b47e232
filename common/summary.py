"""What a run came to, as other programs read it: `summary.json`, schema 1.

A summary is the one record that outlives a run: the command line prints it, the report is drawn from it,
sweeps and benchmarks compare it. So it is a contract. Its fields keep their meaning within a schema number,
unknown fields are refused on reading, and what could not be computed is `null` rather than missing.
`docs/summary-schema.md` says what each field means.

Scores are fractions between 0 and 1; only the report shows them times 100. A statistic keeps its values,
one per seed in the order of `seeds`, so that contenders can be compared on the same splits, pair by pair.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from common.config import Scalar
from common.errors import UserError
from common.runs import write_whole

SCHEMA: Final = 1

Score = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Part(BaseModel):
    """A part of a file that other programs read."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
    )


class Statistic(Part):
    """A score over the seeds."""

    mean: Score
    std: Amount
    """Sample standard deviation (n - 1 in the denominator); 0 with a single seed."""
    values: Annotated[tuple[Score, ...], Field(min_length=1)]
    """One per seed, in the order of `Summary.seeds`."""


Metrics = dict[str, Statistic]
"""Statistics by metric: `auroc`, `accuracy`, …"""


class Results(Part):
    """Every contender on the same public test cases; `None` where it was not or cannot be computed."""

    teacher_alone: Metrics | None = None
    """The central model before the first round."""
    public_only: Metrics | None = None
    """The best that the labelled public part alone gives."""
    public_only_if_labelled: Metrics | None = None
    """The best that public data alone would give, had every proxy case been labelled."""
    sites_alone: Metrics | None = None
    """Each site by itself under the same ε, averaged over the sites."""
    sites_alone_each: dict[str, Metrics] | None = None
    """The same, site by site."""
    federation: Annotated[Metrics, Field(min_length=1)]
    """The central model in the end: after the last round, or what `patience` or `validated` chose."""
    student: Metrics | None = None
    """The student that is sent back to the sites."""
    pooled_dp: Metrics | None = None
    """One trusted party with all records, same ε, same start."""
    pooled_no_privacy: Metrics | None = None
    """One trusted party with all records and no privacy."""


class SitePrivacy(Part):
    """What one site's patients paid. An ε means nothing without the rest of the line."""

    site: str
    epsilon: Amount
    delta: Annotated[float, Field(ge=0, lt=1)]
    unit: Literal["record", "patient"]
    adjacency: Literal["add-remove"]
    accountant: str
    horizon: Literal["run", "lifetime"] = "run"
    noise_multiplier: Amount | None = None
    """Standard deviation of the noise in units of the clipping norm."""
    clipping_norm: Amount | None = None


class Bytes(Part):
    """Sizes of messages, over sites and rounds."""

    mean: Amount
    max: Count


class PublicSizes(Part):
    """How many cases everybody may see, and whether that is a fact or an assumption of the scenario."""

    proxy: Count
    proxy_labelled: Count
    validation: Count
    test: Count
    by_assumption: bool = True
    """True where the public cases are a part of the same patients that a scenario takes to be public."""


class LeftOut(Part):
    """A site whose contribution a round did without."""

    site: str
    reason: str


class Round(Part):
    """One round of one seed."""

    seed: Count
    round: Count
    """1 for the first; 0 may stand for the state before it."""
    metrics: dict[str, Score] = {}
    """The central model's scores after the round, on the public test cases."""
    epsilon_spent: Amount | None = None
    """The greatest ε that any site had spent by the end of the round."""
    hold_out_accuracy: dict[str, Score] = {}
    """Noisy accuracy of each site's student on patients it held out, in the round that bought it."""
    answered: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    bytes_up: Bytes | None = None
    """Encoded payloads of the sites that answered."""


class Summary(Part):
    """What a run, or several that differ only in their seed, came to."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = SCHEMA
    scenario: str
    seeds: Annotated[tuple[Count, ...], Field(min_length=1)]
    results: Results
    privacy: tuple[SitePrivacy, ...]
    bytes_up_per_site_per_round: Bytes
    wire_bytes_up_per_site_per_round: Bytes | None = None
    rounds: Count
    """Rounds that every seed finished."""
    rounds_planned: Count | None = None
    """Rounds of the plan, which is what the privacy loss is of."""
    seconds: Amount
    """Time taken, summed over seeds."""
    peak_memory_mib: Amount

    method: str | None = None
    backend: Literal["inprocess", "ray", "deployment"] | None = None
    run_id: str | None = None
    finished: AwareDatetime | None = None
    status: Literal["complete", "incomplete"] = "complete"
    incomplete_because: str | None = None
    headline_metric: str = "auroc"
    """The metric that the verdict is about; the federation must have it."""
    classes: tuple[str, ...] = ()
    public: PublicSizes | None = None
    declared_sizes: dict[str, Count] = {}
    """Each site's declared public size, never its true number of cases."""
    proxy_digests: tuple[str, ...] = ()
    """SHA-256 of the proxy, in hexadecimal, one per seed."""
    run_config: dict[str, Scalar] = {}
    history: tuple[Round, ...] = ()
    versions: dict[str, str] = {}

    @model_validator(mode="after")
    def _hangs_together(self) -> "Summary":
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds occur twice: {list(self.seeds)}")
        for name, metrics in contenders(self.results):
            for metric, score in metrics.items():
                if (values := len(score.values)) != len(self.seeds):
                    raise ValueError(f"{name}.{metric}: {values} values for {len(self.seeds)} seeds")
        if self.headline_metric not in self.results.federation:
            raise ValueError(f"the federation has no {self.headline_metric!r}, which is to be the headline")
        return self

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site that was expected, whether or not it ever answered."""
        named = [*self.declared_sizes, *(line.site for line in self.privacy)]
        named += [left.site for row in self.history for left in row.left_out]
        return tuple(dict.fromkeys(named))

    @property
    def simulated(self) -> bool | None:
        """Whether all sites were one machine's pretence; None where the server could not know."""
        return None if self.backend is None else self.backend != "deployment"


def statistic(values: Iterable[float]) -> Statistic:
    """Return mean, sample standard deviation (n - 1; 0 for a single value) and the values themselves.

    Raises:
        ValueError: for no values, or one that is not a fraction between 0 and 1.
    """
    scores = tuple(float(value) for value in values)
    if not scores:
        raise ValueError("a statistic needs at least one value")
    # Rounding must not carry the mean past the values (0.1 three times sums to more than 0.3).
    mean = min(max(math.fsum(scores) / len(scores), min(scores)), max(scores))
    spread = math.fsum((score - mean) ** 2 for score in scores) / max(len(scores) - 1, 1)
    return Statistic(mean=mean, std=math.sqrt(spread), values=scores)


def contenders(results: Results) -> list[tuple[str, Metrics]]:
    """List what was computed: every contender's key and metrics, single sites as `sites_alone_each.NAME`."""
    found: list[tuple[str, Metrics]] = []
    for key in Results.model_fields:
        value = getattr(results, key)
        if key == "sites_alone_each":
            found += [(f"{key}.{site}", metrics) for site, metrics in (value or {}).items()]
        elif value is not None:
            found.append((key, value))
    return found


def merge(summaries: Sequence[Summary]) -> Summary:
    """Make one summary of several that differ only in their seeds.

    Statistics are taken over all seeds in the order given. Each seed of a simulation has a ledger of its own,
    so a site's ε is the largest of its ε and not their sum. Seconds add up, memory is the peak, bytes are
    averaged over seeds. Sizes that vary with the split are averaged and rounded.

    Raises:
        UserError: if the summaries are not of one and the same experiment, or share a seed.
    """
    if not summaries:
        raise UserError("there is no summary to merge")
    if len(summaries) == 1:
        return summaries[0]
    _refuse_different_experiments(summaries)
    first = summaries[0]
    incomplete = [summary for summary in summaries if summary.status == "incomplete"]
    return Summary(
        scenario=first.scenario,
        seeds=tuple(seed for summary in summaries for seed in summary.seeds),
        results=_merged_results(summaries),
        privacy=_costliest(summaries),
        bytes_up_per_site_per_round=_mean_bytes(
            [(s.bytes_up_per_site_per_round, len(s.seeds)) for s in summaries]
        ),
        wire_bytes_up_per_site_per_round=_mean_wire_bytes(summaries),
        rounds=min(summary.rounds for summary in summaries),
        rounds_planned=first.rounds_planned,
        seconds=math.fsum(summary.seconds for summary in summaries),
        peak_memory_mib=max(summary.peak_memory_mib for summary in summaries),
        method=first.method,
        backend=first.backend,
        run_id=_common(summary.run_id for summary in summaries),
        finished=max((summary.finished for summary in summaries if summary.finished), default=None),
        status="incomplete" if incomplete else "complete",
        incomplete_because=next((summary.incomplete_because for summary in incomplete), None),
        headline_metric=first.headline_metric,
        classes=first.classes,
        public=_mean_public(summaries),
        declared_sizes=_mean_sizes([summary.declared_sizes for summary in summaries]),
        proxy_digests=tuple(digest for summary in summaries for digest in summary.proxy_digests),
        run_config=_experiment(first),
        history=tuple(row for summary in summaries for row in summary.history),
        versions=first.versions,
    )


def to_json(summary: Summary) -> str:
    """Return the summary as JSON text with a final newline, `null` for what is not there."""
    return summary.model_dump_json(indent=1) + "\n"


def write(summary: Summary, path: Path) -> None:
    """Write the summary whole or not at all.

    Raises:
        UserError: if the place can't be written.
    """
    write_whole(path, to_json(summary).encode())


def read(path: Path) -> Summary:
    """Read a summary.

    Raises:
        UserError: if there is no such file, or it is not a summary of this schema.
    """
    try:
        return Summary.model_validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}") from None
    except ValidationError as error:
        worst = error.errors(include_url=False)[0]
        if worst["loc"] == ("schema",):
            found = f"{path} has schema {worst['input']!r}"
            raise UserError(f"{found}; this version reads schema {SCHEMA}") from None
        where = "".join(f"{part}: " for part in worst["loc"])
        raise UserError(f"{path} is not a summary: {where}{worst['msg']}") from None


# What may differ between the run configs of one experiment.
_PER_SEED = ("seed", "out", "run-id")


def _experiment(summary: Summary) -> dict[str, Scalar]:
    return {key: value for key, value in summary.run_config.items() if key not in _PER_SEED}


def _aspects(summary: Summary) -> dict[str, object]:
    """What makes two runs the same experiment, by names that a message can use."""
    return {
        "scenario": summary.scenario,
        "method": summary.method,
        "backend": summary.backend,
        "headline metric": summary.headline_metric,
        "classes": summary.classes,
        **{f"run config {key}": value for key, value in _experiment(summary).items()},
        **{f"metrics of {name}": sorted(metrics) for name, metrics in contenders(summary.results)},
    }


def _refuse_different_experiments(summaries: Sequence[Summary]) -> None:
    ours, *others = map(_aspects, summaries)
    for theirs in others:
        for name in [*ours, *theirs]:
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"these runs are different experiments: {name} is {ours.get(name)!r} in one "
                    f"and {theirs.get(name)!r} in another"
                )
    seeds = [seed for summary in summaries for seed in summary.seeds]
    if len(set(seeds)) != len(seeds):
        raise UserError(f"these runs share a seed: {seeds}")


def _merged_results(summaries: Sequence[Summary]) -> Results:
    by_name = [dict(contenders(summary.results)) for summary in summaries]
    merged = {
        name: {
            metric: statistic(value for one in by_name for value in one[name][metric].values)
            for metric in metrics
        }
        for name, metrics in by_name[0].items()
    }
    each = summaries[0].results.sites_alone_each
    single = None if each is None else {site: merged.pop(f"sites_alone_each.{site}") for site in each}
    return Results.model_validate({**merged, "sites_alone_each": single})


def _costliest(summaries: Sequence[Summary]) -> tuple[SitePrivacy, ...]:
    costliest: dict[str, SitePrivacy] = {}
    for line in (line for summary in summaries for line in summary.privacy):
        known = costliest.setdefault(line.site, line)
        if _terms(line) != _terms(known):
            raise UserError(f"ε of {line.site} can't be compared: {_terms(known)} and {_terms(line)}")
        if line.epsilon > known.epsilon:
            costliest[line.site] = line
    return tuple(costliest.values())


def _terms(line: SitePrivacy) -> tuple[float, str, str, str, str]:
    return line.delta, line.unit, line.adjacency, line.accountant, line.horizon


def _mean_bytes(sizes: Sequence[tuple[Bytes, int]]) -> Bytes:
    """Average over seeds; each entry stands for as many seeds as its number says."""
    total = math.fsum(size.mean * seeds for size, seeds in sizes)
    return Bytes(mean=total / sum(seeds for _, seeds in sizes), max=max(size.max for size, _ in sizes))


def _mean_wire_bytes(summaries: Sequence[Summary]) -> Bytes | None:
    counted = [
        (size, len(summary.seeds))
        for summary in summaries
        if (size := summary.wire_bytes_up_per_site_per_round) is not None
    ]
    return _mean_bytes(counted) if len(counted) == len(summaries) else None


def _mean_sizes(several: Sequence[dict[str, int]]) -> dict[str, int]:
    keys = dict.fromkeys(key for sizes in several for key in sizes)
    return {
        key: round(math.fsum(found) / len(found))
        for key in keys
        if (found := [sizes[key] for sizes in several if key in sizes])
    }


def _mean_public(summaries: Sequence[Summary]) -> PublicSizes | None:
    several = [summary.public for summary in summaries if summary.public is not None]
    if not several:
        return None
    sizes = _mean_sizes([public.model_dump(exclude={"by_assumption"}) for public in several])
    return PublicSizes(**sizes, by_assumption=any(public.by_assumption for public in several))


def _common(values: Iterable[str | None]) -> str | None:
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None
