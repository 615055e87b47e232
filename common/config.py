"""The run's configuration: one strict model of what a coordinator may ask for.

Flower hands an app a flat mapping of scalars (`{"privacy.epsilon": 1.0, ...}`), merged from the defaults in
`pyproject.toml` and the overrides of whoever submits the run, and it does not check their types.
`RunConfig` does, before anything starts: unknown keys, an int given as a string, ε ≤ 0 or a temperature of
0 are refused with the key, the value and what would be right.

What stands here is a *request*. A site's policy has the last word (`client.policy`).
"""

import re
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from common.errors import ConfigError, UserError
from common.strict import Strict

Scalar = str | int | float | bool
Layers = Literal["head", "last-block", "all"]
"""Which layers of a deep model learn; those below are a trunk that public cases have made."""

FeatureKind = Literal["none", "pca", "scattering", "words"]
"""What may stand frozen in front of a model; `scattering` is for images, `words` for texts."""

MOST_STEPS = 10_000
"""Rounds of a run, and private steps of a round, at most."""

Positive = Annotated[float, Field(gt=0, le=1e6)]
ClippingNorm = Annotated[float, Field(ge=1e-6, le=1e6)]  # float32 would round a denormal C up
Amount = Annotated[float, Field(ge=0, le=1e6)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Size = Annotated[int, Field(ge=0, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Epsilon = Annotated[float, Field(gt=0, le=1e3)]
Delta = Annotated[float, Field(gt=0, le=0.1)]  # a larger one promises next to nothing
SampleRate = Annotated[float, Field(ge=1e-5, le=1)]  # rarer steps have no price that a computer can tell
CAPS = re.compile(r"(\d{1,3}(\.\d{1,6})?(,\d{1,3}(\.\d{1,6})?)*)?")


def _caps(text: str) -> str:
    """Check numbers with commas between, since a run config holds no lists."""
    text = ",".join(cap.strip() for cap in text.split(","))
    if not CAPS.fullmatch(text) or any(float(cap) == 0 for cap in text.split(",") if cap):
        raise ValueError("numbers from 0.000001 to 999 with commas between, such as 0.3,1,3")
    return text


class Aggregation(Strict):
    """How the ensemble is formed and how far the server follows it."""

    rule: Literal[
        "auto",
        "mean",
        "class-weighted",
        "trimmed-mean",
        "median",
        "geometric-median",
        "outlier-weights",
        "stacking",
    ] = "auto"
    """`auto` is the method's own: `class-weighted` for `oneshot`, else `mean`."""
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """Share of all weight that `trimmed-mean` cuts at each end."""
    momentum: Fraction = 0.0
    """Server momentum over movements (`descent`)."""
    averaging: Fraction = 0.0
    """Decay of the average of z over the second half of the rounds (`descent`); 0 keeps the last z."""
    validated: bool = False
    """Let public validation cases choose: the weight decay of the teacher's start; of each step (`descent`)
    the whole, half, a quarter or nothing; at the end z or its average."""
    temperature: Positive = 1.0
    """Sharpening temperature of the aggregated soft labels (`oneshot`): below 1 sharpens."""


class Distillation(Strict):
    """Hinton's loss on the public cases: α·T²·KL(teacher ‖ model) + (1−α)·CE on those that are labelled."""

    temperature: Positive = 2.0
    """T: softens the soft labels that are sent and fitted."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of the soft labels against the hard ones."""
    epochs: Count = 50
    """Passes over the public cases in one fit (models that are not linear)."""
    learning_rate: Positive = 0.01
    """Of AdamW (models that are not linear)."""
    weight_decay: Amount = 1e-3
    """Of every fit to hard labels, and of AdamW."""


class Network(Distillation):
    """A model behind frozen public features, and how it distils."""

    model: str = "linear"
    """A name from the registry, or `module:Class`."""
    features: FeatureKind = "none"
    """Frozen public features in front of the model, fitted on the proxy only."""
    feature_size: Count = 128
    """Columns kept by the PCA that is fitted on the proxy."""

    @property
    def learned_layers(self) -> Layers:
        """Which layers of a deep model learn above a public trunk."""
        return "all"


class Teacher(Network):
    """The central model. With model `none`, z starts at zero and a twin of the student is taught."""

    layers: Layers = "all"
    """Which layers of a deep teacher learn above a public trunk."""

    @property
    def learned_layers(self) -> Layers:
        """Read `layers`."""
        return self.layers

    weight_decay: Amount = 0.05
    """Stronger than a student's: a teacher learns from few labels."""
    path: str = ""
    """A safetensors file to start from instead of training on the labelled public part."""


class Student(Network):
    """The model a site trains; a site's own policy may choose another."""

    features: FeatureKind = "pca"
    """Frozen public features in front of the model, fitted on the proxy only."""
    feature_size: Count = 16
    """Columns kept by the PCA that is fitted on the proxy: the fewer, the less noise a private step needs."""
    private_layers: Layers = "head"
    """Which layers of a deep model take private steps above a public trunk; a model without one learns
    whole."""

    @property
    def learned_layers(self) -> Layers:
        """Read `private_layers`."""
        return self.private_layers


class Privacy(Strict):
    """The budget of one run at one site, and the private steps it buys."""

    epsilon: Epsilon = 1.0
    """Target ε of the whole run at each site; σ is calibrated to it."""
    site_epsilons: Annotated[str, AfterValidator(_caps)] = ""
    """Caps on ε of a simulation's sites, in turn, such as `0.3,1,3`; empty: all give what is asked."""
    delta: Delta = 1e-5
    """Target δ of the whole run."""
    unit: Literal["record", "patient"] = "record"
    """What is protected; `patient` needs a patient column."""
    clipping_norm: ClippingNorm = 0.5
    """Largest 2-norm of one example's gradient."""
    sample_rate: SampleRate = 1.0
    """Poisson sampling rate of a private step; 1 takes every unit (full batch)."""
    steps_per_round: Steps = 1
    """Private steps that a student takes in one round."""
    step_size: Positive = 1.0
    """Learning rate of a private step."""
    histogram_share: Fraction = 0.05
    """Share of ε that buys the label histogram where the method wants one."""
    hold_out_share: Fraction = 0.0
    """Share of ε that buys, in the last round, each site's accuracy on patients it holds out; 0 buys none."""

    def most_epsilon(self, place: int) -> float:
        """What the site at a place (from 0) of a simulation gives at most to a run."""
        caps = [float(cap) for cap in self.site_epsilons.split(",") if cap]
        return min(self.epsilon, caps[place % len(caps)]) if caps else self.epsilon

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.histogram_share + self.hold_out_share >= 1:
            raise ValueError("shares of ε that leave something for the private steps")
        return self


class Data(Strict):
    """Which cases are public, and how a pooled table is dealt to sites. A size of 0 is the scenario's own."""

    alpha: Positive = 0.5
    """Dirichlet concentration of labels over sites: small is uneven."""
    num_sites: Size = 0
    """Sites that a pooled table is dealt to."""
    private_size: Size = 0
    """Private records in all."""
    proxy_size: Size = 0
    """Proxy cases."""
    proxy_labels: Annotated[int, Field(ge=-1)] = -1
    """How many proxy cases are labelled, 0 for none; -1 means what the scenario has."""
    validation_size: Size = 0
    """Public cases for choices."""
    test_size: Size = 0
    """Public cases for the report."""
    partition: Literal["natural", "iid", "dirichlet"] = "natural"
    """How records come to sites: as the scenario has them, or one pooled table dealt anew by the seed."""
    description: str = ""
    """Path of a `data.toml` (scenario `own`)."""
    factory: str = ""
    """`module:function` that returns a torch Dataset (scenario `own`)."""
    folder: str = ""
    """Where a scenario's files lie, if not in the place their package puts them (`fashion`)."""


class RunConfig(Strict):
    """Everything a coordinator may ask for in one run."""

    scenario: Literal["heart", "thyroid", "fashion", "reviews", "own"] = "heart"
    """Which data; a scenario's file sets all the rest as well."""
    method: Literal["descent", "oneshot", "fedmd"] = "descent"
    """How the ensemble moves the central state."""
    seed: Seed = 0
    """Public randomness only: splits, initial weights, order of cases; and everything in a simulation."""
    num_rounds: Steps = 20
    """Rounds of the run. A method with one round (`oneshot`) takes the private steps of all of them in it."""
    patience: Size = 0
    """Rounds without a better log-loss on public validation cases that end the run, and the best round is
    taken; the whole plan stays charged. 0 holds all rounds."""
    min_sites: Count = 1
    """Sites that must contribute to a round; with fewer, the run stops."""
    round_timeout: Positive = 600.0
    """Seconds the server waits for a round's answers."""
    proxy_cases: Size = 0
    """Proxy cases that the run speaks about, drawn by the seed; 0 takes them all."""
    proxy_subsets: Literal["fixed", "per-round"] = "fixed"
    """Whether every round speaks about the same `proxy-cases`, or others until all have had their turn."""
    codec: Literal["int8", "int4", "int2", "int1", "fp16", "fp32"] = "int8"
    """How logits leave a site: levels of so many bits, or floats (`common.codec`)."""
    students: Literal["same", "mixed"] = "same"
    """`mixed` gives every site of a simulation another architecture in turn."""
    out: str = "runs"
    """Folder for results; relative paths start where the server app runs."""
    run_id: Annotated[str, Field(max_length=100, pattern=r"^([A-Za-z0-9_][A-Za-z0-9._-]*)?$")] = ""
    """Name of the run: its folder under `out`, and the study at the sites. Empty takes scenario and
    number."""
    resumable: bool = False
    """Whether a run that breaks off goes on where it stopped when it is started again; it needs a
    `run-id`. Studies of `grandrounds federation` always do."""
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] = 0
    """Port of 127.0.0.1 on the server's machine where Prometheus finds the run's metrics; 0 serves none."""
    node_owners: str = ""
    """File that says which node is which site's; studies of `grandrounds federation` always name theirs.
    Without one, sites are believed."""
    aggregation: Aggregation = Aggregation()
    teacher: Teacher = Teacher()
    student: Student = Student()
    privacy: Privacy = Privacy()
    data: Data = Data()

    @classmethod
    def from_run_config(cls, flat: Mapping[str, Scalar], where: str = "run config") -> "RunConfig":
        """Validate Flower's flat run config.

        Args:
            flat: Dotted kebab-case keys and scalar values.
            where: What the values came from, for messages.

        Raises:
            ConfigError: naming the first refused key, its value, and what would be right.
        """
        try:
            return cls.model_validate(nested(flat), by_alias=True, by_name=False)
        except ValidationError as error:
            raise first_complaint(error, where, cls().flat()) from None

    def changed(self, changes: Mapping[str, Scalar], where: str = "run config") -> "RunConfig":
        """Return the same run with some keys changed, checked as any other.

        Args:
            changes: Dotted kebab-case keys and scalar values.
            where: What the changes came from, for messages.

        Raises:
            ConfigError: naming the first refused key, its value, and what would be right.
        """
        return RunConfig.from_run_config({**self.flat(), **changes}, where)

    @property
    def schedule(self) -> tuple[int, int]:
        """Rounds that are held, and private steps in each of them."""
        steps = self.privacy.steps_per_round
        return (1, self.num_rounds * steps) if self.method == "oneshot" else (self.num_rounds, steps)

    def flat(self) -> dict[str, Scalar]:
        """Return the dotted kebab-case keys that Flower's `--run-config` takes."""
        return _flatten(self.model_dump(by_alias=True))


def nested(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """Unfold dotted keys: `{"a.b": 1}` becomes `{"a": {"b": 1}}`.

    Raises:
        UserError: if a key is a value here and a section there.
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        branch = tree
        for section in sections:
            branch = branch.setdefault(section, {})
            if not isinstance(branch, dict):
                raise UserError(f"run config: {key} = {value!r} is refused: {section!r} is no section")
        if leaf in branch:
            raise UserError(f"run config: {key} = {value!r} is refused: {leaf!r} is a section")
        branch[leaf] = value
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def first_complaint(error: ValidationError, where: str, known: Collection[str] = ()) -> UserError:
    """Turn pydantic's first complaint into one line in the user's terms.

    Args:
        error: What pydantic says.
        where: What was being read.
        known: Keys that there are, to guess what an unknown one was meant to be.
    """
    first, *others = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        strange = {
            ".".join(map(str, one["loc"])): one["input"]
            for one in others
            if one["type"] == "extra_forbidden" and one["loc"][:-1] == first["loc"][:-1]
        }
        for misspelt in get_close_matches(key, strange, n=1):
            return ConfigError(where, misspelt, strange[misspelt], f"a key that exists; did you mean {key}?")
        return UserError(f"{where}: {key} is missing")
    if first["type"] == "union_tag_invalid":
        tag, context = str(first["ctx"]["tag"]), first["ctx"]
        name = context["discriminator"].strip("'")
        return ConfigError(where, f"{key}.{name}", tag, f"one of {context['expected_tags']}")
    if first["type"] == "too_short":
        return ConfigError(where, key, first["input"], f"at least {first['ctx']['min_length']}")
    expected = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    expected = expected.removeprefix("Input should be ")
    if first["type"].startswith(("greater_than", "less_than")):
        expected = f"a number {expected}"
    if near := get_close_matches(key, known, n=1) if first["type"] == "extra_forbidden" else []:
        expected += f"; did you mean {near[0]}?"
    return ConfigError(where, key, first["input"], expected)


_EXPECTED = {
    "extra_forbidden": "a key that exists",
    "model_type": "a section with keys of its own",
    "dict_type": "a section with keys of its own",
    "tuple_type": "a list in [brackets]",
    "list_type": "a list in [brackets]",
    "string_pattern_mismatch": "a name of letters, digits, '.', '_' and '-'",
    "string_too_long": "a shorter name",
}
"""What would be right, where pydantic's own words would not be understood."""
