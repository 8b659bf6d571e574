"""A site that is behind: when it asks a neighbour for the state, whom, how long it waits for it, and what it believes.

The question and the answer travel over an `edge`; what is done with a state is `network`'s.
"""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import islice
from queue import SimpleQueue

from peertune.algorithms.base import Algorithm
from peertune.exchange import Payload
from peertune.runtimes.neighbor import Neighbor
from peertune.runtimes.node import Node

PACE_ROUNDS = 8
"""Rounds after which a site that is behind looks whether it comes nearer."""


class StateRequest:
    """One site's question for the state: at most one at a time.

    Args:
        is_robust: members may send garbage, so that one alone is not believed to be far ahead.
    """

    def __init__(self, node: Node, *, is_robust: bool) -> None:
        self._node, self._is_robust = node, is_robust
        self._asked: Neighbor | None = None
        self._asked_until: float = math.inf
        """Round of the one who was asked, beyond which it would have sent the state."""
        self._asked_at = 0.0
        self._in_vain: set[int] = set()
        """Neighbours who did not send it."""
        self._believed = 0
        """The round that the one furthest ahead is taken to be in."""
        self._pace = Pace()
        self._answers: SimpleQueue[tuple[int, Payload | None]] = SimpleQueue()

    def ask_where_behind(self, round: int, algorithm: Algorithm, *, is_left_out: bool) -> None:
        """Ask the neighbour who is furthest ahead, where this site cannot come nearer by itself.

        Called between all rounds.

        Args:
            is_left_out: this site's last round went on without a message, as it is kept no more.
        """
        within_reach = [n for n in self._node.neighbors.values() if not n.is_out_of_reach]
        self._give_up_on_the_silent()
        rounds = sorted((neighbor.edge.peer_round for neighbor in within_reach), reverse=True)
        self._believed = next(iter(rounds[1:] if self._is_robust else rounds), 0)
        behind = max(0, self._believed - round)
        # Where rounds pass without messages, others may be ahead who will wait for this site.
        is_left_behind = any(neighbor.edge.missed_until >= round for neighbor in self._node.neighbors.values())
        falls_back = self._pace.is_too_slow(round, behind if is_left_behind else 0)
        if self._asked is None and behind > 1 and (is_left_out or falls_back):
            helpers = [n for n in within_reach if n.index not in self._in_vain] or within_reach
            # Who says that he is further ahead than is believed is the last one to be asked.
            far = max(helpers, key=lambda n: (n.edge.peer_round <= self._believed, n.edge.peer_round))
            self._ask(far, round, behind, algorithm)

    def answer(self) -> tuple[int, Payload | None] | None:
        """The round whose beginning the state belongs to, and the state; None in its place: it does not come.

        None where there is no answer yet.
        """
        if self._answers.empty():
            return None
        self._asked = None
        then, state = self._answers.get()
        if state is not None:
            self._in_vain.clear()
        return then, state

    def is_sound(self, round: int, then: int, algorithm: Algorithm) -> bool:
        """Whether a state of the beginning of round `then` can be one that helps a site in `round`."""
        is_ahead = round < then < algorithm.num_rounds and algorithm.can_join(then)
        return is_ahead and (not self._is_robust or then <= self._believed + 1)

    def _give_up_on_the_silent(self) -> None:
        asked, waited_s = self._asked, time.monotonic() - self._asked_at
        if asked is None:
            return
        if asked.is_out_of_reach:
            self._node.soon(asked.edge.no_state)
        elif asked.edge.peer_round > self._asked_until and waited_s > self._node.charter.grace_s:
            # It has let its chances pass; what it said of that may be under way for long.
            self._in_vain.add(asked.index)
            self._node.soon(asked.edge.ask_no_more)

    def _ask(self, ahead: Neighbor, round: int, behind: int, algorithm: Algorithm) -> None:
        self._asked, self._asked_at = ahead, time.monotonic()
        # The first of them may be over there before the question arrives.
        chances = (r for r in range(ahead.edge.peer_round + 1, algorithm.num_rounds) if algorithm.can_join(r))
        self._asked_until = next(islice(chances, 1, None), math.inf)
        self._node.log("asked", peer=ahead.name, round=round, behind=behind)
        self._node.soon(partial(ahead.ask, algorithm.handed_on(), self._arrived))

    def _arrived(self, round: int, state: Payload | None) -> None:
        self._answers.put((round, state))


class Pace:
    """Whether a site that is behind, and has all messages that it needs, will be with the others soon."""

    def __init__(self) -> None:
        self._since: tuple[int, int] | None = None
        """The round, and how many this site was behind, when the others' pace began to be measured."""

    def is_too_slow(self, round: int, behind: int) -> bool:
        """Whether it is less than twice as fast as they, over as many rounds as it was behind, at most `PACE_ROUNDS`.

        Called between all rounds.

        Args:
            behind: rounds that the one furthest ahead is ahead; 0 where nobody goes on without this site.
        """
        if behind <= 1:
            self._since = None
            return False
        if self._since is None:
            self._since = round, behind
        began, was_behind = self._since
        played = round - began
        if played < min(was_behind, PACE_ROUNDS):
            return False
        self._since = round, behind
        return behind > was_behind - played / 2
