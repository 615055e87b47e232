"""When an answer leaves, so that its time says nothing about the records it came from.

A full-batch step takes time in proportion to the number of records, and a first task reads them all. So a
release, or word that a task failed, leaves on a beat that the hospital declares: at the first whole multiple
of it after the task began, by which it is ready. The custodian does nothing else until then, or whatever
waited behind the task would show when it was done. A task that outlasts its beat shows that it did, one bit
each; the site's log says so, and a longer beat mends it.

What a beat cannot hide is the load of the machine, which another program on it can watch.
"""

import math


def departure(started: float, ready: float, every_seconds: float) -> float:
    """The moment at which a release leaves.

    Args:
        started: When the task began, on a monotonic clock.
        ready: When its release was committed, or it failed, on the same clock.
        every_seconds: The declared beat; 0 has none.
    """
    if every_seconds == 0:
        return ready
    return started + every_seconds * max(1, math.ceil((ready - started) / every_seconds))
