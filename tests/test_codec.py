"""Messages in bfloat16: right on average, half the bytes, and only where something is averaged."""

import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from peertune.algorithms import ALGORITHMS
from peertune.codec import coded, is_coded
from peertune.config import ExchangeSection, TopologySection
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox, agreement, gossip
from peertune.run import run
from peertune.runtimes import Member, rounds
from peertune.runtimes.simulation import Mailbox
from peertune.topology import Topology, build_topology
from tests.recipes import recipe
from tests.test_distributed import same_model

BFLOAT16 = ExchangeSection(codec="bfloat16")
AVERAGING = [name for name, method in ALGORITHMS.items() if method.averages and name not in ("local", "pooled")]


def ring(peers: int = 4) -> Topology:
    return build_topology(TopologySection(kind="ring"), peers, 0, [1] * peers)


def test_a_number_becomes_one_of_its_two_neighbors_and_itself_on_average() -> None:
    x = torch.tensor([1.0 + 2**-9, -1.0 - 2**-10, 3e-5, -0.0, 0.7, 1e30])
    below, above = (torch.tensor([1, -1, 0, 0, 0, 0]), torch.tensor([1.0078125, -1.0078125, 0, 0, 0, 0]))
    drawn = torch.stack([coded({"x": x}, 0, n)["x"].float() for n in range(20_000)])
    assert set(drawn[:, 0].tolist()) == {below[0].item(), above[0].item()}
    assert set(drawn[:, 1].tolist()) == {below[1].item(), above[1].item()}
    nearest = x.to(torch.bfloat16).float()
    assert ((drawn - x).abs() <= 2 * (nearest.abs() * 2**-8)).all()
    # Six standard deviations of a mean of so many; rounding to the nearest would be hundreds away.
    assert ((drawn.mean(0) - x).abs() <= 6 * x.abs() * 2**-8 / 20_000**0.5).all()
    assert torch.equal(coded({"x": nearest}, 0)["x"].float(), nearest)  # what fits is not changed


def test_infinity_and_nan_stay_what_they_are() -> None:
    found = coded({"x": torch.tensor([float("inf"), float("-inf"), float("nan"), -float("nan")])}, 0)["x"]
    assert found[:2].tolist() == [float("inf"), float("-inf")] and found[2:].isnan().all()
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32)  # the first is what GPUs make
    assert coded({"x": bits.view(torch.float32)}, 0)["x"].isnan().all()


def test_a_message_in_pieces_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    payload = {"b": torch.randn(3, 100), "a": torch.randn(7)}
    whole = coded(payload, 0)
    assert all(((x - payload[name]).abs() <= payload[name].abs() / 128).all() for name, x in whole.items())
    monkeypatch.setattr("peertune.codec.PIECE", 64)
    assert all(torch.equal(x, whole[name]) for name, x in coded(payload, 0).items())


def test_draws_are_of_their_purpose() -> None:
    payload = {"b": torch.randn(3, 100), "a": torch.randn(7)}
    one, again, other = (coded(payload, 0, peer, "codec", 5, 0) for peer in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) and one[name].shape == payload[name].shape for name in payload)
    assert not torch.equal(one["b"], other["b"])


def test_a_mean_of_coded_messages_is_float32() -> None:
    """Each by itself or side by side, to the bit the mean of what was sent."""
    payloads = [{"a": torch.randn(5, 3), "b": torch.randn(4)} for _ in range(3)]
    sent = {i: coded(payload, 0, i) for i, payload in enumerate(payloads)}
    weights = {0: 0.5, 1: 0.25, 2: 0.25}
    inbox = Inbox(weights, sent)
    plain = Inbox(weights, {i: {name: x.float() for name, x in payload.items()} for i, payload in sent.items()})
    together = {name: x for values in inbox.means(["a", "b"]) for name, x in values.items()}
    for name in ("a", "b"):
        assert inbox.mean(name).dtype == torch.float32
        assert torch.equal(inbox.mean(name), plain.mean(name)) and torch.equal(together[name], plain.mean(name))


def test_only_what_is_averaged_is_coded() -> None:
    assert is_coded(BFLOAT16, gossip(ring()))
    assert not is_coded(ExchangeSection(), gossip(ring()))
    assert is_coded(BFLOAT16, Hop("up", {(0, 2): 0.5, (1, 2): 0.5}))
    assert is_coded(BFLOAT16, Hop("pairs", {(0, 0): 0.5, (0, 1): 0.5, (1, 0): 0.5, (1, 1): 0.5, (2, 2): 1.0}))
    assert not is_coded(BFLOAT16, Hop("up", {(0, 2): 1.0}))  # one client alone
    assert not is_coded(BFLOAT16, Hop("down", {(2, 0): 1.0, (2, 1): 1.0}))
    pair = {(i, j): 0.5 for i in range(2) for j in range(2)}
    assert is_coded(BFLOAT16, Hop("outer", {**pair, (2, 2): 1.0}))  # one beside them who is on his own
    assert not is_coded(BFLOAT16, Hop("outer", {(0, 0): 1.0}))
    assert not is_coded(BFLOAT16, Hop("both", {(0, 2): 0.5, (1, 2): 0.5, (2, 0): 1.0}))  # one takes it as it is
    assert not any(is_coded(BFLOAT16, hop) for hop in agreement(ring(2), [0.5, 0.5])[1:])


def test_of_what_is_sent_only_the_own_share_is_kept_in_float32() -> None:
    """Clients take no part in their server's mean, and it has nothing of its own in it."""
    made: list[weakref.ref[torch.Tensor]] = []

    def outgoing(member: Member, hop: Hop) -> dict[str, torch.Tensor]:
        made.append(weakref.ref(x := torch.randn(5)))
        return {"x": x}

    for hop, kept in ((Hop("up", {(0, 2): 0.5, (1, 2): 0.5}), 0), (gossip(ring(3)), 3)):
        mailbox, peers = Mailbox(), [SimpleNamespace(seed=0, index=i) for i in range(3)]
        members = [Member(cast(Any, SimpleNamespace(peer=peer)), mailbox.endpoint(peer.index)) for peer in peers]
        made.clear()
        arriving = rounds._carry_coded(0, 0, hop, members, outgoing)
        _, inbox = next(arriving)
        assert sum(each() is not None for each in made) == kept
        assert [x["x"].dtype for x in inbox.payloads.values()].count(torch.float32) == min(kept, 1)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_run_sends_half_the_bytes_and_learns_alike(name: str, tmp_path: Path, micro_model: Path) -> None:
    options: dict[str, Any] = {"algorithm": {"name": name, "rounds": 6, "local_steps": 2}}
    if name in ("fedavg", "scaffold", "ditto", "diloco"):
        options["topology"] = {"kind": "star", "weights": "samples"}
    found = {}
    for codec in ("float32", "bfloat16"):
        out = tmp_path / codec
        found[codec] = run(recipe(tmp_path, micro_model, run={"out": str(out)}, exchange={"codec": codec}, **options))
    exact, rounded = found.values()
    before, after = (last_round(tmp_path / codec)["bytes_sent"] for codec in found)
    assert [2 * sent for sent in after] == before and any(before)
    if name in ("fedavg", "scaffold", "ditto", "diloco"):  # the server's answer is not averaged
        down = [[e["payload"] for e in summary["bytes_by_edge"] if e["source"] == 4] for summary in found.values()]
        assert down[0] == down[1] and all(down[0])
    gained = exact["metrics"]["before"]["loss"] - (loss := exact["metrics"]["average_model"]["loss"])
    assert 0 < abs(rounded["metrics"]["average_model"]["loss"] - loss) < 0.1 * gained


def last_round(out: Path) -> dict[str, Any]:
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "round"][-1]


@pytest.mark.parametrize("name", ["decaf", "rw_lora", "choco"])
def test_methods_that_do_not_average_are_refused(name: str, tmp_path: Path, micro_model: Path) -> None:
    with pytest.raises(ConfigError, match=rf"exchange.codec: got 'bfloat16', but {name} does not only average"):
        run(recipe(tmp_path, micro_model, exchange={"codec": "bfloat16"}, algorithm={"name": name, "rounds": 2}))


def test_a_server_and_a_complete_graph_end_with_the_same_bits(tmp_path: Path, micro_model: Path) -> None:
    """All who hear the same take the same mean: their own message, too, as the others got it."""
    options = {"name": "fedavg", "rounds": 3, "local_steps": 2}
    for kind in ("star", "complete"):
        topology = {"kind": kind, "weights": "samples"}
        sections: dict[str, Any] = {"algorithm": options, "topology": topology, "exchange": {"codec": "bfloat16"}}
        run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / kind)}, **sections))
    assert same_model(tmp_path / "star", tmp_path / "complete")


def test_a_killed_run_draws_again_what_it_drew(tmp_path: Path, micro_model: Path) -> None:
    sections: dict[str, Any] = {"exchange": {"codec": "bfloat16"}}
    run(recipe(tmp_path, micro_model, run={"out": str(tmp_path / "whole")}, **sections))
    config = recipe(tmp_path, micro_model, run={"checkpoint_every": 3}, **sections)
    run(config)
    (tmp_path / "out" / "summary.json").unlink()
    for peer in (tmp_path / "out" / "checkpoints").iterdir():
        shutil.rmtree(max(peer.iterdir()))
    assert run(config, resume=True)["rounds"] > 6
    assert same_model(tmp_path / "whole", tmp_path / "out")
