"""Where a site's programs differ from Flower's: a name in a module of Flower's stands for something of ours.

Flower 1.41 has no other place to put a client certificate or a pin. A version that lacks the name is refused
when the program starts, so that a protection never goes missing in silence.
"""

from importlib.metadata import version
from types import ModuleType
from typing import Any


def exchange(module: ModuleType, name: str, ours: object) -> Any:
    """Let a name in one of Flower's modules stand for something else; return what it stood for.

    Raises:
        RuntimeError: if this version of Flower has no such name.
    """
    if not hasattr(module, name):
        raise RuntimeError(f"Flower {version('flwr')} has no {module.__name__}.{name}; 1.41 was tested")
    before = getattr(module, name)
    setattr(module, name, ours)
    return before
