"""The held-out metrics: their names, how their values are printed, and which of two values is the better one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peertune.formatting import number, percent, signed


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a held-out metric is named, printed and compared."""

    title: str
    unit: str
    share: bool
    """A share of 1, larger is better; else a plain number, smaller is better."""

    @property
    def direction(self) -> str:
        """What is better, "higher" or "lower"."""
        return "higher" if self.share else "lower"

    @property
    def axis_title(self) -> str:
        return f"held-out {self.title}" + (f" ({self.unit})" if self.unit else "")

    def show(self, value: float | None) -> str:
        return percent(value) if self.share else number(value)

    def gain(self, before: float, after: float) -> str:
        """The signed change, "+3.1 points" for a share."""
        change = after - before
        return signed(change, f"{abs(change) * 100:.1f} points" if self.share else number(abs(change)))

    def is_better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return one > other if self.share else one < other

    def worst(self, values: Iterable[float]) -> float:
        return min(values) if self.share else max(values)


METRICS = {
    "accuracy": Metric(title="accuracy", unit="%", share=True),
    "exact_match": Metric(title="exact match", unit="%", share=True),
    "call_accuracy": Metric(title="call accuracy", unit="%", share=True),
    "function_name_accuracy": Metric(title="function name accuracy", unit="%", share=True),
    "function_name_choice_accuracy": Metric(title="function choice accuracy", unit="%", share=True),
    "macro_f1": Metric(title="macro F1", unit="%", share=True),
    "loss": Metric(title="loss", unit="nats", share=False),
    "call_loss": Metric(title="call loss", unit="nats", share=False),
    "perplexity": Metric(title="perplexity", unit="", share=False),
    "calls_parsed": Metric(title="calls parsed", unit="%", share=True),
}
"""In the order in which one of them is the headline."""


def metric_named(name: str) -> Metric:
    """A metric by name; one that is not known here is a plain number."""
    return METRICS.get(name) or Metric(title=name.replace("_", " "), unit="", share=False)
