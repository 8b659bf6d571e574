"""Means that a member who sends garbage cannot ruin: what takes the place of an inbox's weighted mean, by recipe.

    clip           sum_j w_j (c + clip(x_j - c, tau)),   clip(z, tau) = z min(1, tau / ||z||)
                   ClippedGossip's self-centred clipping (He, Karimireddy, Jaggi, arXiv 2202.01545), c = x_i
    trimmed_mean   of each weight, the b largest and the b smallest of the neighbours' values are left out, and what is
                   left is averaged with the peer's own (BRIDGE-T, Fang et al., arXiv 1908.08098); a server has no value
                   of its own, and this is Yin et al.'s coordinate-wise trimmed mean (arXiv 1803.01498)

What is ours: tau is `clip_factor` times the median of ||x_j - c|| over the others (the lower of two), so there is no
radius to tune, and while at most half of the neighbours are bad it is no larger than the distance to a good one. A
server clips around the coordinate-wise median. Clipping is by tensor, not of the whole message: messages hold
quantities of different scales. The papers' trimmed means weigh alike; here what is left keeps its w_j, divided by
their sum. The papers' formulas are second-hand: their equations' numbers were not available to us.

Algorithms and runtimes know nothing of it. Every sum is in ascending order of the peers, in float32. A message that
comes alone to one who sends none (a server's answer) is taken as it is: there is nothing to compare it with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peertune.config import ExchangeSection
from peertune.errors import ConfigError
from peertune.exchange import Hop, Inbox

PIECE = 1 << 14
"""Coordinates compared at a time, which fit the cache with those of all neighbours."""


def ends_in_agreement(robust: str, has_hub: bool) -> bool:
    """Whether all peers hold one model in the end: its partial sums cannot be told from garbage, so only over a hub."""
    return robust == "none" or has_hub


def check_rule(rule: ExchangeSection, method: str, averages: bool, hops: Iterable[Hop]) -> None:
    """Refuse methods and graphs for which a rule could do nothing. Raises ConfigError.

    Args:
        averages: whether the method takes nothing but means from its inbox.
        hops: a round's.
    """
    if rule.robust == "none":
        return
    if not averages:
        raise ConfigError(
            f"exchange.robust: got {rule.robust!r}, but {method} takes no mean of what it receives; expected 'none', or"
            " take another method"
        )
    for hop in hops:
        for target in sorted({target for _, target in hop.weights}):
            sources = hop.sources(target)
            others = len(sources) - (target in sources)
            needed = 2 * rule.trim + 1 if rule.robust == "trimmed_mean" else 2 if target in sources else 3
            if others < needed and not _is_relay(sources, target) and others:
                raise ConfigError(
                    f"exchange.robust: got {rule.robust!r}, but peer {target} hears only {others} others, expected"
                    f" {needed} to tell who sends garbage; take a denser topology, or exchange.robust = 'none'"
                )


def robust_inbox(rule: ExchangeSection, peer: int, inbox: Inbox) -> Inbox:
    """The inbox of `peer`, with the mean that the recipe asks for."""
    if rule.robust == "none" or _is_relay(inbox.weights, peer):
        return inbox
    kind = ClippedInbox if rule.robust == "clip" else TrimmedInbox
    return kind(inbox.weights, inbox.payloads, peer, rule)


def _is_relay(sources: Iterable[int], target: int) -> bool:
    return len(list(sources)) == 1 and target not in sources


def _ordered(piece: Tensor) -> Tensor:
    """In float32, and with infinity for NaN, which is neither larger nor smaller than anything."""
    return piece.float().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


@dataclass(frozen=True)
class RobustInbox(Inbox):
    peer: int
    """The receiver."""
    rule: ExchangeSection

    @property
    def others(self) -> list[int]:
        """Whom it hears, ascending."""
        return [source for source in sorted(self.weights) if source != self.peer]

    def means(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        return ({name: self.mean(name)} for name in names)

    @property
    def sends(self) -> bool:
        """Whether the receiver's own message is among them; a server's is not."""
        return self.peer in self.weights


class ClippedInbox(RobustInbox):
    @torch.no_grad()
    def mean(self, name: str) -> Tensor:
        """The clipped mean of a tensor; where nothing is clipped, bitwise the plain one.

        With s_j = min(1, tau / ||x_j - c||) it is sum_j w_j s_j x_j + (sum_j w_j (1 - s_j)) c: a mean of other weights,
        so that it takes no more memory than one difference.
        """
        centre = self.payloads[self.peer][name].float() if self.sends else self._median(name)
        weights, rest = dict(self.weights), 0.0
        for j, share in zip(self.others, self._shares(name, centre), strict=True):
            rest += weights[j] * (1 - share)
            weights[j] *= share
            if not share:
                del weights[j]  # it may hold infinity, which 0 times is NaN
        if not rest:
            return super().mean(name)
        if self.sends:
            weights[self.peer] += rest
            return Inbox(weights, self.payloads).mean(name)
        return Inbox(weights, self.payloads).mean(name).add_(centre, alpha=rest) if weights else centre

    def _shares(self, name: str, centre: Tensor) -> list[float]:
        """s_j of the others; of one alone, when the rest are away, 0: it cannot be told from garbage."""
        if len(self.others) < 2:
            return [0.0] * len(self.others)
        norms = torch.stack([torch.linalg.vector_norm(self.payloads[j][name] - centre) for j in self.others])
        distances = [d if math.isfinite(d) else math.inf for d in norms.tolist()]
        tau = self.rule.clip_factor * sorted(distances)[(len(distances) - 1) // 2]
        return [0.0 if d == math.inf else 1.0 if d <= tau else tau / d for d in distances]

    def _median(self, name: str) -> Tensor:
        """Coordinate by coordinate, the lower of two."""
        flat = [self.payloads[j][name].reshape(-1) for j in self.others]
        found = torch.empty_like(flat[0], dtype=torch.float32)
        for start in range(0, len(found), PIECE):
            pieces = torch.stack([_ordered(each[start : start + PIECE]) for each in flat])
            found[start : start + PIECE] = pieces.median(0).values
        return found.view_as(self.payloads[self.others[0]][name])


class TrimmedInbox(RobustInbox):
    @torch.no_grad()
    def mean(self, name: str) -> Tensor:
        """The trimmed mean of a tensor; of equal messages, exactly theirs.

        With 2 b neighbours or fewer, as when some are away, the own message is all that is left; a server then leaves
        out as many as it can.
        """
        flat = [self.payloads[j][name].reshape(-1) for j in self.others]
        own = self.payloads[self.peer][name].float().reshape(-1) if self.sends else None
        found = torch.empty_like(flat[0] if own is None else own, dtype=torch.float32)
        for start in range(0, len(found), PIECE):
            pieces = [_ordered(each[start : start + PIECE]) for each in flat]
            found[start : start + PIECE] = self._trimmed(pieces, None if own is None else own[start : start + PIECE])
        return found.view_as(self.payloads[next(iter(self.weights))][name])

    def _trimmed(self, pieces: list[Tensor], own: Tensor | None) -> Tensor:
        """Some coordinates' mean, from the others' values and one's own."""
        count = len(pieces)
        trim = self.rule.trim if own is not None else min(self.rule.trim, (count - 1) // 2)
        ranks = [torch.full_like(piece, k, dtype=torch.int16) for k, piece in enumerate(pieces)]
        for k in range(count):
            for j in range(k):  # of equal values the one of the lower index comes first
                swapped = (pieces[j] > pieces[k]).view(torch.int8)
                ranks[j].add_(swapped)
                ranks[k].sub_(swapped)
        if own is None:
            base = torch.stack([torch.where(rank == trim, p, 0.0) for p, rank in zip(pieces, ranks, strict=True)]).sum(
                0
            )
        else:
            base = own
        moved, weight = torch.zeros_like(base), torch.full_like(base, self.weights.get(self.peer, 0.0))
        for j, piece, rank in zip(self.others, pieces, ranks, strict=True):
            kept = (rank >= trim) & (rank < count - trim)
            weight.add_(kept, alpha=self.weights[j])
            moved.add_(torch.where(kept, piece - base, 0.0), alpha=self.weights[j])
        return moved.div_(weight).add_(base)
