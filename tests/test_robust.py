"""Robust means: against NumPy references, exact where nobody lies, and against liars in real runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from peertune import robust as module
from peertune.algorithms import ALGORITHMS
from peertune.algorithms.base import Algorithm, LocalReport
from peertune.checkpoint import CheckpointStore
from peertune.config import ExchangeSection
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox, Payload
from peertune.robust import check_rule, robust_inbox
from peertune.run import run
from tests.recipes import recipe
from tests.test_consortium import NAMES, Consortium

CLIP, TRIM = ExchangeSection(robust="clip"), ExchangeSection(robust="trimmed_mean")


def make_inbox(seed: int, sources: list[int], shape: tuple[int, ...] = (5, 3)) -> Inbox:
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(len(sources)))
    payloads = {j: {"w": torch.tensor(rng.normal(size=shape), dtype=torch.float32)} for j in sources}
    return Inbox(dict(zip(sources, map(float, weights), strict=True)), payloads)


def stacked(inbox: Inbox, peer: int) -> tuple[list[int], np.ndarray, np.ndarray | None]:
    """Whom a peer hears, their values [others, ...] and its own, float64."""
    others = [j for j in sorted(inbox.weights) if j != peer]
    values = np.array([inbox.payloads[j]["w"].double().numpy() for j in others])
    return others, values, inbox.payloads[peer]["w"].double().numpy() if peer in inbox.weights else None


def clipped(inbox: Inbox, peer: int, factor: float) -> np.ndarray:
    """c + sum_j w_j clip(x_j - c, tau)."""
    others, values, own = stacked(inbox, peer)
    centre = np.sort(values, 0)[(len(others) - 1) // 2] if own is None else own
    norms = [np.linalg.norm(x - centre) for x in values]
    tau = factor * np.sort(norms)[(len(norms) - 1) // 2]
    moves = [inbox.weights[j] * (x - centre) * min(1, tau / d) for j, x, d in zip(others, values, norms, strict=True)]
    return np.asarray(centre + sum(moves))


def trimmed(inbox: Inbox, peer: int, trim: int) -> np.ndarray:
    """Coordinate by coordinate, in a loop."""
    others, values, own = stacked(inbox, peer)
    found = np.empty(values.shape[1:])
    for place in np.ndindex(found.shape):
        ranked = sorted((float(x[place]), j) for j, x in zip(others, values, strict=True))
        kept = [(v, inbox.weights[j]) for v, j in ranked[trim : len(ranked) - trim]]
        if own is not None:
            kept.append((float(own[place]), inbox.weights[peer]))
        found[place] = sum(v * w for v, w in kept) / sum(w for _, w in kept)
    return found


SOURCES = st.lists(st.integers(0, 20), min_size=6, max_size=12, unique=True)


@given(seed=st.integers(0, 99), sources=SOURCES, is_server=st.booleans(), factor=st.sampled_from([0.5, 1.0, 2.0]))
def test_clip_is_the_numpy_reference(seed: int, sources: list[int], is_server: bool, factor: float) -> None:
    inbox, peer = make_inbox(seed, sources), 21 if is_server else sources[0]
    rule = ExchangeSection(robust="clip", clip_factor=factor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 4)  # so that a server's median has several pieces, the last one short
        np.testing.assert_allclose(
            robust_inbox(rule, peer, inbox).mean("w").numpy(), clipped(inbox, peer, factor), atol=1e-5
        )


@given(seed=st.integers(0, 99), sources=SOURCES, is_server=st.booleans(), trim=st.sampled_from([1, 2]))
def test_trimmed_mean_is_the_numpy_reference(seed: int, sources: list[int], is_server: bool, trim: int) -> None:
    inbox, peer = make_inbox(seed, sources), 21 if is_server else sources[0]
    for payload in inbox.payloads.values():
        payload["w"].round_()  # so that some are equal
    rule = ExchangeSection(robust="trimmed_mean", trim=trim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 4)  # so that a tensor has several pieces, the last one short
        np.testing.assert_allclose(
            robust_inbox(rule, peer, inbox).mean("w").numpy(), trimmed(inbox, peer, trim), atol=1e-5
        )


@given(seed=st.integers(0, 99), sources=SOURCES, is_server=st.booleans())
def test_equal_messages_come_out_exactly(seed: int, sources: list[int], is_server: bool) -> None:
    """Clipping gives bitwise what the plain mean does, and trimming the message itself."""
    inbox, peer = make_inbox(seed, sources), 21 if is_server else sources[0]
    same = inbox.payloads[sources[0]]
    inbox = Inbox(inbox.weights, dict.fromkeys(sources, same))
    assert torch.equal(robust_inbox(CLIP, peer, inbox).mean("w"), inbox.mean("w"))
    assert torch.equal(robust_inbox(TRIM, peer, inbox).mean("w"), same["w"])


def test_where_nothing_is_clipped_it_is_bitwise_the_plain_mean_and_none_is_the_inbox_itself() -> None:
    inbox = make_inbox(0, [0, 1, 2, 3])
    wide = ExchangeSection(robust="clip", clip_factor=100.0)
    assert torch.equal(robust_inbox(wide, 2, inbox).mean("w"), inbox.mean("w"))
    assert robust_inbox(ExchangeSection(), 2, inbox) is inbox


@pytest.mark.parametrize("peer", [1, 5])
@pytest.mark.parametrize("rule", [CLIP, TRIM], ids=["clip", "trimmed_mean"])
def test_of_messages_in_bfloat16_it_is_the_mean_in_float32_without_a_copy_of_all(
    rule: ExchangeSection, peer: int
) -> None:
    """Also where the own one is, too, or there is none."""
    sent = make_inbox(3, [0, 1, 2, 3, 4])
    sent = Inbox(sent.weights, {i: {"w": payload["w"].bfloat16()} for i, payload in sent.payloads.items()})
    plain = Inbox(sent.weights, {i: {"w": payload["w"].float()} for i, payload in sent.payloads.items()})
    found = robust_inbox(rule, peer, sent)
    assert found.payloads is sent.payloads and found.mean("w").dtype == torch.float32
    assert torch.equal(found.mean("w"), robust_inbox(rule, peer, plain).mean("w"))


@pytest.mark.parametrize("is_server", [False, True])
@pytest.mark.parametrize("value", [1e4, -1e15, 1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("rule", [CLIP, TRIM], ids=["clip", "trimmed_mean"])
def test_one_message_moves_the_mean_no_further_than_the_good_ones(
    rule: ExchangeSection, value: float, is_server: bool
) -> None:
    inbox = make_inbox(1, [0, 1, 2, 3, 4], (50, 40))
    honest = [inbox.payloads[j]["w"].double().numpy() for j in (0, 1, 3, 4)]
    inbox.payloads[2]["w"].fill_(value)  # type: ignore[index]
    found = robust_inbox(rule, 9 if is_server else 0, inbox).mean("w").double().numpy()
    spread = max(np.linalg.norm(a - b) for a in honest for b in honest)
    assert min(np.linalg.norm(found - a) for a in honest) <= spread
    assert np.abs(found).max() < 10


def test_what_is_no_number_is_left_out_as_the_largest() -> None:
    """Not taken for a 0, which may lie among the good ones."""
    values = (float("nan"), -1.0, 1.0, 2.0)
    inbox = Inbox(dict.fromkeys(range(4), 0.25), {j: {"w": torch.tensor([x])} for j, x in enumerate(values)})
    assert robust_inbox(TRIM, 9, inbox).mean("w").tolist() == [1.5]


def test_garbage_that_all_of_the_neighbors_send_leaves_the_own_message() -> None:
    inbox = make_inbox(2, [0, 1, 2, 3])
    for j in (1, 2, 3):
        inbox.payloads[j]["w"].fill_(float("inf"))
    assert torch.equal(robust_inbox(CLIP, 0, inbox).mean("w"), inbox.payloads[0]["w"])
    to_server = Inbox({j: 1 / 3 for j in (1, 2, 3)}, inbox.payloads)
    assert not robust_inbox(CLIP, 9, to_server).mean("w").isfinite().any()  # of which its loss tells


@pytest.mark.parametrize("rule", [CLIP, TRIM], ids=["clip", "trimmed_mean"])
def test_a_lone_neighbor_is_not_believed_and_a_lone_answer_is(rule: ExchangeSection) -> None:
    """The rest of the neighbours are away; a client hears nobody but its server."""
    pair = make_inbox(3, [0, 1])
    np.testing.assert_allclose(robust_inbox(rule, 0, pair).mean("w"), pair.payloads[0]["w"], rtol=1e-6)
    answer = Inbox({5: 1.0}, {5: pair.payloads[1]})
    assert torch.equal(robust_inbox(rule, 0, answer).mean("w"), pair.payloads[1]["w"])


@pytest.mark.parametrize("rule", [CLIP, TRIM], ids=["clip", "trimmed_mean"])
def test_one_who_hears_nobody_keeps_its_own(rule: ExchangeSection) -> None:
    alone = make_inbox(3, [0])
    torch.testing.assert_close(robust_inbox(rule, 0, alone).mean("w"), alone.payloads[0]["w"])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_with_few_messages_a_server_trims_what_it_can_and_a_peer_keeps_its_own(count: int) -> None:
    """As many members are away as the recipe's trim does not reckon with."""
    rule, inbox = ExchangeSection(robust="trimmed_mean", trim=2), make_inbox(4, list(range(count + 1)))
    torch.testing.assert_close(robust_inbox(rule, 0, inbox).mean("w"), inbox.payloads[0]["w"])
    to_server = make_inbox(5, list(range(count)))
    expected = torch.tensor(trimmed(to_server, 9, (count - 1) // 2), dtype=torch.float32)
    torch.testing.assert_close(robust_inbox(rule, 9, to_server).mean("w"), expected)


def everyone_to_everyone(count: int) -> list[Hop]:
    return [Hop("gossip", {(i, j): 1 / count for i in range(count) for j in range(count)})]


def test_graphs_that_are_too_thin_and_methods_without_a_mean_are_refused() -> None:
    check_rule(CLIP, "deca", True, everyone_to_everyone(3))
    check_rule(CLIP, "deca", True, everyone_to_everyone(1))
    check_rule(TRIM, "deca", True, everyone_to_everyone(4))
    with pytest.raises(ConfigError, match="peer 0 hears only 1 others, expected 2"):
        check_rule(CLIP, "deca", True, everyone_to_everyone(2))
    with pytest.raises(ConfigError, match="peer 0 hears only 4 others, expected 5"):
        check_rule(TRIM.model_copy(update={"trim": 2}), "deca", True, everyone_to_everyone(5))
    up, down = Hop("up", {(0, 2): 0.5, (1, 2): 0.5}), Hop("down", {(2, 0): 1.0, (2, 1): 1.0})
    check_rule(CLIP, "fedavg", True, [down])
    with pytest.raises(ConfigError, match="peer 2 hears only 2 others, expected 3"):
        check_rule(CLIP, "fedavg", True, [up, down])
    with pytest.raises(ConfigError, match="decaf takes no mean"):
        check_rule(CLIP, "decaf", ALGORITHMS["decaf"].averages, everyone_to_everyone(5))
    check_rule(ExchangeSection(), "decaf", False, everyone_to_everyone(1))


BAD = (1, 4)


def garbage(start: Tensor, trained: Tensor, rng: torch.Generator) -> Tensor:
    """Nothing to do with the model, and a hundred times as large."""
    return 100 * trained.norm() / trained.numel() ** 0.5 * torch.randn(trained.shape, generator=rng)


def flipped(start: Tensor, trained: Tensor, rng: torch.Generator) -> Tensor:
    """The local phase's step, backwards and ten times as far."""
    return start - 10 * (trained - start)


def attackers(method: type[Algorithm], attack: Any) -> type[Algorithm]:
    """The method, two of whose peers lie about what they trained, and take in nothing themselves."""

    class Attacked(method):  # type: ignore[valid-type, misc]
        def local(self, round: int) -> LocalReport | None:
            self.start = {name: self.masters.snapshot(name) for name in self.common}
            self.rng_round = round
            return super().local(round)

        def outgoing(self, hop: Hop) -> Payload:
            out: Payload = super().outgoing(hop)
            if self.peer.index not in BAD:
                return out
            rng = torch.Generator().manual_seed(1000 * self.rng_round + self.peer.index)
            return {name: attack(self.start[name], out[name], rng) for name in sorted(out)}

        def mix(self, hop: Hop, inbox: Inbox) -> None:
            if self.peer.index not in BAD or hop.name == "down":
                super().mix(hop, inbox)

    return Attacked


TRIED: dict[str, tuple[Any, dict[str, Any]]] = {
    "deca": (
        garbage,
        {
            "algorithm": {"name": "deca", "outer_rounds": 1, "inner_steps": 4, "layers_per_block": 2, "lr": 3e-3},
            "topology": {"kind": "complete"},
        },
    ),
    "fedavg": (
        flipped,
        {
            "algorithm": {"name": "fedavg", "rounds": 6, "local_steps": 2, "lr": 3e-3},
            "topology": {"kind": "star", "weights": "samples"},
        },
    ),
}


def honest_loss(folder: Path, name: str, rule: str, attack: Any) -> tuple[float, float]:
    """Loss before a run on the packaged base, and after it that of the honest peers' own models, their mean."""
    config = recipe(
        folder,
        Path("tiny"),
        run={"num_peers": 8, "out": str(folder / f"{rule}-{attack is not None}")},
        model={"max_length": 32},
        data={"partition": {"kind": "iid"}},
        exchange={"robust": rule, "trim": 2},
        **TRIED[name][1],
    )
    with pytest.MonkeyPatch.context() as patch:
        if attack is not None:
            patch.setitem(ALGORITHMS, name, attackers(ALGORITHMS[name], attack))
        metrics = run(config)["metrics"]
    own = [peer["loss"] for i, peer in enumerate(metrics["peers"]) if i not in BAD]
    return metrics["before"]["loss"], sum(own) / len(own)


@pytest.mark.parametrize("name", TRIED)
def test_two_liars_of_eight_ruin_a_plain_mean_and_no_robust_one(name: str, tmp_path: Path) -> None:
    """With a robust rule the honest peers lose at most half a nat of the four and a half they win undisturbed."""
    attack = TRIED[name][0]
    before, undisturbed = honest_loss(tmp_path, name, "none", None)
    assert undisturbed < before - 4
    assert honest_loss(tmp_path, name, "none", attack)[1] > 2 * before
    for rule in ("clip", "trimmed_mean"):
        assert honest_loss(tmp_path, name, rule, attack)[1] < undisturbed + 0.5, rule


def test_sites_end_with_bitwise_the_weights_of_the_simulation(tmp_path: Path, micro_model: Path) -> None:
    """Each its own: they do not agree on one."""
    consortium = Consortium(tmp_path, micro_model, {}, exchange={"robust": "clip"})
    summary = run(consortium.config)
    consortium.ended({site: consortium.site(site) for site in NAMES})
    simulated, models = CheckpointStore(tmp_path / "simulated" / "run" / "checkpoints"), []
    for index, site in enumerate(NAMES):
        there = CheckpointStore(tmp_path / site / "run" / "checkpoints")
        expected, found = (store.load(index, summary["rounds"])[0] for store in (simulated, there))
        assert expected.keys() == found.keys() and all(torch.equal(expected[n], found[n]) for n in found)
        models.append(torch.cat([found[n].flatten() for n in sorted(found) if n.startswith("weights/")]))
        assert not consortium.events(site, "agreement", "events.jsonl")
    assert not torch.equal(models[0], models[1])


def test_sites_end_with_the_model_of_a_robust_server(tmp_path: Path, micro_model: Path) -> None:
    """Bitwise that of the simulation."""
    algorithm = {"name": "fedavg", "rounds": 2, "local_steps": 2}
    star = {"kind": "star", "weights": "samples"}
    consortium = Consortium(tmp_path, micro_model, algorithm, topology=star, exchange={"robust": "trimmed_mean"})
    run(consortium.config)
    consortium.ended({site: consortium.site(site) for site in consortium.names})
    consortium.assert_agreed(["simulated", *consortium.names])


def test_methods_that_cannot_be_made_robust_are_refused_before_a_run(tmp_path: Path, micro_model: Path) -> None:
    config = recipe(tmp_path, micro_model, exchange={"robust": "clip"}, algorithm={"name": "rw_lora", "rank": 2})
    with pytest.raises(ConfigError, match="rw_lora takes no mean"):
        run(config)
    # DECA's first block, in whose turn nothing is sent.
    first = {"local_modules": ["embed_tokens", "layers.0.", "layers.1."]}
    config = recipe(tmp_path, micro_model, exchange={"robust": "trimmed_mean"}, algorithm=first)
    with pytest.raises(ConfigError, match="peer 0 hears only 2 others, expected 3"):
        run(config)
    assert not (tmp_path / "out").exists()
