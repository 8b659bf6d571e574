"""The steps of a round and of the final agreement: the same in all runtimes, over whatever exchange a member has."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from peertune.algorithms.base import Algorithm, LocalReport
from peertune.algorithms.together import Alone, Together
from peertune.codec import coded, is_coded
from peertune.errors import PeerLostError
from peertune.exchange import ROLL, Hop, Inbox, Payload
from peertune.robust import robust_inbox
from peertune.runtimes.group import Member

PLAN = "without"
"""Name of the tensor that says, in the messages of an agreement without some, without which edges it is."""
ATTEMPTS = 3
"""Times that the final agreement is tried, as peers are lost in it."""


def edges(algorithm: Algorithm) -> list[tuple[int, int]]:
    """Pairs of members (i, j), i < j, between which anything travels in a whole run; ascending."""
    pairs: set[tuple[int, int]] = set()
    last = None
    for hop in chain(*map(algorithm.hops, range(algorithm.num_rounds)), algorithm.agreement()):
        if hop is not last:  # most are one, and a long run's others need not be held together
            pairs.update(hop.weights)
        last = hop
    return sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})


def play_round(
    round: int, members: Sequence[Member], pool: Executor | None = None, parts: Sequence[Alone | Together] = ()
) -> list[LocalReport | None]:
    """One round of every hosted peer: the local phase, then each hop.

    Args:
        pool: threads that play several peers' local phases at the same time; None: one peer after the other.
        parts: the hosted peers, in their order, as they train; none: each alone.
    Returns:
        By hosted peer, the hub left out, what the local phase says; None where a peer had no part in the round.
    """
    parts = parts or [Alone(member.algorithm) for member in members if not member.is_hub]
    if pool is None:
        on_one_thread = torch.get_num_threads() == 1 and members[0].algorithm.peer.model.device.type == "cpu"
        # One thread's CPU time is what it takes, whatever else the machine does.
        wall = time.process_time if on_one_thread else time.perf_counter
        reports = [_timed_local(round, part, time.process_time, wall) for part in parts]
    else:
        # Each has a thread, and no threads of its own operators'; the process's clock would count all peers.
        reports = list(pool.map(lambda part: _timed_local(round, part, time.thread_time, time.thread_time), parts))
    for number, hop in enumerate(members[0].algorithm.hops(round)):
        carry = partial(_carry_coded, number) if is_coded(members[0].rule, hop) else _carry
        for member, inbox in carry(round, hop, members, lambda member, hop: member.algorithm.outgoing(hop)):
            member.algorithm.mix(hop, robust_inbox(member.rule, member.index, inbox))
    return [report for part in reports for report in part]


def thread_pool(num_peers: int) -> ThreadPoolExecutor:
    """For `play_round`: so many peers at a time, each on one thread of PyTorch's."""
    return ThreadPoolExecutor(num_peers, "peer", initializer=torch.set_num_threads, initargs=(1,))


def _timed_local(
    round: int, part: Alone | Together, cpu: Callable[[], float], wall: Callable[[], float]
) -> list[LocalReport | None]:
    """A local phase, whose times by two clocks are shared out alike over the peers that had a part in it."""
    start = cpu(), wall()
    reports = part.local(round)
    took_part = [report for report in reports if report is not None]
    for report in took_part:
        report.loss.item()  # a GPU has only then done what it was told to
    end, count = (cpu(), wall()), max(1, len(took_part))
    cpu_s, wall_s = ((after - before) / count for before, after in zip(start, end, strict=True))
    return [None if report is None else replace(report, cpu_s=cpu_s, wall_s=wall_s) for report in reports]


@dataclass(frozen=True)
class Agreement:
    """How an agreement ended."""

    hops: int = 0
    absent: Sequence[int] = ()
    """Peers who are not in the average."""
    is_one: bool = True
    """Whether all who were asked after it hold one model, as far as is known; a peer may have passed on another. After
    the last attempt nobody is asked."""


def agree(
    round: int,
    members: Sequence[Member],
    may_lose: bool = False,
    take_late: Callable[[Algorithm], None] | None = None,
) -> Agreement:
    """Give every peer the bitwise same model, the weighted average of what the peers share, a block at a time.

    Where peers may be lost, all ask first who is still there, and agree without those who are not. Then they ask anew,
    and which model each holds, and agree once more if that failed anywhere, at most `ATTEMPTS` times; what some peers
    had agreed on by then counts as theirs. Rounds are numbered on, one for each attempt.

    Args:
        round: the number of the run's rounds.
        may_lose: a peer may be lost.
        take_late: takes in what came after its round. Those who are behind play their last rounds while the others ask
            who is there.
    Raises:
        PeerLostError: a peer was lost on the way each time, and with it the blocks still to come.
    """
    algorithm = members[0].algorithm
    hops, known = algorithm.agreement(), edges(algorithm)
    if not may_lose or not algorithm.agreement(known):
        _agree_on(hops, {}, round, members)
        return Agreement(len(hops))
    absent: Sequence[int] = ()
    failure, is_one, held = None, True, dict[int, float]()
    for attempt in range(ATTEMPTS):
        told = roll_call(round + attempt, members, known, held, has_failed=failure is not None)
        if take_late is not None and not attempt:
            for member in members:
                take_late(member.algorithm)
        *lost, had_losses, any_failed, highest, lowest = told.tolist()
        if attempt and not any_failed:
            is_one = highest == -lowest
            break
        plan = dict[str, Tensor]()
        if any(lost) or any_failed or (had_losses and not hops):
            pairs = [pair for pair, is_lost in zip(known, lost, strict=True) if not is_lost]
            hops, plan = algorithm.agreement(pairs), {PLAN: told[:-2]}
            absent = algorithm.topology.cut_off_from(members[0].index, pairs)
        if not hops:
            break
        try:
            _agree_on(hops, plan, round + attempt, members, keeps=True)
            failure, held = None, {member.index: _print_of(member.algorithm) for member in members}
        except PeerLostError as error:
            failure = error
    if failure is not None:
        raise failure
    return Agreement(len(hops), absent, is_one)


def _print_of(algorithm: Algorithm) -> float:
    """Of what a peer shares, to the bit: a number that float32 holds."""
    digest = hashlib.sha256()
    for name in algorithm.shared_names():
        digest.update(algorithm.shared(name).contiguous().cpu().numpy().data)
    return float(int.from_bytes(digest.digest()[:3], "big"))


def _agree_on(
    hops: Sequence[Hop], plan: Payload, round: int, members: Sequence[Member], *, keeps: bool = False
) -> None:
    """Play the hops of an agreement for each block.

    Args:
        plan: goes with each message, and has to be what the neighbours send.
        keeps: keep what the peers hold until a block is agreed on, and give it back where that fails.
    Raises:
        PeerLostError: a peer was lost, or agrees by another plan.
    """
    for block in members[0].algorithm.blocks:
        names = [name for name in members[0].algorithm.shared_names() if name in set(block.parameters)]
        if not names:
            continue  # a personal block

        def outgoing(member: Member, hop: Hop, names: list[str] = names) -> Payload:
            return {**{name: member.algorithm.shared(name) for name in names}, **plan}

        # On the way up they hold partial sums.
        before = [{name: member.algorithm.shared(name) for name in names} for member in members if keeps]
        try:
            for hop in hops:
                for member, inbox in _carry(round, hop, members, outgoing):
                    if not all(
                        torch.equal(payload[name], plan[name]) for payload in inbox.payloads.values() for name in plan
                    ):
                        raise PeerLostError(
                            "a neighbour agrees with others than this site does, so there is no agreement"
                        )
                    for name in names:
                        member.algorithm.set_shared(name, inbox.mean(name))
        except PeerLostError:
            for member, held in zip(members, before, strict=False):
                for name, value in held.items():
                    member.algorithm.set_shared(name, value)
            raise


def roll_call(
    round: int,
    members: Sequence[Member],
    pairs: Sequence[tuple[int, int]],
    held: Mapping[int, float],
    *,
    has_failed: bool = False,
) -> Tensor:
    """Who still hears whom, the same for all who do: everybody floods what he knows over the graph.

    Word goes round any graph of N peers in N - 1 waves, so what is lost in the first half of these 2 (N - 1) is known
    to all in the end. What is lost later may be known to some only; their messages then say that they agree on another
    plan, and each keeps its own model.

    Args:
        pairs: the run's `edges`.
        held: by member the fingerprint of the model it agreed on just before; none: it did not.
        has_failed: whether the agreement before it failed here.
    Returns:
        By pair, 1 where no message comes any more; then 1 if any peer once went on without another, 1 if the agreement
        before failed at any, and of all fingerprints, 0 where there is none, the highest and minus the lowest; float32.
    """
    num_peers = members[0].algorithm.topology.num_peers
    own = {(peer, peer): 1.0 for peer in range(num_peers)}
    wave = Hop(ROLL, own | {way: 1.0 for i, j in pairs for way in ((i, j), (j, i))})
    lost = {member.index: torch.zeros(len(pairs) + 4) for member in members}
    for member in members:
        own_print = held.get(member.index, 0.0)
        own_fields = [float(bool(member.exchange.rounds_without)), float(has_failed), own_print, -own_print]
        lost[member.index][-4:] = torch.tensor(own_fields)
    for _ in range(2 * (num_peers - 1)):
        for member, inbox in _carry(round, wave, members, lambda member, hop: {"lost": lost[member.index].clone()}):
            known = lost[member.index]
            for payload in inbox.payloads.values():
                torch.maximum(known, payload["lost"].to(known.device), out=known)
            for other in member.exchange.left_out:
                known[pairs.index((min(member.index, other), max(member.index, other)))] = 1.0
    return lost[members[0].index]


def _carry_coded(
    number: int, round: int, hop: Hop, members: Sequence[Member], outgoing: Callable[[Member, Hop], Payload]
) -> Iterator[tuple[Member, Inbox]]:
    """As `_carry`, of messages that are rounded on their way; the hop is the round's `number`-th."""
    exact: dict[int, Payload] = {}

    def rounded(member: Member, hop: Hop) -> Payload:
        out = outgoing(member, hop)
        if not hop.spreads and member.index in hop.sources(member.index):
            exact[member.index] = out
        return coded(out, member.algorithm.peer.seed, member.index, "codec", round, number)

    for member, inbox in _carry(round, hop, members, rounded):
        if member.index in exact:
            inbox = replace(inbox, payloads={**inbox.payloads, member.index: exact.pop(member.index)})
        yield member, inbox


def _carry(
    round: int, hop: Hop, members: Sequence[Member], outgoing: Callable[[Member, Hop], Payload]
) -> Iterator[tuple[Member, Inbox]]:
    """Send along a hop from all hosted peers, then yield each one that received something, with its inbox."""
    sources = {source for source, _ in hop.weights}
    for member in members:
        member.exchange.start(round, hop, outgoing(member, hop) if member.index in sources else None)
    for member in members:
        inbox = member.exchange.finish(round, hop, partial(outgoing, member, hop))
        if inbox is not None:
            yield member, inbox
