"""What a site's summary says of the others: with whom its model was agreed on, and what came from whom.

Read from what the run and its audit log know at the end; nothing here counts while the run goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peertune.logfields import MAX_NAMES, items, number, parse_line, text, whole


def agreement_of(
    peers: Sequence[str], own: int, hops: int, absent: Sequence[int] | None
) -> dict[str, list[str]] | None:
    """With whom a site agreed on its model in the end, by name; None where there is one anyway, as over a server.

    Args:
        peers: names, by index.
        own: this site's index.
        hops: of the final agreement.
        absent: peers who are not in it; None: there was none, and the model is this site's own.
    """
    others = [peer for peer in range(len(peers)) if peer != own]
    if absent is not None and not hops and not absent:
        return None
    lost = others if absent is None else absent
    return {
        "with": [peers[peer] for peer in others if peer not in lost],
        "without": [peers[peer] for peer in others if peer in lost],
    }


@dataclass
class Contribution:
    """What came from one neighbour; the key of a message begins with its round."""

    came: set[tuple[int, int]] = field(default_factory=set)
    late: dict[tuple[int, float], bool] = field(default_factory=dict)
    """(round, amount) -> whether it was used."""
    left_out: set[tuple[int, str]] = field(default_factory=set)

    def forget(self, round: int) -> None:
        """Drop what is done over again from a round on."""
        self.came = {key for key in self.came if key[0] < round}
        self.late = {key: used for key, used in self.late.items() if key[0] < round}
        self.left_out = {key for key in self.left_out if key[0] < round}

    def counts(self) -> dict[str, int]:
        used = sum(self.late.values())
        return {
            "in_time": max(0, len(self.came) - len(self.late)),
            "late_used": used,
            "late_unused": len(self.late) - used,
            "missed": max(0, len(self.left_out) - len(self.late)),
        }


def contributions(lines: Iterable[bytes], num_rounds: int) -> list[dict[str, Any]]:
    """What came from each neighbour of a site in the rounds of a run, as far as its audit log holds it.

    Args:
        lines: of audit.jsonl. Rounds that a restarted process did over again count once.
        num_rounds: messages of the final agreement, which comes after them, are left out.
    Returns:
        By neighbour: `neighbor`, its name; messages `in_time`, `late_used` and `late_unused` (docs/consortium.md), and
        `missed`, those that never came.
    """
    found: dict[str, Contribution] = {}
    is_new = False
    for event in filter(None, map(parse_line, lines)):
        kind, name, round = text(event.get("event")), text(event.get("peer")), whole(event.get("round"))
        if kind == "started":
            is_new, members = True, items(event.get("members"))
            for place in map(whole, items(event.get("neighbors"))):
                if place is not None and place < len(members):
                    found.setdefault(text(members[place]), Contribution())
        if kind not in ("sent", "arrived", "late", "left_out") or round is None or event.get("hop") == "state":
            continue
        if is_new:  # the first round of a process: the one before went on from there for nothing
            is_new = False
            for each in found.values():
                each.forget(round)
        if round >= num_rounds:
            continue
        if kind == "left_out":
            for other in text(event.get("peers"), MAX_NAMES).split(", "):
                if other in found:
                    found[other].left_out.add((round, text(event.get("hop"))))
        elif name in found and kind == "arrived":
            found[name].came.add((round, whole(event.get("hop")) or 0))
        elif name in found and kind == "late":
            found[name].late[round, number(event.get("amount")) or 0.0] = event.get("used") is True
    return [{"neighbor": name, **each.counts()} for name, each in found.items()]
