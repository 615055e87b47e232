"""Numbers of few digits that err on the claimed side: what was spent is rounded up, what is left down."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def rounded_up(value: float, digits: int = 4) -> float:
    """Return the least number of so many significant digits that isn't below `value`."""
    return float(_rounded(Decimal(value), digits, ROUND_CEILING))


def at_most(value: float, digits: int = 4) -> str:
    """Write an upper bound, such as an ε, for people: never below the truth."""
    return _written(value, digits, ROUND_CEILING)


def at_least(value: float, digits: int = 4) -> str:
    """Write a lower bound, such as the ε that is left, for people: never above the truth."""
    return _written(value, digits, ROUND_FLOOR)


def _written(value: float, digits: int, rounding: str) -> str:
    if not math.isfinite(value):
        return str(value).replace("inf", "∞")
    exact = Decimal(repr(value))  # 0.1 is 0.1 to people, not the binary number next to it
    return "0" if not exact else f"{_rounded(exact, digits, rounding):,f}"


def _rounded(exact: Decimal, digits: int, rounding: str) -> Decimal:
    return exact.quantize(Decimal(1).scaleb(exact.adjusted() - digits + 1), rounding=rounding)
