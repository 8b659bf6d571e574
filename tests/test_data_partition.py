"""Partitions: every row to exactly one peer, the same for the same seed, skewed as published."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peertune.config import DataSection, PartitionSection
from peertune.data.partition import describe_partition, partition, rows_of_site
from peertune.errors import DataError

KINDS = ("iid", "dirichlet", "quantity", "column", "files")


def config(kind: str, *, max_samples: int = 0, task: str = "classification", **keys: Any) -> DataSection:
    return DataSection(
        task=task, max_samples=max_samples, partition=PartitionSection.model_validate({"kind": kind, **keys})
    )


def rows(count: int, num_classes: int = 4) -> list[dict[str, Any]]:
    return [{"text": str(i), "label": f"class {i % num_classes}"} for i in range(count)]


def split(kind: str, count: int, num_peers: int, seed: int = 0, num_classes: int = 4, **keys: Any) -> list[list[int]]:
    files = [i * max(num_peers, 3) // count for i in range(count)]
    parts = partition(rows(count, num_classes), files, num_peers, config(kind, **keys), seed)
    assert all(part.dtype == np.int64 for part in parts)
    return [part.tolist() for part in parts]


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(60, 200), st.integers(0, 10**9), st.floats(0.2, 100))
def test_no_row_is_lost_or_given_twice(kind: str, num_peers: int, count: int, seed: int, alpha: float) -> None:
    parts = split(kind, count, num_peers, seed, num_classes=8, alpha=alpha)
    assert len(parts) == num_peers
    assert all(part and part == sorted(part) for part in parts)
    assert sorted(i for part in parts for i in part) == list(range(count))
    assert split(kind, count, num_peers, seed, num_classes=8, alpha=alpha) == parts


@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 30), st.integers(0, 10**9))
def test_max_samples_caps_each_peer(kind: str, num_peers: int, cap: int, seed: int) -> None:
    whole = split(kind, 120, num_peers, seed, num_classes=8)
    capped = split(kind, 120, num_peers, seed, num_classes=8, max_samples=cap)
    for all_rows, kept in zip(whole, capped, strict=True):
        assert len(kept) == min(cap, len(all_rows)) and kept == sorted(set(kept)) and set(kept) <= set(all_rows)


def test_max_samples_are_drawn_from_all_that_a_peer_holds() -> None:
    """Files are often sorted; and peers draw apart from each other."""
    one, other = partition(rows(200), [i // 100 for i in range(200)], 2, config("files", max_samples=20), 0)
    assert one[-1] >= 50 and one.tolist() != (other - 100).tolist()


@pytest.mark.parametrize("cap", [0, 20])
def test_sites_train_on_the_rows_that_their_files_are_dealt(cap: int) -> None:
    section = config("files", max_samples=cap, min_size=2)
    dealt = partition(rows(200), [i // 100 for i in range(200)], 2, section, 7)
    for site, piece in enumerate(dealt):
        assert (rows_of_site(100, site, section, 7) + 100 * site).tolist() == piece.tolist()
    with pytest.raises(DataError, match=r"got 1 rows, expected at least data.partition.min_size = 2"):
        rows_of_site(1, 0, section, 7)
    assert rows_of_site(2, 0, section, 7).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
def test_seed_decides(kind: str) -> None:
    assert split(kind, 100, 4, seed=1) != split(kind, 100, 4, seed=2)


@given(st.sampled_from(["dirichlet", "quantity"]), st.integers(0, 10**9), st.integers(2, 9))
def test_every_peer_holds_min_size(kind: str, seed: int, least: int) -> None:
    assert min(map(len, split(kind, 150, 5, seed, alpha=0.5, min_size=least))) >= least


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity"])
def test_rows_that_just_suffice_are_dealt(kind: str) -> None:
    assert list(map(len, split(kind, 6, 2, num_classes=2, alpha=10.0, min_size=3))) == [3, 3]


def test_iid_sizes_are_equal_to_within_one() -> None:
    assert sorted(map(len, split("iid", 103, 8))) == [12] + [13] * 7


def label_skew(alpha: float) -> float:
    """Mean total variation distance of a peer's classes to all rows', weighted by its rows."""
    total = 0.0
    for seed in range(8):
        for part in split("dirichlet", 400, 8, seed, alpha=alpha):
            shares = np.bincount([i % 4 for i in part], minlength=4) / len(part)
            total += len(part) / 400 * np.abs(shares - 0.25).sum() / 2
    return total / 8


def test_a_class_is_dealt_alike_whichever_comes_first() -> None:
    dealt = []
    for data in (rows(200), rows(200)[::-1]):
        parts = partition(data, [0] * 200, 3, config("dirichlet"), 0)
        dealt.append([Counter(data[i]["label"] for i in part) for part in parts])
    assert dealt[0] == dealt[1] and dealt[0][0] != dealt[0][1]


def test_label_skew_falls_with_alpha() -> None:
    skews = [label_skew(alpha) for alpha in (0.1, 0.5, 2.0, 100.0)]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.5 and skews[-1] < 0.1


def test_dirichlet_shares_have_the_published_moments() -> None:
    # a share of Dir_N(alpha) has mean 1/N and variance (N - 1) / (N^2 (N alpha + 1)): 1/2 and 1/12
    sizes = np.array([[len(part) for part in split("quantity", 1000, 2, seed, alpha=1.0)] for seed in range(600)])
    shares = sizes[:, 0] / 1000
    assert abs(shares.mean() - 0.5) < 0.04
    assert abs(shares.var() - 1 / 12) < 0.01


def test_quantity_keeps_labels_iid() -> None:
    large = max(split("quantity", 4000, 4, alpha=0.3), key=len)
    assert np.abs(np.bincount([i % 4 for i in large], minlength=4) / len(large) - 0.25).max() < 0.05


def test_column_keeps_values_whole_and_balances() -> None:
    data = [
        {"text": "", "client": name} for name, n in zip("fedcba", (9, 7, 5, 4, 3, 2), strict=True) for _ in range(n)
    ]
    parts = partition(data, [0] * 30, 3, config("column", task="text"), 0)
    assert [sorted({data[i]["client"] for i in part}) for part in parts] == [["a", "f"], ["b", "e"], ["c", "d"]]
    parts = partition(data, [0] * 30, 1, config("column", task="text", column="client"), 0)
    assert len(parts[0]) == 30
    mixed = [{"text": "", "client": value} for value in (1, "a", None)]
    assert sorted(map(len, partition(mixed, [0] * 3, 3, config("column", task="text"), 0))) == [1, 1, 1]


def test_files_go_whole_to_one_peer() -> None:
    files = [0, 0, 1, 2, 3, 3, 3, 4]
    parts = partition(rows(8), files, 2, config("files"), 0)
    assert [part.tolist() for part in parts] == [[0, 1, 3, 7], [2, 4, 5, 6]]


def test_dirichlet_skews_the_column_that_is_named() -> None:
    data = [{"text": "", "label": "x", "site": i % 4} for i in range(400)]
    parts = partition(data, [0] * 400, 4, config("dirichlet", column="site", alpha=0.05), 3)
    assert max(np.bincount(part % 4).max() / len(part) for part in parts) > 0.8


def test_description_counts_classes_largest_first() -> None:
    data = [{"text": "", "label": name} for name in "aababc"]
    parts = [np.array([0, 1, 2, 3]), np.array([4, 5])]
    assert describe_partition(data, parts, config("iid")) == [
        {"samples": 4, "classes": {"a": 3, "b": 1}, "others": 0},
        {"samples": 2, "classes": {"b": 1, "c": 1}, "others": 0},
    ]
    assert list(describe_partition(data, parts, config("iid"))[0]["classes"]) == ["a", "b"]
    assert describe_partition([{"text": ""}] * 6, parts, config("iid", task="text"))[0] == {
        "samples": 4, "classes": {}, "others": 0
    }  # fmt: skip
    some = [{"text": ""}, *({"text": "", "client": 1} for _ in range(5))]
    assert describe_partition(some, parts, config("iid", task="text"))[0]["classes"] == {}, "not all have a client"
    many = [{"text": "", "client": i // 2} for i in range(300)]  # 150 of two rows
    halves = describe_partition(many, [np.arange(0, 300, 2), np.arange(1, 300, 2)], config("iid", task="text"))
    assert halves[0] == halves[1]  # the same hundred classes of both
    assert len(halves[0]["classes"]) == 100 and halves[0]["others"] == 50


@pytest.mark.parametrize(
    ("section", "count", "num_peers", "message"),
    [
        (config("iid"), 3, 4, "got 3 rows for 4 peers.*lower run.num_peers"),
        (config("iid", min_size=5), 12, 4, "min_size = 5 rows a peer"),
        (config("iid", min_size=5, max_samples=4), 50, 4, "data.max_samples: got 4"),
        (
            config("dirichlet", alpha=0.001, min_size=20),
            100,
            5,
            "1000 draws with alpha = 0.001.*raise data.partition.alpha",
        ),
        (config("dirichlet", task="text"), 30, 3, "neither labels nor 'client'.*data.partition.column"),
        (config("column", column="nowhere"), 30, 3, "row 1 has no field 'nowhere'.*text, label"),
        (config("column"), 30, 5, "'label' has 4 values for 5 peers.*num_peers to 4"),
        (config("files"), 30, 3, "got 2 files for 3 peers"),
    ],
)
def test_refusals_say_what_to_change(section: DataSection, count: int, num_peers: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(rows(count), [i % 2 for i in range(count)], num_peers, section, 0)


def test_refuses_whole_groups_smaller_than_min_size() -> None:
    with pytest.raises(DataError, match="peer 1 would hold 2 rows, expected at least min_size = 3"):
        partition(rows(8), [0, 0, 0, 0, 0, 0, 1, 1], 2, config("files", min_size=3), 0)
