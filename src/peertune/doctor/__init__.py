"""What stands between a site and a run, found before it joins: a finding a check, each with what to do about it.

No file is written, and nothing of the site's data is sent. The lines to the neighbours are measured by
`runtimes/probe`: it takes a neighbour who joins, or examines himself, at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from peertune.algorithms import METHODS
from peertune.doctor.finding import Finding, problem
from peertune.doctor.inputs import check_charter, check_data, check_edges, check_key, check_model, check_topology
from peertune.doctor.lines import check_clock, check_line, predict
from peertune.doctor.machine import check_device, check_disk, check_folder, check_memory, check_port
from peertune.errors import ConfigError
from peertune.memory import available_bytes
from peertune.runtimes.node import Node
from peertune.runtimes.survey import Survey
from peertune.site import SiteOptions
from peertune.workload import rehearse

__all__ = ["Finding", "examine"]


def examine(
    options: SiteOptions, *, wait_s: float, tell: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """All checks of what `consortium.join` would be given.

    Args:
        wait_s: seconds to wait for neighbours; 0: ask each once.
        tell: told each finding when it is there.
    Raises:
        ConfigError: an override's value cannot be.
    """
    findings: list[Finding] = []

    def say(found: Sequence[Finding]) -> bool:
        """Whether no problem is among them."""
        for finding in found:
            findings.append(finding)
            tell(finding)
        return all(finding.mark != "problem" for finding in found)

    available = available_bytes()
    charter, found = check_charter(options.charter)
    holds = say(found)
    own, found = check_key(options.identity, charter)
    is_member = say(found)
    if charter is None or own is None or not is_member:
        return findings
    index = charter.index_of(own.id)
    try:
        charter.config(METHODS)
    except ConfigError as error:
        say([problem("recipe", error, "get the charter anew from whoever wrote it")])
        return findings
    config, base = options.config(charter), options.charter.parent
    heard: list[tuple[str, str, str]] = []

    def log(event: str, **fields: Any) -> None:
        heard.append((event, str(fields.get("peer", "")), str(fields.get("reason", ""))))

    node = Node(charter, own, options.address(charter, index), log, "doctor") if holds else None
    try:
        if node is not None:  # from now on neighbours can measure the line
            say([check_port(node)])
        device, found = check_device(config)
        say(found)
        data, found = check_data(config, charter, base, index)
        say(found)
        topology, found = check_topology(config, charter)
        say(found)
        algorithm, found = check_model(config, charter, base, index, device, data, topology)
        say(found)
        pairs, found = check_edges(charter, topology, algorithm)
        say(found)
        others = sorted({i + j - index for i, j in pairs if index in (i, j)})
        is_usable = say(check_folder(config, index))
        if algorithm is not None:
            say([check_disk(config, algorithm)] * is_usable)
            say([check_memory(algorithm, len(others), device, available)])
        if node is None:
            say([Finding("neighbours", "warning", "not asked", "first have the charter put right")])
            return findings
        survey = Survey(node, others, wait_s, heard)
        node.call(survey.ask_all())
        say([check_line(survey, i) for i in others])
        say([check_clock(charter, survey.measured)])
        workload, found = None, []
        if algorithm is not None and algorithm.peer.batches is not None:
            try:
                workload = rehearse(algorithm, config)
            except torch.OutOfMemoryError as error:
                found = [problem("memory", error, "take a machine with more, or agree on a smaller batch")]
        say(found or [predict(charter, workload, survey.measured, others)])
        return findings
    finally:
        if node is not None:
            node.stop(0.0)
