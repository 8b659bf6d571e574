"""Messages that come after a round went on without them: what they put right, and what they may not do."""

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from peertune.algorithms.base import Algorithm
from peertune.algorithms.choco import Choco
from peertune.algorithms.gt import Gt
from peertune.algorithms.local_steps import LocalSteps, LocalStepsConfig
from peertune.audit import Repeats, contributions
from peertune.cli.output import print_summary, summary_table
from peertune.errors import Left, PeerLostError
from peertune.exchange import ROLL, Hop, Inbox
from peertune.runtimes import network
from peertune.runtimes.catch_up import Pace
from peertune.runtimes.edge import Edge
from peertune.runtimes.edge_frames import STATE, Key
from peertune.runtimes.network import NetworkExchange, NetworkGroup, without
from peertune.runtimes.presence import Presence
from peertune.topology import Topology
from tests.quadratic import SIZE, QuadraticPeer


def late_group(log: list[dict[str, Any]]) -> tuple[NetworkGroup, Any, SimpleQueue[Any]]:
    """Site 0 of two who give each other a weight of 0.3, and an algorithm that shares one tensor."""
    late: SimpleQueue[Any] = SimpleQueue()
    node: Any = SimpleNamespace(
        neighbors={1: SimpleNamespace(late=late, name="east")},
        index=0,
        log=lambda kind, **about: log.append({"event": kind, **about}),
    )
    hop = Hop("gossip", {(0, 0): 0.7, (1, 0): 0.3, (0, 1): 0.3, (1, 1): 0.7}, takes_late=True)
    held = {"w": torch.tensor([1.0, 2.0])}
    algorithm: Any = SimpleNamespace(
        hops=lambda round: [hop],
        shared_names=lambda: list(held),
        shared=lambda name: held[name].clone(),
        set_shared=held.__setitem__,
        peer=SimpleNamespace(model=SimpleNamespace(forget=lambda: forgotten.append(held["w"].tolist()))),
        forgotten=(forgotten := []),
    )
    algorithm.take_late = partial(Algorithm.take_late, algorithm)
    return NetworkGroup(node, None), algorithm, late


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_late_message_gives_the_mean_back_what_a_round_without_it_took(dtype: torch.dtype) -> None:
    log: list[dict[str, Any]] = []
    group, algorithm, late = late_group(log)
    mine, theirs = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    east = 0.7 * theirs + 0.3 * mine  # it heard this site; this site kept its own
    algorithm.set_shared("w", mine + 1.0)  # and has trained since
    late.put(((4, 0), {"w": theirs.to(dtype)}, {"w": mine.to(dtype)}))
    group.take_late(algorithm)
    torch.testing.assert_close((algorithm.shared("w") - 1.0 + east) / 2, (mine + theirs) / 2)
    assert algorithm.forgotten == [algorithm.shared("w").tolist()], "what is cached of the weights before"
    assert log == [{"event": "late", "peer": "east", "round": 4, "used": True, "amount": pytest.approx(0.3 * 32**0.5)}]


def test_corrections_of_tracked_gradients_sum_to_zero_again_with_a_late_message() -> None:
    """All peers would step along a mean gradient that is off by the rest, for ever."""
    group, _, late = late_group([])
    topology = Topology("pair", 2, np.array([[0.7, 0.3], [0.3, 0.7]]))
    config = LocalStepsConfig(lr=0.02, local_steps=2, rounds=3)
    methods = [Gt(cast(Any, QuadraticPeer(i)), config, topology) for i in range(2)]
    methods[0].peer.model.forget = lambda: None  # type: ignore[method-assign]
    for round in range(3):
        for method in methods:
            method.local(round)
        (hop,) = methods[0].hops(round)
        sent = {i: methods[i].outgoing(hop) for i in range(2)}
        for i, method in enumerate(methods):
            is_lost = (round, i) == (1, 0)
            weights = without(hop.sources(i), [1] if is_lost else [], i)
            method.mix(hop, Inbox(weights, {j: sent[j] for j in weights}))
        if round == 1:
            late.put(((round, 0), sent[1], sent[0]))

    def total() -> Tensor:
        return torch.cat([methods[0].correction[name] + methods[1].correction[name] for name in "ab"])

    assert total().abs().max() > 0.1
    group.take_late(methods[0])
    torch.testing.assert_close(total(), torch.zeros(2 * SIZE), atol=1e-6, rtol=0)


def test_late_messages_of_one_absence_do_not_add_up_beyond_a_weight_of_one() -> None:
    log: list[dict[str, Any]] = []
    group, algorithm, late = late_group(log)
    for round in range(5):
        late.put(((round, 0), {"w": torch.tensor([2.0, 3.0])}, {"w": torch.tensor([1.0, 2.0])}))
    late.put(((5, 0), {"of another block": torch.ones(1)}, {"of another block": torch.zeros(1)}))
    group.take_late(algorithm)
    torch.testing.assert_close(algorithm.shared("w"), torch.tensor([1.9, 2.9]))
    assert [event["used"] for event in log] == [True, True, True, False, False, False]
    assert all(event["amount"] > 0 for event in log)


def test_a_message_in_time_ends_an_absence() -> None:
    """Late ones of the next absence have a weight of their own, and nobody is left out of a new round yet."""

    def expect(key: Any, like: Any, done: Any) -> None:
        done(like)

    neighbor = SimpleNamespace(
        edge=SimpleNamespace(peer_round=4), index=1, name="east", is_connected=True, is_ejected=False,
        was_seen=True, begin=(begun := []).append, post=lambda *_: None, expect=expect,
    )  # fmt: skip
    node: Any = SimpleNamespace(
        neighbors={1: neighbor}, index=0, has_quorum=True, has_quorum_without_the_lost=True, turned_away="",
        soon=lambda call: call(), log=lambda *_, **__: None, presence=SimpleNamespace(got_on_at=-math.inf),
        charter=SimpleNamespace(grace_s=1.0, members=["north", "east"]),
    )  # fmt: skip
    exchange, hop = NetworkExchange(node), Hop("gossip", {(i, j): 0.5 for i in range(2) for j in range(2)})
    exchange.late_weight[1], exchange.left_out = 0.9, [1]
    exchange.start(5, roll := replace(hop, name=ROLL), out := {"w": torch.ones(2)})
    exchange.finish(5, roll, lambda: out)
    assert exchange.late_weight[1] == 0.9, "who is there is asked after the last round, which may have gone without it"
    exchange.left_out = [1]
    exchange.start(6, hop, out)
    assert exchange.left_out == [] and begun == [5, 6]
    inbox = exchange.finish(6, hop, lambda: out)
    assert inbox is not None and inbox.weights == {0: 0.5, 1: 0.5} and exchange.late_weight[1] == 0.0
    neighbor.expect = lambda key, like, done: done(None)
    exchange.start(7, hop, out)
    exchange.finish(7, hop, lambda: out)
    exchange.left_out = [2, *exchange.left_out]  # in another hop of the round
    exchange.start(7, hop, out)
    exchange.finish(7, hop, lambda: out)
    assert exchange.rounds_without == {1: 1} and set(exchange.left_out) == {1, 2}
    neighbor.is_ejected, sent = True, exchange.sent.payload_bytes
    exchange.start(8, hop, out)
    assert exchange.sent.payload_bytes == sent, "nothing goes to one who takes part no more"


def test_a_round_without_a_hop_went_without_nobody() -> None:
    """A walk that stays, or a personal block: who was missed in the round before is not missed again."""
    group, _, _ = asking_group(["east"])
    exchange: NetworkExchange = group.exchange(0)
    exchange.begin(3)
    exchange.left_out = [1]
    method: Any = SimpleNamespace(can_join=lambda round: True)
    assert group.catch_up(4, method) == 4 and exchange.left_out == []


def test_whom_the_last_round_went_without_is_known_to_a_resumed_site() -> None:
    """Should it have been the last before the agreement, which then says whom it trusts all the same."""
    exchange, resumed = (NetworkExchange(SimpleNamespace(index=0)) for _ in range(2))  # type: ignore[arg-type]
    exchange.left_out, exchange.rounds_without[2] = [2], 7
    resumed.load_state_dict(json.loads(json.dumps(exchange.state_dict())))
    assert (resumed.left_out, resumed.rounds_without) == ([2], {2: 7})


def test_late_messages_from_before_a_join_are_not_used() -> None:
    """What another site made of its rounds came in their place."""
    log: list[dict[str, Any]] = []
    group, algorithm, late = late_group(log)
    group._joined = 10
    late.put(((9, 0), {"w": torch.tensor([100.0, 100.0])}, {"w": torch.zeros(2)}))
    group.take_late(algorithm)
    assert algorithm.shared("w").tolist() == [1.0, 2.0] and [event["used"] for event in log] == [False]


def test_one_who_joins_forgets_what_is_cached_of_its_old_weights() -> None:
    group, algorithm, _ = late_group([])
    group.node.neighbors.clear()
    algorithm.peer.model.device = "cpu"
    algorithm.join = lambda round, common: algorithm.set_shared("w", common["w"])
    group._join(10, {"w": torch.tensor([7.0, 8.0])}, algorithm)
    assert algorithm.forgotten == [[7.0, 8.0]]


def asking_group(names: Sequence[str], *, is_robust: bool = False) -> tuple[NetworkGroup, list[Any], list[str]]:
    """Site 0 and its neighbours, who are within reach and get no further by themselves; whom it asked for the state."""
    asked: list[str] = []

    class Quiet(SimpleNamespace):
        """A neighbour that sends no state."""

        def ask(self, like: Any, done: Any) -> None:
            asked.append(self.name)
            self.edge.ask(like, done)

    neighbors = [Quiet(name=name, edge=Edge(), is_out_of_reach=False, late=SimpleQueue()) for name in names]
    for index, neighbor in enumerate(neighbors, 1):
        neighbor.index = index
    node: Any = SimpleNamespace(
        neighbors=dict(enumerate(neighbors, 1)), index=0, log=lambda *_, **__: None, soon=lambda call: call(),
        turned_away="", has_quorum=True, charter=SimpleNamespace(grace_s=0.0),
    )  # fmt: skip
    return NetworkGroup(node, None, is_robust=is_robust), neighbors, asked


@pytest.mark.parametrize("is_robust", [False, True])
def test_under_a_robust_rule_one_neighbor_alone_leads_nobody_away(is_robust: bool) -> None:
    """It says that it is far ahead and did without this site, and would hand on a state of its own."""
    group, (liar, *honest), asked = asking_group(["liar", "east", "west"], is_robust=is_robust)
    for round in range(20):
        for neighbor in honest:
            neighbor.edge.peer_round = round
        liar.edge.peer_round, liar.edge.missed_until = round + 3, 99
        assert group.catch_up(round, joinable()) == round
    assert asked[:1] == ([] if is_robust else ["liar"])


def test_under_a_robust_rule_a_lone_neighbor_is_not_believed_either() -> None:
    group, (liar, away), asked = asking_group(["liar", "away"], is_robust=True)
    liar.edge.missed_until, away.is_out_of_reach = 99, True
    for round in range(20):
        liar.edge.peer_round = round + 30
        assert group.catch_up(round, joinable()) == round
    assert not asked


def test_who_does_not_send_the_state_is_not_waited_for() -> None:
    group, (silent, helpful), asked = asking_group(["silent", "helpful"])
    silent.edge.missed_until = 99
    for round in range(30):
        silent.edge.peer_round, helpful.edge.peer_round = round + 40, round + 39
        group.catch_up(round, joinable())
        if len(asked) == 2:
            break
    assert asked == ["silent", "helpful"]


def test_who_did_not_send_the_state_is_asked_again_once_another_did() -> None:
    group, (silent, helpful), asked = asking_group(["silent", "helpful"])
    group._exchange.begin(20)
    silent.edge.peer_round, helpful.edge.peer_round, group._exchange.left_out = 40, 39, [1]
    group._request._in_vain.add(1)
    group.catch_up(20, joinable())
    group._request._arrived(30, {})
    assert group._request.answer() == (30, {})
    group.catch_up(30, joinable())
    assert asked == ["helpful", "silent"]


def test_one_who_is_asked_has_two_chances_to_send_the_state_and_another_is_asked_when_it_is_gone() -> None:
    """The first may be over there before the question arrives; the method can be joined in each tenth round."""
    group, (silent, helpful), asked = asking_group(["silent", "helpful"])
    group._exchange.begin(20)
    silent.edge.peer_round, helpful.edge.peer_round, group._exchange.left_out = 40, 39, [1]
    for reached, expected in ((40, 1), (55, 1), (60, 1), (61, 1), (61, 2)):
        silent.edge.peer_round = reached
        group.catch_up(20, joinable())
        assert len(asked) == expected
    assert asked == ["silent", "helpful"]
    helpful.is_out_of_reach = True
    group.catch_up(20, joinable())
    group.catch_up(20, joinable())
    assert asked == ["silent", "helpful", "silent"], "nobody else is left"


def test_under_a_robust_rule_the_one_furthest_ahead_is_asked_last() -> None:
    group, (liar, east, west), asked = asking_group(["liar", "east", "west"], is_robust=True)
    liar.edge.peer_round, east.edge.peer_round, west.edge.peer_round = 100, 40, 39
    group._exchange.left_out = [1]
    group.catch_up(20, joinable())
    assert asked == ["east"]


def test_the_state_goes_to_who_asks_and_is_behind_where_the_method_can_be_joined() -> None:
    group, neighbors, _ = asking_group(["east", "west", "south"])
    posted: list[tuple[int, Key]] = []
    group._exchange.post = lambda target, key, *_: posted.append((target, key))  # type: ignore[method-assign]
    for neighbor, reached in zip(neighbors, (19, 20, 19), strict=True):
        neighbor.edge.peer_round, neighbor.edge.peer_asks = reached, neighbor.name != "south"
        neighbor.welcome = lambda round: None
    for round in (20, 21):
        group.catch_up(round, joinable())
    assert posted == [(1, (20, STATE))]


def test_one_round_behind_needs_no_state_and_two_do_where_a_message_is_gone() -> None:
    group, (east,), asked = asking_group(["east"])
    east.edge.peer_round = 21
    for left_out, round in (([1], 20), ([], 19), ([1], 19)):
        assert not asked
        group._exchange.left_out = left_out
        group.catch_up(round, joinable())
    assert asked == ["east"]


def test_a_state_is_taken_from_ahead_only_and_where_the_method_can_be_joined() -> None:
    """Under a robust rule no further ahead than one is believed to be."""
    for is_robust, last in ((False, 1000), (True, 50)):
        request = asking_group(["east"], is_robust=is_robust)[0]._request
        request._believed = 49
        sound = [then for then in range(1010) if request.is_sound(20, then, joinable())]
        assert sound == list(range(30, last + is_robust, 10))


def joinable() -> Any:
    """An algorithm of 1000 rounds that can be joined before each tenth."""
    algorithm = late_group([])[1]
    algorithm.num_rounds, algorithm.can_join = 1000, lambda round: round % 10 == 0
    algorithm.handed_on = dict
    return algorithm


@pytest.mark.parametrize(
    ("behind", "expected"),
    [
        ([1, 1, 0, 1, 1], []),  # in step
        ([5, 4, 3, 2, 1, 1], []),  # they wait
        ([40, *range(39, 1, -1)], []),
        ([4, 3, 3, 2, 2, 1, 1], []),  # twice as fast
        ([100] * 17, [8, 16]),  # as fast as they
        ([3, 4, 5, 6], [3]),  # slower
        ([3, 3, 3, 3], [3]),
    ],
)
def test_a_site_that_is_behind_judges_its_pace(behind: list[int], expected: list[int]) -> None:
    pace = Pace()
    assert [round for round, gap in enumerate(behind) if pace.is_too_slow(round, gap)] == expected


def test_a_sites_summary_says_what_came_from_whom_and_with_whom_it_agreed() -> None:
    """A restarted process does rounds 2 and 3 over again; the final agreement, round 5, counts for nothing."""

    def arrived(round: int, hop: Any = 0) -> dict[str, Any]:
        return {"event": "arrived", "peer": "east", "round": round, "hop": hop}

    def left_out(round: int, hop: str = "gossip") -> dict[str, Any]:
        return {"event": "left_out", "peers": "east, west", "round": round, "hop": hop}

    start = {"event": "started", "members": ["north", "east", "west"], "neighbors": [1, 2, 9]}
    late = {"event": "late", "peer": "east", "round": 3, "used": True, "amount": 0.5}
    first = [start, arrived(0), arrived(1), arrived(2), left_out(3)]
    second = [{"event": "connected", "peer": "east"}, start, {"event": "sent", "round": 2}, arrived(2), left_out(3)]
    third = [arrived(3), late, left_out(4), arrived(4), {**late, "round": 4, "used": False}, arrived(4, "state")]
    log = [*first, *second, *third, arrived(5), left_out(5, "roll")]
    east = {"neighbor": "east", "in_time": 3, "late_used": 1, "late_unused": 1, "missed": 0}
    west = {"neighbor": "west", "in_time": 0, "late_used": 0, "late_unused": 0, "missed": 2}
    assert contributions([*(json.dumps(event).encode() for event in log), b'{"event": "arr'], 5) == [east, west]
    summary = {
        **{"algorithm": "deca", "bytes_sent_per_peer": [1], "rounds": 5, "wall_s": 1.0, "peak_memory_bytes": 1},
        "metrics": {"average_model": {}, "peers": []},
    }
    agreement: dict[str, Any] = {"with": ["east"], "without": ["west"], "unheard": ["east"], "is_one": True}
    caption = str(summary_table({**summary, "agreement": agreement}).caption)
    assert "agreed with: east; without: west\nnot heard in the last round: east" in caption
    assert "do not all hold one model" not in caption
    del agreement["is_one"]  # as an older version wrote it
    assert "do not all hold one model" not in str(summary_table({**summary, "agreement": agreement}).caption)
    agreement["is_one"] = False
    assert "do not all hold one model" in str(summary_table({**summary, "agreement": agreement}).caption)
    assert "agreed" not in str(summary_table(summary).caption)


def test_what_a_restarted_site_does_over_again_counts_as_it_went_then() -> None:
    """Round 1 went without the neighbour at first, whose message was used late; a state is no round's message."""
    start = {"event": "started", "members": ["north", "east"], "neighbors": [1]}
    about_east = [
        *(start, ("arrived", 0, 0), ("left_out", 1, "gossip"), ("late", 1, 0)),
        *(start, ("sent", 1, 0), ("arrived", 1, 0), ("arrived", 2, "state"), ("left_out", 2, "gossip")),
    ]
    log = [
        {"event": e[0], "round": e[1], "hop": e[2], "peer": "east", "peers": "east", "used": True, "amount": 0.5}
        if isinstance(e, tuple)
        else e
        for e in about_east
    ]
    [east] = contributions([json.dumps(event).encode() for event in log], 9)
    assert east == {"neighbor": "east", "in_time": 2, "late_used": 0, "late_unused": 0, "missed": 1}


def test_what_came_after_the_last_round_counts_once_and_as_late() -> None:
    """While one waits for a neighbour who is behind, its messages arrive, and no round is left to use them."""
    start = {"event": "started", "members": ["north", "east"], "neighbors": [1]}
    log = [start, {"event": "arrived", "peer": "east", "round": 0, "hop": 0}]
    log += [{"event": "left_out", "peers": "east", "round": round, "hop": "gossip"} for round in (1, 2, 3)]
    log += [{"event": "arrived", "peer": "east", "round": round, "hop": 0} for round in (1, 2)]
    [east] = contributions([json.dumps(event).encode() for event in log], 4)
    assert east == {"neighbor": "east", "in_time": 1, "late_used": 0, "late_unused": 2, "missed": 1}


def test_a_sites_table_says_whose_numbers_they_are() -> None:
    metrics = {"before": {"loss": 2.0}, "average_model": {"loss": 1.0}, "peers": [{"loss": 1.5}, None]}
    summary: dict[str, Any] = {
        "algorithm": "deca", "bytes_sent_per_peer": [4_000, None], "rounds": 3, "peak_memory_bytes": 1, "wall_s": 1.0,
        "metrics": metrics,
    }  # fmt: skip
    heads = [str(column.header) for column in summary_table(summary).columns]
    assert heads == ["held-out", "before", "average model", "peers' own, mean", "worst peer"]
    alone = {
        **summary,
        "contributions": [],
        "agreement": {"with": [], "without": ["east"], "unheard": [], "is_one": True},
    }
    table = summary_table(alone)
    assert [str(column.header) for column in table.columns][2:] == ["this site's model", "before agreement"]
    personal = {**alone, "metrics": {**metrics, "personal": [{"loss": 1.25}, None]}}
    assert [str(column.header) for column in summary_table(personal).columns][3] == "its personal model"
    assert "sent by this site: 4" in str(table.caption) and "warning: the others end with other" in str(table.caption)


def test_no_empty_table_is_printed_where_nothing_was_held_out(capsys: pytest.CaptureFixture[str]) -> None:
    metrics: dict[str, Any] = {"before": {}, "average_model": {}, "peers": [{}, None]}
    summary: dict[str, Any] = {
        "algorithm": "deca", "bytes_sent_per_peer": [4_000, None], "rounds": 3, "peak_memory_bytes": 1, "wall_s": 1.0,
        "metrics": metrics, "contributions": [],
        "agreement": {"with": ["east"], "without": [], "unheard": [], "is_one": True},
    }  # fmt: skip
    print_summary(summary)
    told = capsys.readouterr().out
    assert "held-out" not in told and "━" not in told
    assert "deca, 2 peers, 3 rounds" in told and "sent by this site: 4" in told and "agreed with: east" in told
    metrics["before"] = metrics["average_model"] = {"loss": 1.0}
    print_summary(summary)
    assert "held-out" in capsys.readouterr().out


def test_a_long_absence_is_told_once() -> None:
    repeats = Repeats()
    rounds = [3, 4, 4, 5, 9, 10]
    told = [n for n in rounds if not repeats.is_one("left_out", {"peers": "east", "round": n})]
    assert told == [3, 9]
    assert not repeats.is_one("was_missed", {"peer": "east", "round": 10})
    assert not any(repeats.is_one("stalled", {"peer": "east", "seconds": 30.0}) for _ in range(2))


class Waiting:
    """Site 0 of two, which waits for the other's message on a clock of the test's own.

    Args:
        tick: called after each second.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tick: "Callable[[Waiting], None]") -> None:
        self.arrival: Future[Any] = Future()
        self.now, self.presence, self.edge = 0.0, Presence(2, 0, 8.0), SimpleNamespace(peer_round=0)
        self.edge.give_up = lambda key: self.arrival.set_result(None)
        self.neighbor = SimpleNamespace(
            edge=self.edge, index=1, name="east", is_connected=True, is_ejected=False, was_seen=True,
            mark_away=lambda round: True,
            miss=lambda key, corrects: self.arrival.set_result(None),
        )  # fmt: skip
        node: Any = SimpleNamespace(
            neighbors={1: self.neighbor}, index=0, has_quorum=True, turned_away="", soon=lambda call: call(),
            has_quorum_without_the_lost=True, log=lambda *_, **__: None, presence=self.presence,
            dials=lambda index: True,
        )  # fmt: skip
        waiting = self

        class Ticking(NetworkExchange):
            def attend(self) -> None:
                waiting.now += 1.0
                tick(waiting)

        monkeypatch.setattr(network.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(network, "POLL_S", 0)
        self.exchange = Ticking(node)
        self.exchange._has_begun = True

    def comes(self, patience: float, lenient_s: float) -> bool:
        """Wait; whether the message came."""
        return self.exchange._wait(1, self.arrival, patience, lenient_s, corrects=False) is not None


@pytest.mark.parametrize(
    ("rounds_in_time", "waits_s"),
    [
        ({}, 8.0),  # it does not get on: a grace
        ({second: second for second in range(1, 30)}, 30.0),  # it gets on, and comes
        ({second: second for second in range(1, 1000)}, 80.0),  # for ever: ten graces
    ],
)
def test_at_the_end_one_who_is_behind_is_waited_for_as_long_as_it_gets_on(
    rounds_in_time: dict[int, int], waits_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Second by second, the round that the neighbour has reached; once it has done 29, its message comes."""

    def tick(waiting: Waiting) -> None:
        waiting.edge.peer_round = rounds_in_time.get(int(waiting.now), waiting.edge.peer_round)
        if len(rounds_in_time) == 29 and waiting.now == 30.0:
            waiting.arrival.set_result({})

    waiting = Waiting(monkeypatch, tick)
    assert waiting.comes(1e9, 8.0) == (waits_s == 30.0) and waiting.now == pytest.approx(waits_s, abs=2)


@pytest.mark.parametrize(
    ("until_s", "comes"),
    [
        (0.0, False),  # it is there and never gets on, as when each of two waits for the other
        (250.0, False),  # it got on for a while
        (1000.0, True),
    ],
)
def test_the_final_agreement_is_waited_for_as_long_as_somebody_gets_on(
    until_s: float, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a leaf: nothing comes while its neighbour waits for a third on a slow line, but word that he gets on."""

    def tick(waiting: Waiting) -> None:
        if waiting.now % 30 == 0 and waiting.now <= until_s:
            waiting.presence.told([0.0, 0.0], [0, int(waiting.now)], waiting.now)
        if waiting.now == 1000.0:
            waiting.arrival.set_result({})

    waiting = Waiting(monkeypatch, tick)
    waiting.neighbor.mark_away = lambda round: False  # it is within reach all the time
    assert waiting.comes(100.0, 0.0) == comes
    assert waiting.now == pytest.approx(1000.0 if comes else 100.0 + until_s // 30 * 30, abs=2)


@pytest.mark.parametrize("dials", [True, False])
def test_who_waits_to_be_dialled_says_so_and_where(dials: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end alone knows what is in the way: a port that is closed, or another process at that address."""
    waiting = Waiting(monkeypatch, lambda it: it.arrival.set_result({}) if it.now == 9.0 else None)
    node, told = cast(Any, waiting.exchange._node), list[dict[str, Any]]()
    node.charter = SimpleNamespace(members=[SimpleNamespace(address="north.example.org:7000")])
    node.dials, node.log = lambda index: dials, lambda kind, **fields: told.append({"kind": kind, **fields})
    waiting.neighbor.is_connected, waiting.neighbor.mark_away = False, lambda round: False
    assert waiting.comes(math.inf, 0.0)
    hint = {} if dials else {"hint": "it dials this site, at north.example.org:7000"}
    assert told == [{"kind": "waiting", "peer": "east", "round": -1, **hint}]


@pytest.mark.parametrize(
    ("has_come", "may_go_on", "expected"), [(True, False, True), (False, True, False), (False, False, None)]
)
def test_who_leaves_ends_its_round_where_it_needs_nobody_who_is_gone(
    has_come: bool, may_go_on: bool, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when all leave at once: else it ends in the middle of a round, and its last checkpoint is an old one."""
    waiting = Waiting(monkeypatch, lambda _: None)
    waiting.neighbor.is_connected = False
    waiting.exchange._node.has_quorum_without_the_lost = may_go_on  # type: ignore[misc]
    waiting.exchange._requests = cast(Any, SimpleNamespace(is_leaving=True, ejections=dict))
    if has_come:
        waiting.arrival.set_result({})
    leaves = pytest.raises(Left, match=r"waiting for east .* goes on from the last one")
    with leaves if expected is None else nullcontext():
        assert waiting.comes(math.inf, 0.0) is expected


@pytest.mark.parametrize(
    ("hop", "has_left", "goes_on"),
    [("gossip", True, True), (ROLL, True, False), ("agree", True, False), (ROLL, False, True)],
)
def test_those_who_leave_together_in_the_final_agreement_are_back_for_it(
    hop: str, has_left: bool, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the last one of them ends the run with a model of its own, and agrees with nobody any more."""
    waiting = Waiting(monkeypatch, lambda _: None)
    waiting.neighbor.is_connected, waiting.edge.peer_has_left = False, has_left
    waiting.exchange._node.charter = cast(Any, SimpleNamespace(grace_s=8.0, stall_s=8.0, members=range(2)))
    waiting.exchange._expect = lambda *_: waiting.arrival  # type: ignore[method-assign]
    waiting.exchange._requests = cast(Any, SimpleNamespace(is_leaving=True, ejections=dict))
    wave = Hop(hop, {(i, j): 0.5 for i in range(2) for j in range(2)})
    with nullcontext() if goes_on else pytest.raises(Left, match="as east left too; the same command"):
        found = waiting.exchange.finish(7, wave, dict)
        assert found is not None and found.weights == {0: 1.0}


def test_one_more_message_below_the_quorum_ends_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pause is told once, and its end when enough are there again, whichever of the waits that is in."""

    def tick(waiting: Waiting) -> None:
        node.has_quorum = not 1.0 <= waiting.now < 20.0
        if waiting.now in (5.0, 30.0):
            waiting.arrival.set_result({})

    waiting = Waiting(monkeypatch, tick)
    node, told = cast(Any, waiting.exchange._node), list[tuple[str, float]]()
    node.log, node.present, node.quorum = lambda kind, **_: told.append((kind, waiting.now)), ["north"], 2
    waiting.neighbor.mark_away = lambda round: False
    assert waiting.comes(math.inf, 0.0)
    assert told == [("paused", 1.0)]
    waiting.arrival = Future()
    assert waiting.comes(math.inf, 0.0)
    assert told == [("paused", 1.0), ("resumed", 20.0)]


@pytest.mark.parametrize(
    ("knows", "waits_s"), [("nothing", 500.0), ("from the others", 54.0), ("from its checkpoint", 1.0)]
)
def test_at_the_start_one_is_waited_for_unless_the_run_has_begun_and_it_is_gone(
    knows: str, waits_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that was started anew, with nothing on its disk, learns from the others that the run has begun."""

    def tick(waiting: Waiting) -> None:
        if waiting.now == 50.0 and knows == "from the others":
            waiting.presence.told([0.0, 5.0], [0, 0], waiting.now)
        if waiting.now == 500.0:
            waiting.arrival.set_result({})

    waiting = Waiting(monkeypatch, tick)
    waiting.exchange._has_begun = waiting.neighbor.was_seen = waiting.neighbor.is_connected = False
    if knows == "from its checkpoint":
        waiting.exchange.load_state_dict(waiting.exchange.state_dict())
    assert waiting.comes(math.inf, 0.0) is (knows == "nothing")
    assert waiting.now == waits_s


def test_each_kind_of_message_is_waited_for_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for twice at the end of a run; and only what may be added later is fetched when it is late."""
    exchange, told = Waiting(monkeypatch, lambda _: None).exchange, []
    charter = SimpleNamespace(grace_s=8.0, stall_s=3.0, members=["north", "east"])
    monkeypatch.setattr(exchange._node, "charter", charter, raising=False)
    monkeypatch.setattr(exchange, "_expect", lambda source, like: None)
    monkeypatch.setattr(exchange, "_wait", lambda *args, **kwargs: told.append((*args[2:], kwargs["corrects"])))
    hop, out = Hop("gossip", {(i, j): 0.5 for i in range(2) for j in range(2)}, takes_late=True), {"w": torch.ones(2)}
    for corrects in (True, False):
        exchange.corrects = corrects
        exchange.finish(0, hop, lambda: out)
        exchange.finish(0, replace(hop, takes_late=False), lambda: out)
    assert told == [(math.inf, 0.0, True), *[(math.inf, 0.0, False)] * 3]
    exchange.left_out = []
    for _ in range(2):
        exchange.finish(1, replace(hop, name=ROLL, takes_late=False), lambda: out)
    assert told[4:] == [(math.inf, 8.0, False), (math.inf, 0.0, False)]
    with pytest.raises(PeerLostError, match="the final agreement went without east"):
        exchange.finish(1, replace(hop, name="agree", takes_late=False), lambda: out)
    assert told[6:] == [(2 * 8.0 + 3.0, 0.0, False)]


@pytest.mark.parametrize(
    ("method", "is_robust", "corrects"), [(LocalSteps, False, True), (LocalSteps, True, False), (Choco, False, False)]
)
def test_late_messages_correct_means_alone_and_go_around_no_robust_rule(
    method: type[LocalSteps], is_robust: bool, corrects: bool
) -> None:
    members = [SimpleNamespace(name=name, id=name, address=f"{name}:1") for name in ("north", "east")]
    node: Any = SimpleNamespace(
        index=0, charter=SimpleNamespace(members=members), start=lambda pairs: None, soon=lambda call: None
    )
    topology = Topology("pair", 2, np.array([[0.7, 0.3], [0.3, 0.7]]))
    group = NetworkGroup(node, is_robust=is_robust)
    group.open(method(cast(Any, QuadraticPeer(0)), method.Config(rounds=1), topology))
    assert group.exchange(0).corrects is corrects


@pytest.mark.parametrize(
    ("hub", "hears_another", "waits_s"), [(None, False, 1.0), (1, True, 500.0), (0, False, 500.0), (0, True, 1.0)]
)
def test_a_server_is_waited_for_and_waits_itself_while_it_hears_nobody(
    hub: int | None, hears_another: bool, waits_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = Waiting(monkeypatch, lambda it: it.arrival.set_result({}) if it.now == 500.0 else None)
    waiting.neighbor.is_out_of_reach = True
    waiting.exchange._node.neighbors[2] = cast(Any, SimpleNamespace(is_out_of_reach=not hears_another))
    waiting.exchange.hub = hub
    assert waiting.comes(math.inf, 0.0) is (waits_s == 500.0) and waiting.now == waits_s
