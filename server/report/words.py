"""How a report writes numbers, guarantees and names: the same for the page and for the terminal.

Two rules stand behind the formats. A privacy loss is rounded *up*, so that no report shows less than was
spent, and it is never shown without δ, unit, adjacency, accountant and horizon. And names of sites and
reasons were written by others: `plain` takes out what would steer a terminal, the page escapes the rest.
"""

import math
from collections.abc import Sequence

from common import rounding
from common.summary import SitePrivacy, Statistic

# Differences are shown with one decimal of a point; what would be shown as 0.0 is no difference.
SMALLEST_SHOWN = 0.0005

UNITS = {
    "record": "one record",
    "patient": "one patient",
}
UNITS_IN_FULL = {
    "record": "a certain record",
    "patient": "a certain patient, with all records at that site,",
}
ADJACENCIES = {"add-remove": "add/remove one"}
ACCOUNTANTS = {
    "gaussian-exact": "exact Gaussian",
    "pld": "privacy loss distribution",
}
HORIZONS = {
    "run": "this run alone",
    "lifetime": "lifetime of the data",
}
HORIZONS_IN_FULL = {
    "run": "this run alone; what the same data were or will be used for elsewhere adds to it",
    "lifetime": "everything that the data were ever used for, this run included",
}


def guarantee(line: SitePrivacy) -> str:
    """Say a site's ε with everything that gives it a meaning, in a line."""
    return (
        f"ε = {at_most(line.epsilon)}, δ = {delta(line.delta)}, {UNITS[line.unit]}, "
        f"{ADJACENCIES[line.adjacency]}, {accountant(line)}, {HORIZONS[line.horizon]}"
    )


def guarantee_in_full(line: SitePrivacy) -> str:
    """Say the same in a sentence for those who have not met an ε before, without the site's name."""
    factor = f"e^{at_most(line.epsilon)} = {at_most(odds(line))}"
    return (
        f"whether {UNITS_IN_FULL[line.unit]} is among the data or not ({ADJACENCIES[line.adjacency]}) "
        f"changes the probability of anything that was sent by a factor of at most {factor}, but for a "
        f"probability of δ = {delta(line.delta)}; computed by {accountant(line)}; over "
        f"{HORIZONS_IN_FULL[line.horizon]}."
    )


def accountant(line: SitePrivacy) -> str:
    """Name the method by which a site's ε was computed."""
    return ACCOUNTANTS.get(line.accountant, plain(line.accountant))


def odds(line: SitePrivacy) -> float:
    """Return e^ε: what a site sends multiplies nobody's odds that a unit is among its data by more."""
    return math.exp(min(line.epsilon, 700.0))


def recognised(line: SitePrivacy, false_alarms: float = 0.01) -> float:
    """Bound the share of participants that any test with this share of false alarms finds: e^ε·FPR + δ."""
    return min(1.0, odds(line) * false_alarms + line.delta)


def score(statistic: Statistic) -> str:
    """Format a score times 100, with its spread if there is one: `87.2 ± 1.9`."""
    mean = f"{statistic.mean * 100:.1f}"
    return mean if len(statistic.values) == 1 else f"{mean} ± {statistic.std * 100:.1f}"


def points(difference: float) -> str:
    """Name the size of a difference of scores: `1.0 point`, `2.1 points`."""
    size = f"{abs(difference) * 100:.1f}"
    return f"{size} point" if size == "1.0" else f"{size} points"


def signed(difference: float) -> str:
    """Format a difference of scores in points, with a real minus sign."""
    if abs(difference) < SMALLEST_SHOWN:
        return "0.0"
    return f"{difference * 100:+.1f}".replace("-", "\N{MINUS SIGN}")


def at_most(value: float) -> str:
    """Format an upper bound, such as an ε, with three significant digits, rounded up: `0.994`."""
    return rounding.at_most(value, 3)


def delta(value: float) -> str:
    """Format δ in a short scientific form, rounded up: `1e-5`."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{float(at_most(value).replace(',', '')):.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def size(count: float) -> str:
    """Format a number of bytes: `700 bytes`, `4.2 kB`, `1.3 MB`."""
    if count < 999.5:
        return counted(round(count), "byte")
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if count < scale * 999.95:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Format a time: `11.2 s`, `4 min 10 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60)} s"
    return f"{int(minutes // 60)} h {int(minutes % 60)} min"


def counted(number: int, noun: str) -> str:
    """Return `1 site`, `4 sites`, `12,000 cases`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def rounds_held(held: int, planned: int | None) -> str:
    """Return `20 rounds`, or `12 of 20 rounds` where a run ended early."""
    return counted(held, "round") if planned in (None, held) else f"{held:,} of {counted(planned, 'round')}"


def metric_name(metric: str) -> str:
    """Return what people call a metric."""
    return {"auroc": "AUROC"}.get(metric, plain(metric.replace("_", " ")))


def plain(text: str, length: int = 60) -> str:
    """Return others' text on one line, without control characters, cut at a length."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def metric_meaning(metric: str, classes: int) -> str:
    """Explain a metric in a sentence; empty for one that we don't know."""
    if metric == "accuracy":
        return "Accuracy is the share of test cases that the model puts into the right class."
    if metric == "auroc" and classes > 2:
        return (
            "AUROC is the chance that the model ranks a case of a class above one of another class, "
            "averaged over the classes: 50 is a coin toss, 100 is perfect."
        )
    if metric == "auroc":
        return (
            "AUROC is the chance that the model ranks a case with the condition above one without it: "
            "50 is a coin toss, 100 is perfect."
        )
    return ""


def names(listed: Sequence[str], most: int = 8) -> str:
    """List names: `cleveland, hungary`; of very many only the first few and how many more."""
    shown = ", ".join(map(plain, listed[:most]))
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most} more"


def numbers(listed: Sequence[int]) -> str:
    """Shorten a list of numbers, of rounds or seeds: `3–5, 9`."""
    runs: list[list[int]] = []
    for number in sorted(set(listed)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
