"""Deal the training rows to the peers: every row to exactly one, the same way for the same seed.

- iid: shuffled, sizes equal to within one row.
- dirichlet: label skew. For each class k draw p_k ~ Dir_N(alpha) and give peer j the share p_kj of its rows
  (Yurochkin et al. 2019, arXiv 1905.12022, section 4; Li et al. 2022, NIID-Bench, arXiv 2102.02079, section IV-A).
- quantity: quantity skew. Draw q ~ Dir_N(alpha), give peer j the share q_j of the shuffled rows (NIID-Bench, IV-C).
- column: natural owners. Each value of a field goes whole to one peer.
- files: each file goes whole to one peer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peertune.config import DataSection
from peertune.errors import DataError
from peertune.seeds import numpy_rng

Indices = NDArray[np.int64]
Rows = Sequence[Mapping[str, Any]]

MAX_DRAWS = 1000
"""Draws of a whole partition before `min_size` is given up."""
MAX_CLASSES = 100
"""Classes that descriptions list at most."""


def partition(rows: Rows, source: Sequence[int], num_peers: int, config: DataSection, seed: int) -> list[Indices]:
    """Split rows over peers as `config.partition` says.

    Args:
        rows: the training rows.
        source: file index of each row [num_rows].
        num_peers: N.
        config: the partition's kind and keys, and `max_samples`.
        seed: the partition's own seed, already resolved.
    Returns:
        For each peer the sorted indices of its rows. Together they hold every row once, unless `max_samples` caps them.
    Raises:
        DataError: too few rows, values or files for the peers, or a field to split by is missing.
    """
    part = config.partition
    if num_peers * part.min_size > len(rows):
        least = "one row" if part.min_size == 1 else f"data.partition.min_size = {part.min_size} rows"
        raise DataError(
            f"data: got {len(rows)} rows for {num_peers} peers, expected at least {least} a peer; "
            "give more rows or lower run.num_peers"
        )
    if 0 < config.max_samples < part.min_size:
        raise DataError(
            f"data.max_samples: got {config.max_samples}, expected 0 or no less than "
            f"data.partition.min_size = {part.min_size}"
        )
    rng = numpy_rng(seed, "partition")
    if part.kind == "iid":
        parts = [piece.astype(np.int64) for piece in np.array_split(rng.permutation(len(rows)), num_peers)]
    elif part.kind == "dirichlet":
        groups = _groups(rows, _require_column(rows, config))
        parts = _dirichlet(list(groups.values()), num_peers, part.alpha, part.min_size, rng)
    elif part.kind == "quantity":
        parts = _dirichlet([np.arange(len(rows))], num_peers, part.alpha, part.min_size, rng)
    elif part.kind == "column":
        column = _require_column(rows, config)
        parts = _whole_groups(_groups(rows, column), num_peers, column)
    else:
        parts = _files(np.asarray(source, dtype=np.int64), num_peers)
    for peer, piece in enumerate(parts):
        if len(piece) < part.min_size:  # only `column` and `files`, where nothing is drawn
            raise DataError(
                f"data.partition: peer {peer} would hold {len(piece)} rows, expected at least min_size = "
                f"{part.min_size}; lower run.num_peers or data.partition.min_size"
            )
    return [_capped(piece, config, seed, peer) for peer, piece in enumerate(parts)]


def rows_of_site(num_rows: int, peer: int, config: DataSection, seed: int) -> Indices:
    """Which of the rows that a peer brings itself it trains on; as `partition` deals them where a file is a peer.

    Returns:
        Their sorted indices: all, unless `max_samples` caps them.
    Raises:
        DataError: fewer than `min_size`.
    """
    if num_rows < config.partition.min_size:
        raise DataError(
            f"data: got {num_rows} rows, expected at least data.partition.min_size = {config.partition.min_size}; give"
            " more rows"
        )
    return _capped(np.arange(num_rows, dtype=np.int64), config, seed, peer)


def _capped(piece: Indices, config: DataSection, seed: int, peer: int) -> Indices:
    """A peer's rows, sorted, at most `max_samples` of them."""
    if config.max_samples and len(piece) > config.max_samples:
        piece = numpy_rng(seed, "partition", "max_samples", peer).choice(piece, config.max_samples, replace=False)
    return np.sort(piece)


def describe_partition(rows: Rows, parts: Sequence[Indices], config: DataSection) -> list[dict[str, Any]]:
    """Who holds what.

    Args:
        rows: the training rows.
        parts: row indices of each peer.
        config: names the field that classes are counted by (as for `dirichlet`).
    Returns:
        For each peer {"samples": rows held, "classes": {class: rows}, "others": rows of classes not listed}, its
        largest classes first. Those listed are the `MAX_CLASSES` largest over all peers; none where rows have none.
    """
    column = _class_column(rows, config)
    held = [Counter(str(rows[i].get(column)) for i in piece) if column else Counter[str]() for piece in parts]
    listed = {name for name, _ in _by_size(sum(held, Counter[str]()))[:MAX_CLASSES]}
    described = []
    for piece, counts in zip(parts, held, strict=True):
        classes = {name: number for name, number in _by_size(counts) if name in listed}
        others = counts.total() - sum(classes.values())
        described.append({"samples": len(piece), "classes": classes, "others": others})
    return described


def _by_size(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _class_column(rows: Rows, config: DataSection) -> str:
    if config.partition.column:
        return config.partition.column
    if config.task == "classification":
        return config.label_field
    return "client" if all("client" in row for row in rows) else ""


def _require_column(rows: Rows, config: DataSection) -> str:
    column = _class_column(rows, config)
    fields = ", ".join(map(str, rows[0]))
    if not column:
        raise DataError(
            f"data.partition.kind: {config.partition.kind!r} needs a field to split by and the rows (with {fields}) "
            "have neither labels nor 'client'; name one with data.partition.column, or use kind 'iid' or 'quantity'"
        )
    for index, row in enumerate(rows):
        if column not in row:
            raise DataError(
                f"data.partition.column: row {index + 1} has no field {column!r} (it has {', '.join(map(str, row))})"
            )
    return column


def _groups(rows: Rows, column: str) -> dict[str, Indices]:
    """Row indices of each value of a field, the values in sorted order."""
    found: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(str(row[column]), []).append(index)
    return {value: np.array(found[value], dtype=np.int64) for value in sorted(found)}


def _dirichlet(
    classes: Sequence[Indices], num_peers: int, alpha: float, min_size: int, rng: np.random.Generator
) -> list[Indices]:
    shuffled = [rng.permutation(members) for members in classes]
    sizes = np.array([[len(members)] for members in classes])
    for _ in range(MAX_DRAWS):
        shares = rng.dirichlet(np.full(num_peers, alpha), size=len(classes))  # [num_classes, N]
        cuts = (np.cumsum(shares, axis=1)[:, :-1] * sizes).astype(np.int64)
        bounds = np.concatenate([np.zeros_like(sizes), cuts, sizes], axis=1)
        if np.diff(bounds, axis=1).sum(axis=0).min() >= min_size:
            pieces = [np.split(members, row[1:-1]) for members, row in zip(shuffled, bounds, strict=True)]
            return [np.concatenate([piece[peer] for piece in pieces]) for peer in range(num_peers)]
    raise DataError(
        f"data.partition: {MAX_DRAWS} draws with alpha = {alpha} left a peer of {num_peers} with fewer than min_size = "
        f"{min_size} of the {int(sizes.sum())} rows; raise data.partition.alpha, or lower min_size or run.num_peers"
    )


def _whole_groups(groups: Mapping[str, Indices], num_peers: int, column: str) -> list[Indices]:
    """Largest group first, each to the peer that holds the fewest rows so far."""
    if len(groups) < num_peers:
        raise DataError(
            f"data.partition.column: field {column!r} has {len(groups)} values for {num_peers} peers, expected at "
            f"least one a peer; lower run.num_peers to {len(groups)}"
        )
    held: list[list[Indices]] = [[] for _ in range(num_peers)]
    loads = [0] * num_peers
    for _, members in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        peer = loads.index(min(loads))
        held[peer].append(members)
        loads[peer] += len(members)
    return [np.concatenate(pieces) for pieces in held]


def _files(source: Indices, num_peers: int) -> list[Indices]:
    num_files = len(np.unique(source))
    if num_files < num_peers:
        raise DataError(
            f"data.partition.kind: 'files' got {num_files} files for {num_peers} peers, expected one a peer at least; "
            f"list more files in data.train or lower run.num_peers to {num_files}"
        )
    return [np.flatnonzero(source % num_peers == peer).astype(np.int64) for peer in range(num_peers)]
