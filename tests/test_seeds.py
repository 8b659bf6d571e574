"""Seeds: one for each purpose, the same at all sites and in all versions."""

import torch

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
