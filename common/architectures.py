"""Which student (or teacher) a party uses: a model's name behind a kind of frozen public features.

A site decides on its own; `MIXED` is what simulations deal out when `students = "mixed"`, one architecture
a site in turn.
"""

from dataclasses import dataclass

from common.config import Layers, Network
from common.texts import is_text


@dataclass(frozen=True)
class Architecture:
    """A model behind frozen public features.

    Attributes:
        model: A name from the registry, or `module:Class`.
        features: Kind of frozen public features (`common.features`).
        feature_size: Columns kept by the PCA that is fitted on the proxy.
        layers: Which layers of a deep model learn above a public trunk.
    """

    model: str
    features: str = "none"
    feature_size: int = 128
    layers: Layers = "head"


MIXED: dict[str, tuple[Architecture, ...]] = {
    "table": (
        Architecture("linear"),
        Architecture("mlp"),
        Architecture("linear", "pca", 12),
    ),
    "image": (
        Architecture("linear", "scattering", 128),
        Architecture("cnn", "none", 128),
        Architecture("mlp", "scattering", 128),
        Architecture("linear", "scattering", 64),
        Architecture("linear", "scattering", 192),
    ),
    "text": (
        Architecture("linear", "words", 128),
        Architecture("text"),
        Architecture("mlp", "words", 128),
        Architecture("linear", "words", 192),
    ),
}


def architecture_of(settings: Network) -> Architecture:
    """Read an architecture out of the run's settings."""
    return Architecture(settings.model, settings.features, settings.feature_size, settings.learned_layers)


def mixed_architecture(case_shape: tuple[int, ...], place: int) -> Architecture:
    """The architecture of the site in this place when students are mixed."""
    kind = "text" if is_text(case_shape) else "image" if len(case_shape) == 3 else "table"
    kinds = MIXED[kind]
    return kinds[place % len(kinds)]
