"""The roll: who takes part in a run, from the first call to the last round.

The first call waits, for the study's sites and for every answer. Later ones, after each round, wait for
nothing: they greet nodes that have come since, take what was answered meanwhile, and cost a round no time.
So a site may join late, and one whose node went away comes back through another. Once a member, always a
member: who misses a round is asked again in the next.

Each site gets the run's plan within its own caps: its own ε, hence its own σ, and its own last round. It
keeps that plan to the end of the run, whatever it says later.

Where keys tell whose a node is (`server.node_owners`), a name is taken from its own site's node only.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.serverapp import Grid

from common.envelope import OFFER, PROXY
from common.errors import UserError
from common.messages import Answer, Greeting, Offer, Receipt
from common.plan import Plan
from common.proxy import Proxy
from server.admission import AWAY, FOREIGN_NODE, GONE, REFUSED, Member
from server.correspondence import answers_to, connected, in_words, send

REST = 3.0
"""Seconds before a site that died is greeted again."""

MOST_DELIVERIES = 3
"""A node that so often didn't take the proxy is left in peace: it is the one letter that is large."""


@dataclass
class Roll:
    """Who takes part, and what is still being said at the door.

    Attributes:
        grid: Where the nodes are.
        proxy: The run's public cases.
        plan: What the run asks of a site.
        agreed: The study's sites with the public sizes that they declared when it was agreed. A site with
            another size now would give itself another weight.
        plans: Each site's own plan, from its first greeting on; also of a run that goes on.
        owners: Says which site each node is of, and is asked at every call; None where no keys tell, and
            sites are believed.
        members: Who takes part, by name.
        absent: Why others don't, by name or node.
    """

    grid: Grid
    proxy: Proxy
    plan: Plan
    agreed: Mapping[str, int]
    plans: dict[str, Plan] = field(default_factory=dict)
    owners: Callable[[], Mapping[int, str]] | None = None
    members: dict[str, Member] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    _letters: dict[str, int] = field(default_factory=dict)
    _at_the_door: dict[int, Greeting] = field(default_factory=dict)
    _failures: dict[int, int] = field(default_factory=dict)
    _owner_of: Mapping[int, str] = field(default_factory=dict)

    def call(self, timeout: float, needed: int = 0) -> None:
        """Greet whoever isn't a member yet, wait up to `timeout` seconds, and enrol who may take part.

        A first call also waits for nodes to connect and, until as many sites as `needed` are members, for
        those that died when they were greeted: Flower takes a node for present until a minute after its
        death. A later call has `timeout` 0.
        """
        deadline = time.monotonic() + timeout
        self._greet(timeout)
        while len(self.members) < needed and not {*AWAY.values()}.isdisjoint(self.absent.values()):
            if (left := deadline - time.monotonic()) <= 0:
                break
            time.sleep(min(REST, left))
            self._greet(left)

    def _greet(self, timeout: float) -> None:
        earlier, self.absent = self.absent, {}
        self._owner_of = self.owners() if self.owners else {}
        nodes = connected(self.grid, len(self.agreed) if timeout else 0)
        for site in [name for name, member in self.members.items() if member.node_id not in nodes]:
            self.absent[site] = GONE
        known = {member.node_id for member in self.members.values()} | {*self._letters.values()}
        strangers = [
            node for node in nodes if node not in known and self._failures.get(node, 0) < MOST_DELIVERIES
        ]
        offer = Offer(self.proxy.digest).encode()
        letters = self._letters | send(self.grid, dict.fromkeys(strangers, offer), OFFER)
        self._letters = {}
        while letters:
            answers = answers_to(self.grid, letters, timeout)
            self._letters |= letters
            in_need = [node for node, answer in answers.items() if self._hear(node, answer, nodes)]
            body = self.proxy.to_bytes() if in_need else b""
            letters = send(self.grid, dict.fromkeys(in_need, body), PROXY)
        self.members = {site: self.members[site] for site in sorted(self.members)}
        for node in self._letters.values():
            said = self._at_the_door.get(node)
            name = said.site if said else self._called(node)
            self.absent[name] = earlier.get(name, "no answer in time")
        for site in self.agreed.keys() - self.members.keys() - self.absent.keys():
            self.absent[site] = earlier.get(site, "nobody answered to this name")

    def _hear(self, node: int, answer: Answer | str, nodes: list[int]) -> bool:
        """Enrol a node or note why not; return whether it must be sent the proxy first."""
        said = self._at_the_door.pop(node, None)
        if said is not None and answer == Receipt(self.proxy.digest):
            self._enrol(node, said)
        elif said is not None:
            self.absent[said.site] = f"did not take the proxy: {in_words(answer)}"
            self._failures[node] = self._failures.get(node, 0) + 1
        elif not isinstance(answer, Greeting):
            self.absent[self._called(node)] = in_words(answer)
        elif self.owners and (owner := self._owner_of.get(node)) != answer.site:
            whose = f"{owner}'s node" if owner else "a node of no site"
            self.absent[self._called(node)] = f"{REFUSED}{FOREIGN_NODE}: {whose} calls itself {answer.site}"
        elif (complaint := self._complaint(answer, nodes)) is not None:
            waiting = {one.site for one in self._at_the_door.values()}
            its_own = self.agreed.keys() - self.members.keys() - waiting
            self.absent[answer.site if answer.site in its_own else self._called(node)] = complaint
        elif answer.knows_proxy:
            self._enrol(node, answer)
        else:
            self._at_the_door[node] = answer
        return node in self._at_the_door

    def _complaint(self, said: Greeting, nodes: list[int]) -> str | None:
        """Why a node that greets can't take part."""
        site, waiting = said.site, {one.site for one in self._at_the_door.values()}
        if site not in self.agreed:
            return f"calls itself {site}, which is no site of this study"
        if site in waiting or (site in self.members and self.members[site].node_id in nodes):
            return f"calls itself {site}, as another node does"
        if said.declared_size != self.agreed[site]:
            return f"declares {said.declared_size}, {self.agreed[site]} was agreed"
        try:
            self._plan_for(said).noise_multiplier()
        except UserError:
            return f"gives ε = {said.most_epsilon:g} at most, for which there is no noise to be found"
        return None

    def _called(self, node: int) -> str:
        """How a node is called that takes no part: as its site, where keys tell."""
        return self._owner_of.get(node, f"node {node}")

    def _plan_for(self, said: Greeting) -> Plan:
        return self.plans.get(said.site) or self.plan.within(said.most_epsilon, said.most_rounds)

    def _enrol(self, node: int, said: Greeting) -> None:
        plan = self.plans[said.site] = self._plan_for(said)
        self.members[said.site] = Member(node, said.site, said.declared_size, plan)
        self.absent.pop(said.site, None)
