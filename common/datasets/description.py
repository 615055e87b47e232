"""The description of a user's own data, `data.toml`: what run configuration can't hold.

A coordinator's description says what is public and which sites there are; a hospital's says where its own
file lies; a simulation's says both. `common.datasets.own` has an example. The model is strict: an unknown
key, a number given as text, or two ways of saying the same thing are refused with file, key, value and what
would be right.
"""

import json
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from common.config import first_complaint
from common.errors import ConfigError, UserError
from common.preprocessing import FeatureSpec, Name, NumericSpec, PixelsSpec, Text
from common.strict import Strict

Count = Annotated[int, Field(ge=1)]
SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class SiteFile(Strict):
    """What is public about a site, and, for whoever may open it, its file."""

    declared_size: Count
    """Denominator and weight of the site; a round number, not the count of its records."""
    file: str = ""
    label: str = ""
    """What the pooled file's site column calls this site, if not by its name."""


class PooledFile(Strict):
    """One file that holds all sites' records: in simulations."""

    file: str
    site_column: str = ""
    """The column that names each record's site; without one, records are dealt by `data.partition`."""
    declared_size: Count = 100
    """What each site declares where records are dealt and the public part comes in files of its own."""


class PublicFiles(Strict):
    """The public part as files of its own."""

    proxy: str
    """Its target may be missing, wholly or in part."""
    test: str
    validation: str = ""
    """Left out, a fifth of the test file (drawn by the seed) serves for choices and isn't tested on."""


class PublicSample(Strict):
    """The public part as a random part of the sites' files, drawn by the seed: in simulations."""

    proxy_size: Count
    proxy_labels: Count
    validation_size: Count
    test_size: Count


class Group(Strict):
    """A column by which results are broken down; it needn't be a feature."""

    edges: tuple[float, ...] = ()
    """Rising edges of bands, for a column of numbers."""


class Description(Strict):
    """A whole `data.toml`."""

    target: Name
    classes: Annotated[tuple[Name, ...], Field(min_length=2)]
    """All labels, as text, in the order of the logits."""
    features: Annotated[tuple[FeatureSpec, ...], Field(min_length=1)]
    patient: str = ""
    """The column that says which records are of the same patient."""
    missing: tuple[str, ...] = ("", "NA", "NaN", "nan", "?")
    """How a missing value is written."""
    groups: dict[Name, Group] = Field(default_factory=dict)
    sites: dict[SiteName, SiteFile] = Field(default_factory=dict)
    pooled: PooledFile | None = None
    public_files: PublicFiles | None = None
    public_sample: PublicSample | None = None


def read_description(path: Path) -> Description:
    """Read and check a description.

    Raises:
        UserError: naming the file, and the key and value that are refused.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} isn't TOML: {error}") from None
    try:
        # By way of JSON, since strict pydantic takes JSON's arrays for tuples but not Python's lists.
        text = json.dumps(tree, default=str)
        description = Description.model_validate_json(text, by_alias=True, by_name=False)
    except ValidationError as error:
        raise _refusal(error, str(path)) from None
    for wrong, key, value, expected in _contradictions(description):
        if wrong:
            raise ConfigError(str(path), key, value, expected)
    return description


def require_site(path: Path, description: Description, site: str) -> None:
    """Hold a description against a site's name.

    Raises:
        UserError: if it has no section for the site.
    """
    if site not in description.sites:
        raise UserError(f"{path}: there is no [sites.{site}]; there are {', '.join(description.sites)}")


def _refusal(error: ValidationError, where: str) -> UserError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return ConfigError(where, key, first["input"], "no such key (docs/own-data.md lists them)")
    return first_complaint(error, where)


def _contradictions(description: Description) -> list[tuple[bool, str, object, str]]:
    """Return what keys could get wrong together: is it so, key, value, what would be right."""
    names, pooled = [feature.name for feature in description.features], description.pooled
    site_files = [site.file for site in description.sites.values() if site.file]
    whole = [feature.kind for feature in description.features if isinstance(feature, PixelsSpec | Text)]
    dealt = pooled is not None and not pooled.site_column
    sections = [
        name for name in ("public-files", "public-sample") if getattr(description, name.replace("-", "_"))
    ]
    numbers = [feature for feature in description.features if isinstance(feature, NumericSpec)]
    bounds = {
        feature.name: (feature.low, feature.high)
        for feature in numbers
        if feature.low is not None and feature.high is not None and feature.low >= feature.high
    }
    falling = {
        name: group.edges
        for name, group in description.groups.items()
        if any(edge >= following for edge, following in pairwise(group.edges))
    }
    return [
        (bool(bounds), f"low and high of {', '.join(bounds)}", [*bounds.values()], "low below high"),
        (bool(falling), f"groups.{next(iter(falling), '')}.edges", [*falling.values()], "numbers that rise"),
        (len(set(names)) < len(names), "features", names, "names that differ"),
        (
            len(set(description.classes)) < len(description.classes),
            "classes",
            description.classes,
            "labels that differ",
        ),
        (bool(whole) and len(names) > 1, "features", names, f"{''.join(whole[:1])} as the only feature"),
        (description.target in names, "target", description.target, "a column that isn't a feature"),
        (description.patient in names, "patient", description.patient, "a column that isn't a feature"),
        (len(sections) > 1, "sections", sections, "one of them"),
        (pooled is not None and bool(site_files), "sites.*.file", site_files, "none beside [pooled]"),
        (not description.sites and not dealt, "sites", {}, "a [sites.NAME] section for each site"),
    ]
