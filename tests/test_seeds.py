"""Seeds: one for each purpose, the same at all sites and in all versions."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from peertune.algorithms import METHODS
from peertune.assemble import make_batches
from peertune.data.render import Sample
from peertune.peer import Peer
from peertune.recipe import from_dict
from peertune.seeds import derive_seed, numpy_rng, torch_rng


def test_seeds_of_other_purposes_are_others() -> None:
    """Seed 1 of peer 11 is not seed 11 of peer 1: runs over several seeds would share their draws."""
    purposes = [(), *((a,) for a in range(13)), *((a, b) for a in range(13) for b in (*range(13), "batches"))]
    seeds = {derive_seed(seed, *purpose) for seed in range(13) for purpose in purposes}
    assert len(seeds) == 13 * len(purposes) and all(0 <= seed < 2**63 for seed in seeds)


def test_draws_hang_on_the_purpose_alone() -> None:
    assert derive_seed(7, 3, "batches", 1) == 5_045_342_255_062_097_042, "runs of older versions could not be repeated"
    torch.manual_seed(1)
    one = numpy_rng(7, "walk").random(), torch.rand(1, generator=torch_rng(7, "walk")).item()
    torch.manual_seed(2)
    assert one == (numpy_rng(7, "walk").random(), torch.rand(1, generator=torch_rng(7, "walk")).item())


def peer(index: int, seed: int = 0) -> Peer:
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    return Peer(index, model, [], None, seed)


def test_what_a_model_draws_follows_from_run_peer_and_step_alone() -> None:
    """Whatever was drawn before; and nothing outside is drawn otherwise for it."""
    before = torch.get_rng_state()
    drawn: dict[tuple[float, ...], list[tuple[int, int, int]]] = {}
    for index, seed, step in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        with peer(index, seed).drawing(step):
            drawn.setdefault(tuple(torch.rand(3).tolist()), []).append((index, seed, step))
    assert sorted(map(len, drawn.values())) == [1, 1, 1, 2]
    assert torch.equal(torch.get_rng_state(), before)


def test_peers_go_through_their_rows_in_orders_of_their_own() -> None:
    """Though they hold as many; and a run with another seed goes otherwise."""
    samples = [Sample(np.full(3, i, dtype=np.int32), np.arange(3) > 0) for i in range(40)]
    held: Any = SimpleNamespace(
        train={i: SimpleNamespace(samples=samples) for i in (0, 1)}, tokenizer=SimpleNamespace(pad_token_id=0)
    )

    def orders(seed: int, pools: bool = False) -> list[list[int]]:
        config = from_dict({"run": {"seed": seed}, "data": {"batch_size": 20}}, METHODS)[0]
        made = make_batches(config, held, pools).values()
        return [list(each.next().sample_ids) for each in made]

    one, other = orders(0)
    assert one != other and orders(0) == [one, other] and one not in orders(1)
    assert orders(0, pools=True) == [[*one, *(40 + i for i in other)]], "a pooled model's steps are of the same rows"
