"""What a check of a site found: in order, worth a look, or in the way of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peertune.errors import ModelError

Mark = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    mark: Mark
    text: str
    advice: str = ""
    """What to do; empty where all is well."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Figures, with units in their names."""

    def __str__(self) -> str:
        return f"{self.mark:<7}  {self.check}: {self.text}" + (f"; {self.advice}" if self.advice else "")


def problem(check: str, error: Exception, advice: str) -> Finding:
    """An error as a finding; its last part says what to do, where it has one: a ModelError ends with its cause."""
    text, _, own = ("", "", str(error)) if isinstance(error, ModelError) else str(error).rpartition("; ")
    return Finding(check, "problem", text or own, own if text else advice)
