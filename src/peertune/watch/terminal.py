"""A snapshot as a few lines of text, for `peertune status`. Pure."""

from __future__ import annotations

from peertune.formatting import count, duration, number, percent, plural, traffic
from peertune.watch.page import sentence
from peertune.watch.state import SILENT_S, PeerState, Snapshot


def status_lines(state: Snapshot) -> list[str]:
    """What the page's first screen says."""
    first = [sentence(state)]
    if state.rounds_planned:
        share = percent(state.rounds_done / state.rounds_planned, 0)
        first.append(f"Round {count(state.rounds_done)} of {count(state.rounds_planned)} ({share}).")
    if state.loss is not None:
        first.append(f"Loss {number(state.loss)}.")
    if state.consensus_distance is not None:
        first.append(f"Consensus distance {number(state.consensus_distance)}.")
    times = [f"{duration(state.elapsed_s)} elapsed"] if state.elapsed_s is not None else []
    if state.left_s is not None:
        times.append(f"about {duration(float(round(state.left_s)))} left")
    if state.checkpoint_round is not None:
        times.append(f"checkpoint of round {count(state.checkpoint_round)}{_ago(state.checkpoint_time, state.now)}")
    # One at work that has long written nothing may have a full disk, and be further than its log.
    silent_s = {"stopped": 0.0, "running": SILENT_S}.get(state.state)
    if silent_s is not None and state.last_line is not None and state.now - state.last_line >= silent_s:
        times.append(f"last line written{_ago(state.last_line, state.now)}")
    if state.bytes_sent is not None:
        times.append(f"{traffic(state.bytes_sent)} {'made ready to send' if state.is_site else 'sent'}")
    lines = [" ".join(first), *(["  " + "; ".join(times)] if times else [])]
    width = max((len(peer.name) for peer in state.peers), default=0)
    if state.is_site:
        lines += [f"  {peer.name:<{width}}  {_neighbor(peer, state.now)}" for peer in state.peers]
    return lines


def _neighbor(peer: PeerState, now: float) -> str:
    parts = [peer.status]
    if peer.status == "missing" and peer.since is not None:
        parts[0] += f" for {duration(max(0.0, now - peer.since))}"
    if peer.behind is not None:
        parts.append(f"{plural(peer.behind, 'round')} behind")
    if peer.rounds_without:
        parts.append(f"{plural(peer.rounds_without, 'round')} without it")
    if peer.heard is not None:
        parts.append(f"last message{_ago(peer.heard, now)}")
    if peer.status == "connected" and peer.bytes_per_s is not None:
        parts.append(f"{traffic(peer.bytes_per_s)}/s")
    parts.append(f"{traffic(peer.bytes_sent)} made ready, {traffic(peer.bytes_received)} received")
    if peer.refusal:
        parts.append(peer.refusal)
    return "; ".join(parts)


def _ago(when: float | None, now: float) -> str:
    return "" if when is None else f" {duration(float(round(max(0.0, now - when))))} ago"
