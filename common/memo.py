"""What this process has computed before: a few results, found again by what they were computed from."""

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Memo(Generic[Value]):
    """The last few values by the content that they were computed from; safe among threads."""

    def __init__(self, capacity: int) -> None:
        """Keep at most `capacity` values."""
        self._capacity, self._values, self._lock = capacity, OrderedDict[str, Value](), Lock()

    def get(self, key: str, compute: Callable[[], Value]) -> Value:
        """Return the value of `key`, computing it if it isn't there."""
        with self._lock:  # held while computing, so that nobody computes the same beside us
            if key not in self._values:
                self._values[key] = compute()
            self._values.move_to_end(key)
            if len(self._values) > self._capacity:
                self._values.popitem(last=False)
            return self._values[key]
