"""What a run says of itself: whose numbers stand where, and which are added up, over peers, edges and ranks."""

from types import SimpleNamespace
from typing import Any

import torch

from peertune.algorithms import METHODS
from peertune.algorithms.base import LocalReport
from peertune.algorithms.fedavg import Fedavg, FedavgConfig
from peertune.evaluation import Measured
from peertune.recipe import from_dict
from peertune.records import agreement_of, combined_fields, peer_fields, quality_of, round_event, summary_of, totals
from peertune.run_state import Agreed
from tests.quadratic import NUM_PEERS, SIZE, simulate
from tests.test_methods import SHORT, server

CONFIG = from_dict({"run": {"num_peers": NUM_PEERS}, "algorithm": {"name": "fedavg"}}, METHODS)[0]
MODEL = 2 * SIZE * 4
"""Bytes of a message."""


def measured(loss: float, **clients: float) -> Measured:
    return Measured({"loss": loss}, {client: {"loss": own} for client, own in clients.items()})


def test_a_summary_counts_bytes_by_edge_and_tells_the_servers_apart() -> None:
    members = simulate(Fedavg, FedavgConfig(**{**SHORT, "rounds": 3}), server())
    members[4].exchange.rounds_without = {2: 7}  # type: ignore[misc]
    members[5].exchange.rounds_without = {0: 1}  # type: ignore[misc]
    told = [totals(member, 1.0 + member.index, 100 - member.index) for member in members]
    found = summary_of(CONFIG, members[0].algorithm, {}, told, None, 9.0)
    assert found["bytes_sent_per_peer"] == [3 * MODEL] * NUM_PEERS
    assert found["bytes_sent_by_hub"] == 3 * NUM_PEERS * MODEL
    ways = {(edge["source"], edge["target"]): edge["payload"] for edge in found["bytes_by_edge"]}
    assert ways == {way: 3 * MODEL for i in range(NUM_PEERS) for way in ((i, NUM_PEERS), (NUM_PEERS, i))}
    headers = [edge["header"] for edge in found["bytes_by_edge"] if edge["source"] < NUM_PEERS]
    assert headers == found["header_bytes_sent_per_peer"] and min(headers) > 0
    assert [tuple(without.values()) for without in found["rounds_without"]] == [(4, 2, 7), (5, 0, 1)]
    assert (found["cpu_s_per_peer"], found["cpu_s"]) == ([1.0, 2.0, 3.0, 4.0, 5.0], 15.0), "of training"
    assert found["peak_memory_bytes"] == 100 and found["rounds"] == 3


def test_what_is_not_known_of_others_is_null() -> None:
    [member, *others] = simulate(Fedavg, FedavgConfig(**SHORT), server())
    found = summary_of(CONFIG, member.algorithm, {}, [totals(member, 2.0, 5), *[None for _ in others]], 3.0, 9.0)
    assert found["bytes_sent_per_peer"] == [4 * MODEL, None, None, None, None] and found["bytes_sent_by_hub"] is None
    assert (found["cpu_s"], found["peak_memory_bytes"], found["simulated_s"]) == (2.0, 5, 3.0)


def test_a_round_tells_of_those_who_had_a_part_in_it() -> None:
    members = simulate(Fedavg, FedavgConfig(**SHORT), server())[:3]
    for member in members:
        member.algorithm.peer.batches = SimpleNamespace(epochs=0.5 * member.index)  # type: ignore[assignment]
    reports = [None, *(LocalReport(torch.tensor(loss), torch.tensor(0.5), 0.1) for loss in (2.0, 1.0))]
    told = [peer_fields(*pair, 1.5) for pair in zip(members, reports, strict=True)]
    found = round_event(7, {"block": 3}, told, 0.25, None, 4.0)
    assert (found["round"], found["block"], found["lr"], found["consensus_distance"]) == (7, 3, 0.1, 0.25)
    assert (found["loss"], found["grad_norm"]) == ([None, 2.0, 1.0], [None, 0.5, 0.5])
    assert (found["epochs"], found["bytes_sent"]) == ([0.0, 0.5, 1.0], [4 * MODEL] * 3)
    assert (found["cpu_s"], found["left_out"]) == (4.5, None)
    told[1]["left_out"] = [2]
    assert round_event(7, {}, told, None, None, 4.0)["left_out"] == [[], [2], []]


def test_what_the_ranks_of_a_peer_sent_adds_up_and_their_memory_does_not() -> None:
    ranks: list[dict[str, Any]] = [
        {
            "bytes_sent": 10 * n, "header_bytes_sent": n, "cpu_s": 0.5 * n, "peak_memory_bytes": 50 * n,
            "bytes_by_target": [(1, 6 * n, n), (4, 4 * n, 0)], "rounds_without": {},
        }
        for n in (1, 2)
    ]  # fmt: skip
    assert combined_fields(ranks) == {
        "bytes_sent": 30, "header_bytes_sent": 3, "cpu_s": 1.5, "peak_memory_bytes": 100,
        "bytes_by_target": [(1, 18, 3), (4, 12, 0)], "rounds_without": {},
    }  # fmt: skip
    rounds = [{"loss": 2.0, "epochs": 1.0, "bytes_sent": n, "cpu_s": 1.0} for n in (3, 4)]
    assert combined_fields(rounds) == {"loss": 2.0, "epochs": 1.0, "bytes_sent": 7, "cpu_s": 2.0}


def test_quality_before_after_and_of_each_peer_do_not_change_places() -> None:
    before, agreed, own = measured(3.0, x=3.5), measured(1.0, x=1.5), [measured(2.0, x=2.5), None]
    assert quality_of(before, agreed, own, [measured(0.5), measured(0.25)]) == {
        "before": {"loss": 3.0}, "average_model": {"loss": 1.0}, "peers": [{"loss": 2.0}, None],
        "personal": [{"loss": 0.5}, {"loss": 0.25}],
        "by_client": {
            "before": {"x": {"loss": 3.5}}, "average_model": {"x": {"loss": 1.5}},
            "peers": [{"x": {"loss": 2.5}}, None],
        },
    }  # fmt: skip
    assert quality_of(measured(3.0), measured(1.0), [], []).keys() == {"before", "average_model", "peers"}


def test_a_site_tells_with_whom_it_agreed() -> None:
    names = ["east", "north", "south"]
    both = ["east", "south"]
    found = agreement_of(names, 1, Agreed(4, [2], is_reached=True))
    assert found == {"with": ["east"], "without": ["south"], "unheard": [], "is_one": True}
    found = agreement_of(names, 1, Agreed(4, is_one=False, is_reached=True, unheard=[0]))
    assert found == {"with": both, "without": [], "unheard": ["east"], "is_one": False}
    alone = {"with": [], "without": both, "unheard": [], "is_one": True}
    assert agreement_of(names, 1, Agreed(is_reached=False)) == alone, "the model is its own"
    assert agreement_of(names, 1, Agreed(is_reached=True)) is None, "there is one anyway"
