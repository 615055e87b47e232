"""The memory of what this process has computed is bounded, and computes nothing twice."""

from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest

from common.memo import Memo


def test_the_least_recently_used_value_is_forgotten():
    memo = Memo[str](capacity=2)
    computed = []

    def get(key):
        return memo.get(key, lambda: computed.append(key) or key.upper())

    assert [get(key) for key in ("a", "b", "a", "c", "a", "b")] == ["A", "B", "A", "C", "A", "B"]
    assert computed == ["a", "b", "c", "b"]


def test_threads_wait_instead_of_computing_the_same():
    memo = Memo[object](capacity=1)

    def compute():
        sleep(0.05)
        return object()

    with ThreadPoolExecutor(4) as pool:
        values = set(pool.map(lambda _: memo.get("key", compute), range(4)))
    assert len(values) == 1


def test_a_failure_is_not_remembered():
    memo = Memo[int](capacity=1)
    with pytest.raises(ZeroDivisionError):
        memo.get("key", lambda: 1 // 0)
    assert memo.get("key", lambda: 3) == 3
