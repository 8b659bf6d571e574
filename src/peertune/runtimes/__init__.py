"""Runtimes: how payloads travel, each in a file of its own that implements `group.Group` and `exchange.Exchange`.

A process plays the members it hosts: all of them in simulation, one where every peer is a process of its own. Members
are the peers, in the recipe's order, and after them the hub, where there is one.
"""

from peertune.runtimes.group import Group, Member
from peertune.runtimes.rounds import agree, edges, play_round, thread_pool

__all__ = ["Group", "Member", "agree", "edges", "play_round", "thread_pool"]
