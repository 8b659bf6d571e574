"""A snapshot as Prometheus metrics, by the names that docs/consortium.md promises; what is not known is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from peertune.watch.state import PeerState, Snapshot

RUN: tuple[tuple[str, str, Callable[[Snapshot], float | None]], ...] = (
    ("peertune_up", "1 while a run is at work in the folder, else 0.", lambda s: s.state in ("starting", "running")),
    ("peertune_finished", "1 when the run is finished, else 0.", lambda s: s.state == "finished"),
    ("peertune_round", "Rounds that are over.", lambda s: s.rounds_done),
    ("peertune_rounds_planned", "Rounds of the whole run.", lambda s: s.rounds_planned),
    ("peertune_loss", "Mean training loss of the last logged round.", lambda s: s.loss),
    ("peertune_consensus_distance", "Distance of the peers from their average.", lambda s: s.consensus_distance),
    ("peertune_elapsed_seconds", "Time the run has worked, breaks left out.", lambda s: s.elapsed_s),
    ("peertune_remaining_seconds", "Time left at the pace of the last rounds.", lambda s: s.left_s),
    ("peertune_checkpoint_round", "Rounds in the newest checkpoint.", lambda s: s.checkpoint_round),
    ("peertune_checkpoint_timestamp_seconds", "When that was written, Unix time.", lambda s: s.checkpoint_time),
    ("peertune_last_event_timestamp_seconds", "When the run last wrote anything, Unix time.", lambda s: s.last_line),
)
Family = type[GaugeMetricFamily | CounterMetricFamily]
NEIGHBOR: tuple[tuple[Family, str, str, Callable[[PeerState], float | None]], ...] = (
    (GaugeMetricFamily, "peertune_neighbor_connected", "1 while connected, else 0.", lambda p: p.status == "connected"),
    (GaugeMetricFamily, "peertune_neighbor_round", "Newest round a message moved of.", lambda p: p.round),
    (GaugeMetricFamily, "peertune_neighbor_behind_rounds", "Rounds that is behind this site.", lambda p: p.behind),
    (
        GaugeMetricFamily,
        "peertune_neighbor_last_message_timestamp_seconds",
        "When a message last came from it or was fetched by it, Unix time.",
        lambda p: p.heard,
    ),
    (
        GaugeMetricFamily,
        "peertune_neighbor_throughput_bytes_per_second",
        "Of its last messages, as they came.",
        lambda p: p.bytes_per_s,
    ),
    (CounterMetricFamily, "peertune_sent_bytes_total", "Bytes made ready for a neighbour.", lambda p: p.bytes_sent),
    (CounterMetricFamily, "peertune_received_bytes_total", "Bytes that came from it.", lambda p: p.bytes_received),
    (
        CounterMetricFamily,
        "peertune_rounds_without_neighbor_total",
        "Rounds that went on without it.",
        lambda p: p.rounds_without,
    ),
)


def exposition(state: Snapshot) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(state))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, state: Snapshot) -> None:
        self._state = state

    def collect(self) -> Iterable[Metric]:
        for name, text, value in RUN:
            known = value(self._state)
            if known is not None:
                yield GaugeMetricFamily(name, text, value=float(known))
        yield from self._by_neighbor() if self._state.is_site else self._by_peer()

    def _by_neighbor(self) -> Iterator[Metric]:
        for family, name, text, value in NEIGHBOR:
            metric = family(name, text, labels=["neighbor"])
            for peer in self._state.peers:
                known = value(peer)
                if known is not None:
                    metric.add_metric([peer.name], float(known))
            yield metric

    def _by_peer(self) -> Iterator[Metric]:
        """Of a simulation."""
        metric = CounterMetricFamily("peertune_peer_sent_bytes_total", "Bytes that a peer has sent.", labels=["peer"])
        for peer in self._state.peers:
            if peer.bytes_sent is not None:
                metric.add_metric([str(peer.index)], float(peer.bytes_sent))
        yield metric
