"""Metrics of a model: loss, accuracy by likelihood, of calls, of generated answers, by client; public benchmarks."""

from peertune.evaluation.calls import Call, parse_calls, same_calls, same_names
from peertune.evaluation.generation import generate
from peertune.evaluation.harness import require_harness, run_harness
from peertune.evaluation.metrics import HeldOut, Measured, measure, remarks
from peertune.evaluation.references import Reference, references

__all__ = [
    "Call",
    "HeldOut",
    "Measured",
    "Reference",
    "generate",
    "measure",
    "parse_calls",
    "references",
    "remarks",
    "require_harness",
    "run_harness",
    "same_calls",
    "same_names",
]
