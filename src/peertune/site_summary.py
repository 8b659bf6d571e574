"""What a site's summary says of the others: with whom its model was agreed on."""

from __future__ import annotations

from collections.abc import Sequence


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
