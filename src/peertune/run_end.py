"""The end of a run: the peers' agreement on one model, its quality, and what is written of it.

Functions over a `RunSetup`; the rounds before are `run`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from peertune.algorithms.base import Algorithm
from peertune.assemble import whole_module
from peertune.errors import CheckpointError, PeerLostError, StorageError, require_finite
from peertune.evaluation import Measured
from peertune.model.load import load_full_model
from peertune.records import agreement_of, combined_fields, quality_of, summary_of, totals
from peertune.report import write_report
from peertune.run_folder import save_trained
from peertune.run_setup import RunSetup
from peertune.run_state import Agreed
from peertune.runtimes import agree

RETRY_S = 5.0
"""Seconds between attempts to write what came out of a run."""


def agree_on_model(run: RunSetup) -> Agreed:
    """Make one model of the peers', as far as they can be reached, and say so where that is not all."""
    before = _evaluate_peers(run, by_client=True)
    if not run.agrees:
        return Agreed(is_reached=False, before=before)
    away = run.members[0].exchange.left_out  # in the last round
    try:
        found = agree(
            run.method.num_rounds, run.members, may_lose=run.group.survives_loss, take_late=run.group.take_late
        )
    except PeerLostError as error:
        if not run.group.survives_loss:
            raise
        run.progress.note(f"{error}; the model is this site's own")
        return Agreed(is_reached=False, before=before)
    if found.absent:
        names = ", ".join(str(run.name_of(peer)) for peer in found.absent)
        whose = "the others'" if len(found.absent) < run.num_peers - 1 else "this site's own"
        run.progress.note(f"in the final agreement nothing was heard of {names}: the model is {whose}")
    unheard = [peer for peer in away if found.hops and peer < run.num_peers and peer not in found.absent]
    if unheard:
        names = ", ".join(str(run.name_of(peer)) for peer in unheard)
        run.progress.note(
            f"nothing was heard of {names} in the last round, but again in the final agreement: what is held there"
            " counts as much as anyone's, also where it was trained apart"
        )
    if not found.is_one:
        run.progress.note(
            "warning: after the final agreement not all sites hold one model: one has passed on another than its own,"
            " or some were out of reach meanwhile; compare the hashes of the sites' model folders"
        )
    return Agreed(**vars(found), is_reached=True, unheard=unheard, before=before)


def conclude(run: RunSetup, agreed: Agreed) -> dict[str, Any]:
    """Measure the average model, write model, report and summary, and return the summary.

    All processes of a group have to call it.
    """
    rounds, state = run.method.num_rounds, run.state
    told = run.group.gather(
        [totals(member, state.cpu_s[member.index], state.peak_bytes) for member in run.members], combined_fields
    )
    if not run.average.load(rounds, agreed.is_reached):
        run.average.load(rounds, agreed=True)  # nothing but its own is to be had here
    personal = _evaluate_personal(run) if run.config.algorithm.local_modules or run.method.keeps_own else []
    summary: dict[str, Any] = {}
    run.record(lambda: summary.update(_write(run, agreed, told, personal)))
    return summary or run.folder.read_summary()


def _write(
    run: RunSetup, agreed: Agreed, told: Sequence[dict[str, Any] | None], personal: Sequence[Measured | None]
) -> dict[str, Any]:
    """Measure the average model and write what came out; returns the summary.

    Args:
        told: each member's `totals`.
        personal: each peer's personal model after it; empty where there are none.
    """
    rounds, folder, state = run.method.num_rounds, run.folder, run.state
    if agreed.hops or agreed.absent:
        sent = [None if t is None else t["bytes_sent"] for t in told[: run.num_peers]]
        folder.event("agreement", hops=agreed.hops, bytes_sent=sent, absent=agreed.absent)
    average = run.evaluate(run.average.model, by_client=True)
    for name, value in average.overall.items():
        require_finite(f"the average model's {name}", value)
    metrics = quality_of(state.before, average, agreed.before, personal)
    folder.event("eval", round=rounds, average_model=metrics["average_model"], peers=metrics["peers"])
    wall_s = state.wall_s
    found = summary_of(run.config, run.method, metrics, told, state.simulated_s, wall_s)
    if run.site is not None:
        for told_of in found["rounds_without"]:
            told_of |= {key: run.name_of(told_of[key]) for key in ("peer", "went_without")}
        found["agreement"] = agreement_of(run.site.members[: run.num_peers], run.site.index, agreed)
        found["contributions"] = run.site.contributions(rounds)
    agreed_with = {} if run.site is None else {"agreement": found["agreement"]}
    folder.event("end", metrics=metrics, wall_s=wall_s, peak_memory_bytes=found["peak_memory_bytes"], **agreed_with)
    module = whole_module(run.average.model, run.config, run.base, run.method.masters)
    if not folder.is_written:
        return {}
    _insist(run, lambda: _keep(run, module, found))
    return found


def _keep(run: RunSetup, module: torch.nn.Module, summary: Mapping[str, Any]) -> None:
    """Write the model, the report and, last, the summary, by which the run is finished."""
    full = partial(load_full_model, run.config.model, torch.device("cpu"), run.base)
    save_trained(run.folder.model, module, run.data.tokenizer, full, run.folder.adapter, run.data.label_names)
    try:
        write_report(run.folder.path)
    except CheckpointError as error:  # of a log that was cut or moved away while the run went on
        run.progress.note(f"warning: there is no report: {error}")
    run.folder.write_summary(summary)


def _insist(run: RunSetup, write: Callable[[], None]) -> None:
    """Write the results; a site whose disk is full tries again until there is space, as the others have gone."""
    told = False
    while True:
        try:
            return write()
        except StorageError as error:
            if not run.group.survives_loss or run.group.is_leaving:
                raise
            if not told:
                run.progress.note(f"warning: {error}; this is tried again until there is space")
            told = True
            time.sleep(RETRY_S)


def _evaluate_peers(run: RunSetup, by_client: bool = False) -> list[Measured | None]:
    """By peer, its own model's quality; of those here with the same weights, as over a server, one is measured."""
    measured: list[tuple[Algorithm, Measured]] = []
    own: list[Measured] = []
    for algorithm in (member.algorithm for member in run.peers):
        found = next((m for other, m in measured if other.masters.same(algorithm.masters)), None)
        if found is None:
            found = run.evaluate(algorithm.peer.model, by_client)
            measured.append((algorithm, found))
        own.append(found)
    return _told(run, own)


def _evaluate_personal(run: RunSetup) -> list[Measured | None]:
    """By peer, its personal model's quality."""
    own: list[Measured] = []
    for algorithm in (member.algorithm for member in run.peers):
        with algorithm.in_person():
            own.append(run.evaluate(algorithm.peer.model))
    return _told(run, own)


def _told(run: RunSetup, own: Sequence[Measured]) -> list[Measured | None]:
    """By peer, what the hosted ones were measured at and what others tell; None where that is not known here."""
    hosted = [*map(asdict, own), *[None] * (len(run.members) - len(own))]
    return [None if told is None else Measured(**told) for told in run.group.gather(hosted)[: run.num_peers]]
