"""Stragglers: sites that answer a round's task when the round is over.

Their tasks stay with Flower, and so do the answers until somebody takes them. Once a round they are taken,
refused unread, and named: which site, which round, which is open. A release of an old round was made from an
old z; the ensemble has moved on. The site has charged its budget all the same, as its plan foresaw.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from common.logs import about
from server.correspondence import pulled

MOST_TASKS = 4
"""Tasks that are remembered of one site, the latest: a site that is gone must not cost every round more."""

log = logging.getLogger("flwr")  # shows where a Flower user looks


@dataclass(frozen=True)
class Late:
    """An answer that came after its round."""

    site: str
    round: int


@dataclass
class Stragglers:
    """Tasks of earlier rounds that are still out: by site, the messages that carried them, and which."""

    _out: dict[str, dict[str, int]] = field(default_factory=dict)

    def expect(self, round_number: int, unanswered: Mapping[str, str]) -> None:
        """Remember a round's tasks that nobody answered in time.

        Args:
            round_number: The round that is over.
            unanswered: The site that each message went to.
        """
        for message_id, site in unanswered.items():
            tasks = self._out.setdefault(site, {})
            tasks[message_id] = round_number
            if len(tasks) > MOST_TASKS:
                del tasks[next(iter(tasks))]

    def refuse(self, grid: Grid, open_round: int) -> list[Late]:
        """Take what was answered since, and refuse it by name."""
        late = []
        for one, is_answer in self._taken(grid):
            if is_answer:
                with about(round=open_round, site=one.site):
                    log.warning(
                        "%s answered round %d, which is over: refused; round %d is open",
                        one.site,
                        one.round,
                        open_round,
                    )
                late.append(one)
        return late

    def _taken(self, grid: Grid) -> Iterator[tuple[Late, bool]]:
        """Pull replies; one that says that there will be no answer is no answer."""
        places = {message_id: site for site, tasks in self._out.items() for message_id in tasks}
        for reply in pulled(grid, list(places)):
            message_id = reply.metadata.reply_to_message_id
            if message_id in places:
                site = places.pop(message_id)
                yield Late(site, self._out[site].pop(message_id)), not reply.has_error()
