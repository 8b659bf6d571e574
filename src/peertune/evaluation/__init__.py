"""Metrics of a model: loss, accuracy by likelihood, of calls, of generated answers, by client; public benchmarks."""

from peertune.evaluation.harness import require_harness, run_harness
from peertune.evaluation.metrics import HeldOut, Measured, measure, remarks
from peertune.evaluation.references import references

__all__ = ["HeldOut", "Measured", "measure", "references", "remarks", "require_harness", "run_harness"]
