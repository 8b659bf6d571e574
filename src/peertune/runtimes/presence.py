"""Who is there, as far as one site can tell: ages that neighbours pass on. A pure function of what is told and when.

With every beat a site tells its neighbours how long ago anybody heard of each member. The youngest age that comes
around counts, so a site knows of members it has no connection to, and no two clocks need to agree. As in a gossip
failure detector (van Renesse, Minsky, Hayden 1998), a member of whom nothing new is told grows old and is absent.

With the ages go steps: each member counts what it took in of messages, and nobody else counts for it. So all learn that
somebody gets on, also behind others who only wait, and those who wait for each other tell each other nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FINISHED = -1.0
"""The age of a member who has finished the run: it is missed no more."""
MOST_STEPS = (1 << 64) - 1
MARGIN_S = 2.0
"""Seconds by which two may have heard of one who is gone at different times: beats that are a second apart."""


class Presence:
    """What one site knows of all members.

    Args:
        num_members: N.
        own: this site's place among them.
        grace_s: seconds after which a member of whom nothing is heard is absent.
    """

    def __init__(self, num_members: int, own: int, grace_s: float) -> None:
        self.own, self.grace_s = own, grace_s
        self._seen = [-math.inf] * num_members
        """When each member was last known to be there; infinity: it has finished."""
        self.ejected: set[int] = set()
        """Members who count no more, whoever hears of them."""
        self._steps = [0] * num_members
        self.got_on_at = -math.inf
        """When it was last known of any member that it had taken in more of a message."""

    def heard(self, member: int, now: float) -> None:
        """A member said something just now."""
        self._seen[member] = max(self._seen[member], now)

    def finished(self, member: int) -> None:
        """A member has finished the run."""
        self._seen[member] = math.inf

    def got_on(self, now: float) -> None:
        """This site has taken in more of a message."""
        self._steps[self.own], self.got_on_at = min(MOST_STEPS, self._steps[self.own] + 1), now

    def steps(self) -> list[int]:
        """How often each member got on, as far as is known here, in the members' order."""
        return list(self._steps)

    def told(self, ages: Sequence[float], steps: Sequence[int], now: float) -> None:
        """A neighbour's ages and steps came in.

        Raises:
            ValueError: they are not one for each member, or no ages.
        """
        if len(ages) != len(self._seen) or not all(age >= 0 or age == FINISHED for age in ages):
            raise ValueError(f"got {len(ages)} ages, expected {len(self._seen)} of 0 or more, or {FINISHED}")
        if len(steps) != len(self._steps):
            raise ValueError(f"got {len(steps)} counts of steps, expected {len(self._steps)}")
        for member, age in enumerate(ages):
            if member != self.own:
                self._seen[member] = max(self._seen[member], math.inf if age == FINISHED else now - age)
        for member, count in enumerate(steps):
            if count > self._steps[member] and member not in self.ejected:
                self._steps[member] = count  # this site's own too: of the process that was here before
                if member != self.own:
                    self.got_on_at = now

    def ages(self, now: float) -> list[float]:
        """Seconds since each member was last known to be there, in the members' order."""
        self.heard(self.own, now)
        return [FINISHED if seen == math.inf else max(0.0, now - seen) for seen in self._seen]

    def is_heard_elsewhere(self, member: int, heard_here: float, now: float) -> bool:
        """Whether another clearly hears a member that this site hears no more, or it has done its part.

        What goes round of one who is gone may be a little younger than this site's own word of it, never much.

        Args:
            heard_here: when this site itself last heard it.
        """
        seen = self._seen[member]
        return member not in self.ejected and now - seen <= self.grace_s / 2 and seen >= heard_here + MARGIN_S

    def is_gone(self, member: int, now: float) -> bool:
        """Whether a member was there, as those tell who are, and is absent; of one who never came nobody tells."""
        return self.grace_s < now - self._seen[member] < math.inf

    def present(self, now: float) -> list[int]:
        """Members who are there, or have done their part; this site included."""
        return [
            member for member, age in enumerate(self.ages(now)) if age <= self.grace_s and member not in self.ejected
        ]
