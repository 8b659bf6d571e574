"""A whole run: recipe -> data, model, peers -> rounds -> agreement -> summary, model, report.

This is the only place that puts the layers together, and the same for every runtime: a process plays the members that
its group gives it. What is trained lives in `algorithms/`, how payloads travel in `runtimes/`, what is on disk in
`run_folder` and `checkpoint`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peertune.algorithms import ALGORITHMS
from peertune.algorithms.base import Algorithm
from peertune.assemble import (
    check_exchange,
    make_batches,
    make_parts,
    make_pool,
    make_topology,
    whole_module,
    wrap_model,
)
from peertune.average import Average
from peertune.checkpoint import OLDER, CheckpointStore, newest_common
from peertune.config import LinkSection, RunConfig
from peertune.errors import CheckpointError, ConfigError, DivergedError, Left, ModelError, PeerLostError, StorageError
from peertune.evaluation import Measured, measure
from peertune.memory import keep_freed, reset_peak
from peertune.model.blocks import block_table, is_tied
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model, load_full_model
from peertune.peer import Peer
from peertune.prepare import (
    Prepared,
    base_fingerprint,
    check_vocabulary,
    data_fingerprint,
    model_blocks,
    prepare_data,
    prepare_model,
    resolve_device,
)
from peertune.progress import Progress, Silent
from peertune.records import (
    agreement_of,
    combined_fields,
    peer_fields,
    quality_of,
    round_event,
    start_event,
    summary_of,
    totals,
    versions,
)
from peertune.report import write_report
from peertune.robust import ends_in_agreement
from peertune.run_folder import RunFolder, save_trained
from peertune.run_state import Agreed, RunState
from peertune.runtimes import Group, Member, agree, play_round
from peertune.runtimes.simulation import SimulatedGroup
from peertune.topology import Topology
from peertune.workload import foreseen_bytes

RETRY_S = 5.0
"""Seconds between attempts to write what came out of a run."""
Connect = Callable[[int, LinkSection], Group]
"""Makes the group of a run, given the number of members and the links to assume where they are simulated."""


@dataclass(frozen=True)
class Site:
    """One peer with data of its own."""

    index: int
    counts: Sequence[int]
    """Samples by peer, as all agreed on them; only W made of them needs it."""
    check: Callable[[Any, Any], None]
    """Refuses another base or tokenizer than all agreed on."""
    members: Sequence[str]
    """Names, by index."""
    contributions: Callable[[int], list[dict[str, Any]]]
    """Given the number of rounds, what came from each neighbour in them (`audit.contributions`)."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run is made of, loaded and checked."""

    config: RunConfig
    data: Prepared
    module: torch.nn.Module
    """The base with its adapter; a run takes it over."""
    counts: Sequence[int]
    """Samples by peer."""
    device: torch.device
    base: Path = Path()
    """Folder of the recipe file."""
    site: Site | None = None
    notes: Sequence[str] = ()


def run(
    config: RunConfig,
    *,
    base: Path | None = None,
    notes: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
    connect: Connect = SimulatedGroup,
    device: str = "",
    ranks_per_peer: int = 1,
    site: Site | None = None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        config: the recipe; `config.run.out` is the folder everything is written to.
        base: folder of the recipe file, from which relative paths are tried second.
        notes: remarks on the recipe, to be shown and kept.
        resume: go on from the newest complete checkpoint, or start anew where there is none.
        connect: the runtime.
        device: this process's; empty: the recipe's run.device.
        ranks_per_peer: processes that play a member together in this runtime.
        site: whose data they are, where they are not dealt to all peers.
    Returns:
        The summary, as written to summary.json.
    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run had to stop; its last checkpoint is intact.
    """
    progress = progress or Silent()
    name, given = config.algorithm.name, type(config.algorithm)
    if (method := ALGORITHMS.get(name)) is None or method.Config is not given:
        expected = f"one of {', '.join(ALGORITHMS)}" if method is None else method.Config.__name__
        raise ConfigError(
            f"algorithm: got a {given.__name__} with name = {name!r}, expected {expected}; give it its method's name"
        )
    if config.run.ranks_per_peer != ranks_per_peer:
        raise ConfigError(
            f"run.ranks_per_peer: got {config.run.ranks_per_peer}, expected {ranks_per_peer}: only torchrun's processes"
            " can be one peer together, not in a simulation nor between sites; set run.ranks_per_peer = 1"
        )
    folder = RunFolder(Path(config.run.out))
    folder.check(config.to_dict(), resume)
    if resume and folder.summary.exists():
        progress.note(f"{folder.path}: this run is finished already")
        return folder.read_summary()
    placed = resolve_device(device or config.run.device)
    if config.run.threads or config.run.parallel_peers > 1:
        torch.set_num_threads(config.run.threads or 1)
    if placed.type == "cuda":
        # Else the attention's backward pass adds in an order of its own, and no two runs are bitwise equal.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # To find faults it fills each new tensor first.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    keep_freed()
    reset_peak(placed)
    data = prepare_data(config, base, None if site is None else site.index)
    # What several ranks hold between them need not fit one GPU.
    module = prepare_model(config, placed if ranks_per_peer == 1 else torch.device("cpu"), base)
    check_vocabulary(module, config.model.path, data.test, data.train.values())
    if site is not None:
        site.check(module, data.tokenizer)
    counts = [len(rendered.samples) for rendered in data.train.values()] if site is None else site.counts
    inputs = Inputs(
        config=config, data=data, module=module, counts=counts, device=placed, base=base or Path(), site=site,
        notes=[*notes, *data.notes],
    )  # fmt: skip
    try:
        return Run(inputs, folder, progress, connect, resume=resume).carry_out()
    finally:
        folder.lock.release()


class Run:
    """One run, as far as this process plays it.

    Args:
        connect: the runtime.
        resume: go on from the newest complete checkpoint, where there is one.
    """

    def __init__(
        self, inputs: Inputs, folder: RunFolder, progress: Progress, connect: Connect, *, resume: bool = False
    ) -> None:
        config, data, module = inputs.config, inputs.data, inputs.module
        self.config, self.data, self.site = config, data, inputs.site
        self.device, self.base = inputs.device, inputs.base
        self.folder, self.progress, self.resume = folder, progress, resume
        self.notes = notes = list(inputs.notes)
        method = ALGORITHMS[config.algorithm.name]
        self.blocks = model_blocks(config, module, method.frozen)
        is_frozen = config.model.train_embeddings == "untied" and config.model.init == "pretrained"
        if config.algorithm.adapter == "none" and is_frozen and is_tied(module):
            notes.append(
                'token embedding and output head are one tensor: frozen (model.train_embeddings = "all" trains it)'
            )
        topology = make_topology(config, method, inputs.counts)
        section = method.graph(config.topology)
        if section != config.topology and not method.pools_data:
            notes.append(
                f"{config.algorithm.name} runs on topology.kind = {section.kind!r}, weights = {section.weights!r}"
            )
        own = {name for block in self.blocks for name in block.parameters}
        self.num_peers, self.num_members = topology.num_peers, topology.num_members
        self.group = connect(self.num_members, config.link)
        self._take_folder()
        told = self.group.gather([True] * len(self.group.hosted))
        self.num_stored = len(told) - told.count(None)
        """Members whose checkpoints lie in this run's folder: at a site of a consortium, its own only."""
        held = {0: list(data.train.values())} if method.pools_data else {i: [r] for i, r in data.train.items()}
        data_fingerprints = {i: data_fingerprint(held.get(i, [])) for i in self.group.hosted}
        own_base = self._same_everywhere(base_fingerprint(module, own))
        self.members, model = self._make_members(module, own, topology)
        self.average = Average(model, self.members, self.group)
        self.peers = [member for member in self.members if not member.is_hub]
        self.method = self.members[0].algorithm
        check_exchange(config, self.method)
        self.agrees = self.method.agrees and ends_in_agreement(config.exchange.robust, topology.has_hub)
        if self.agrees != self.method.agrees:
            notes.append(
                f"exchange.robust = {config.exchange.robust!r}: the peers do not agree on one model in the end"
            )
        self.group.open(self.method)
        ranks = self.group.ranks
        shard, num_shards = (0, 1) if ranks is None else (ranks.get_local_rank(), ranks.size())
        self.store = CheckpointStore(folder.checkpoints, self.num_members, num_shards, shard)
        self.pool = make_pool(config, module, self.device)
        self.parts = make_parts(config, self.peers)
        self.state = RunState(self.members, data_fingerprints, own_base, self.device, self.group.clock)

    def _take_folder(self) -> None:
        """Lock the run's folder where this process writes to it, before anything connects or is written."""
        folder, ranks = self.folder, self.group.ranks
        folder.is_written = ranks is None or ranks.get_local_rank() == 0
        if self.group.survives_loss:
            folder.refused = lambda error: self.progress.note(
                f"warning: {error}; until then the run goes on without a log"
            )
        if self.group.is_recorder and folder.is_written:
            folder.lock.acquire()
            # Once more: another process may have been at work on it while this one loaded.
            folder.check(self.config.to_dict(), self.resume)
            folder.require_unfinished()

    def _make_members(
        self, module: torch.nn.Module, own: set[str], topology: Topology
    ) -> tuple[list[Member], LanguageModel]:
        """The hosted members, each with a model of its own, and the model that is left for their average.

        Args:
            module: the base; taken over.
            own: names of the parameters that each member has for itself.
        """
        config, method = self.config, ALGORITHMS[self.config.algorithm.name]
        batches, members = make_batches(config, self.data, method.pools_data), []
        model: LanguageModel | None = None
        for index in self.group.hosted:
            model = wrap_model(clone_model(module, own), config.model, self.group.ranks, own, model)
            peer = Peer(index, model, self.blocks, batches.get(index), config.run.seed)  # a hub has none
            algorithm = method(peer, config.algorithm, topology)
            members.append(Member(algorithm, self.group.exchange(index), config.exchange))
        # Only now: an instance whose layers were taken over cannot be cloned.
        return members, wrap_model(module, config.model, self.group.ranks, own, model)

    def carry_out(self) -> dict[str, Any]:
        """Rounds, agreement, summary, exported model, report; returns the summary."""
        done = self._resume() if self.resume else 0
        self._record(lambda: self._open(done))
        for note in self.notes:
            self.progress.note(note)
        round = done
        while round < self.method.num_rounds:
            then = self.group.catch_up(round, self.method)
            if then != round:
                self.folder.event("join", round=then, missed=then - round)
            if self.group.is_leaving:
                self._checkpoint(then)
                raise Left(f"{self.folder.path}: left after round {then} of {self.method.num_rounds}")
            self._round(then)
            round = then + 1
        return self._finish()

    def _open(self, done: int) -> None:
        """Make the run's folder ready for the rounds to come."""
        if self.folder.is_written:
            self.folder.require_space(foreseen_bytes(self.method, self.num_stored))
        self.progress.note("blocks:\n" + block_table(self.average.model.module, self.method.blocks))
        if done == 0:
            base, then = str(self.base.absolute()), versions(self.config.algorithm.name)
            recipe = {
                "config": self.config.to_dict(), "versions": then, "base": base, "members": self.num_members,
                "site": None if self.site is None else self.site.index, "labels": list(self.data.label_names),
            }  # fmt: skip
            self.folder.create(recipe)
            self.folder.rewind(0)
            self.folder.event("start", **start_event(self.config, self.method, self.data, self.notes, self.agrees))
            self.state.before = self._evaluate(self.average.model, by_client=True)
            self.folder.event("eval", round=0, average_model=self.state.before.overall, peers=None)
        else:
            self.folder.rewind(done)
            self.folder.event("resume", round=done)

    def _round(self, round: int) -> None:
        reports = play_round(round, self.members, self.pool, self.parts)
        last = round + 1 == self.method.num_rounds
        for member, report in zip(self.peers, reports, strict=True):
            if report is not None:
                self.state.cpu_s[member.index] += report.cpu_s
                _require_finite(f"peer {member.index}, round {round}: the training loss", float(report.loss))
                _require_finite(f"peer {member.index}, round {round}: the gradient's norm", float(report.grad_norm))
        if self.group.clock is not None:
            self.group.clock.local([0.0 if report is None else report.cpu_s for report in reports])
        if round % self.config.run.log_every == 0 or last:
            self._log(round, [*reports, *[None] * (len(self.members) - len(self.peers))])
        every = self.config.eval.every
        if not every and self.config.eval.points:
            every = math.ceil(self.method.num_rounds / self.config.eval.points)
        if every and (round + 1) % every == 0 and not last and self.average.load(round + 1):
            self._record(lambda: self._evaluate_average(round + 1))
        every = self.config.run.checkpoint_every
        if last or ((round + 1) % every == 0 if every else self.method.is_boundary(round)):
            self._checkpoint(round + 1)
        losses = [float(report.loss) for report in reports if report is not None]
        self.progress.rounds(round + 1, self.method.num_rounds, sum(losses) / len(losses) if losses else None)

    def _log(self, round: int, reports: Sequence[Any]) -> None:
        """Write a round's event; reports are by hosted member."""
        told = self.group.gather(
            [peer_fields(*pair, self.state.cpu_s[pair[0].index]) for pair in zip(self.members, reports, strict=True)],
            combined_fields,
        )
        distance = self.average.consensus_distance(round)
        position = self.method.position(round)
        if self.group.is_recorder:
            simulated_s, wall_s = self.state.simulated_s, self.state.wall_s
            fields = round_event(round, position, told[: self.num_peers], distance, simulated_s, wall_s)
            self.folder.event("round", **fields)

    def _evaluate_average(self, round: int) -> None:
        self.folder.event("eval", round=round, average_model=self._evaluate(self.average.model).overall, peers=None)

    def _finish(self) -> dict[str, Any]:
        rounds = self.method.num_rounds
        agreed = self.state.agreed
        if agreed is None:
            self.state.agreed = agreed = self._agree(self._evaluate_peers(by_client=True))
            if self.group.survives_loss:
                # The others will not agree with this site a second time, should it be killed before its end.
                self._checkpoint(rounds)
        told = self.group.gather(
            [totals(m, self.state.cpu_s[m.index], self.state.peak_bytes) for m in self.members], combined_fields
        )
        if not self.average.load(rounds, agreed.is_reached):
            self.average.load(rounds, agreed=True)  # nothing but its own is to be had here
        personal = self._evaluate_peers() if self.config.algorithm.local_modules else []
        summary: dict[str, Any] = {}
        self._record(lambda: summary.update(self._conclude(agreed, told, personal)))
        return summary or self.folder.read_summary()

    def _agree(self, before: Sequence[Measured | None]) -> Agreed:
        """Make one model of the peers', as far as they can be reached, and say so where that is not all.

        Args:
            before: each peer's own quality.
        """
        if not self.agrees:
            return Agreed(is_reached=False, before=before)
        away = self.members[0].exchange.left_out  # in the last round
        try:
            hops, absent = agree(self.method.num_rounds, self.members, may_lose=self.group.survives_loss)
        except PeerLostError as error:
            if not self.group.survives_loss:
                raise
            self.progress.note(f"{error}; the model is this site's own")
            return Agreed(is_reached=False, before=before)
        if absent:
            names = ", ".join(str(self._name(peer)) for peer in absent)
            whose = "the others'" if len(absent) < self.num_peers - 1 else "this site's own"
            self.progress.note(f"in the final agreement nothing was heard of {names}: the model is {whose}")
        unheard = [peer for peer in away if hops and peer < self.num_peers and peer not in absent]
        if unheard:
            names = ", ".join(str(self._name(peer)) for peer in unheard)
            self.progress.note(
                f"nothing was heard of {names} in the last round, but again in the final agreement: what is held there"
                " counts as much as anyone's, also where it was trained apart"
            )
        return Agreed(is_reached=True, hops=hops, absent=absent, unheard=unheard, before=before)

    def _name(self, member: int) -> int | str:
        """What a member is called: at a site by the charter, else by its index."""
        return member if self.site is None else self.site.members[member]

    def _conclude(
        self,
        agreed: Agreed,
        told: Sequence[dict[str, Any] | None],
        personal: Sequence[Measured | None],
    ) -> dict[str, Any]:
        """Measure the average model and write what came out; returns the summary.

        Args:
            told: each member's `totals`.
            personal: each peer's personal model after it; empty where there are none.
        """
        rounds = self.method.num_rounds
        if agreed.hops or agreed.absent:
            sent = [None if t is None else t["bytes_sent"] for t in told[: self.num_peers]]
            self.folder.event("agreement", hops=agreed.hops, bytes_sent=sent, absent=agreed.absent)
        average = self._evaluate(self.average.model, by_client=True)
        for name, value in average.overall.items():
            _require_finite(f"the average model's {name}", value)
        metrics = quality_of(self.state.before, average, agreed.before, personal)
        self.folder.event("eval", round=rounds, average_model=metrics["average_model"], peers=metrics["peers"])
        wall_s = self.state.wall_s
        found = summary_of(self.config, self.method, metrics, told, self.state.simulated_s, wall_s)
        if self.site is not None:
            for told_of in found["rounds_without"]:
                told_of |= {key: self._name(told_of[key]) for key in ("peer", "went_without")}
            absent = agreed.absent if agreed.is_reached else None
            peers, own = self.site.members[: self.num_peers], self.site.index
            found["agreement"] = agreement_of(peers, own, agreed.hops, absent, agreed.unheard)
            found["contributions"] = self.site.contributions(rounds)
        self.folder.event("end", metrics=metrics, wall_s=wall_s, peak_memory_bytes=found["peak_memory_bytes"])
        module = whole_module(self.average.model, self.config, self.base, self.method.masters)
        if not self.folder.is_written:
            return {}
        self._insist(lambda: self._keep(module, found))
        return found

    def _keep(self, module: torch.nn.Module, summary: Mapping[str, Any]) -> None:
        """Write the model, the report and, last, the summary, by which the run is finished."""
        full = partial(load_full_model, self.config.model, torch.device("cpu"), self.base)
        labels = self.data.label_names
        save_trained(self.folder.model, module, self.data.tokenizer, full, self.folder.adapter, labels)
        write_report(self.folder.path)
        self.folder.write_summary(summary)

    def _insist(self, write: Callable[[], None]) -> None:
        """Write the results; a site whose disk is full tries again until there is space, as the others have gone."""
        told = False
        while True:
            try:
                return write()
            except StorageError as error:
                if not self.group.survives_loss or self.group.is_leaving:
                    raise
                if not told:
                    self.progress.note(f"warning: {error}; this is tried again until there is space")
                told = True
                time.sleep(RETRY_S)

    def _record(self, write: Callable[[], None]) -> None:
        """Let the recorder write, and the others wait for it."""
        if self.group.is_recorder:
            write()
        self.group.gather([None] * len(self.members))

    def _evaluate_peers(self, by_client: bool = False) -> list[Measured | None]:
        """By peer, its own model's quality; of those here with the same weights, as over a server, one is measured."""
        measured: list[tuple[Algorithm, Measured]] = []
        own: list[Measured] = []
        for algorithm in (member.algorithm for member in self.peers):
            found = next((m for other, m in measured if other.masters.same(algorithm.masters)), None)
            if found is None:
                found = self._evaluate(algorithm.peer.model, by_client)
                measured.append((algorithm, found))
            own.append(found)
        hosted = [*map(asdict, own), *[None] * (len(self.members) - len(own))]
        return [None if told is None else Measured(**told) for told in self.group.gather(hosted)[: self.num_peers]]

    def _same_everywhere(self, fingerprint: str) -> str:
        """The base's hash, which has to be one for all members. Raises ModelError."""
        prints = self.group.gather([fingerprint] * len(self.group.hosted), lambda all: " ".join(sorted({*all})))
        for member, told in enumerate(prints):
            if told not in (None, fingerprint):
                raise ModelError(
                    f"model.path: {self.config.model.path!r} is not the same base for member {member} as for member"
                    f" {self.group.hosted[0]}; give all the same files and the same recipe"
                )
        return fingerprint

    def _resume(self) -> int:
        """Rounds already done: those of the newest complete checkpoint, which is taken up; 0 where there is none."""
        done = newest_common(self.group.gather([self.store.rounds(member.index) for member in self.members]))
        if done is None:
            self.progress.note(f"{self.folder.path}: no complete checkpoint; starting from the beginning")
            return 0
        for member in self.members:
            done, tensors, plain = self._load(member.index, done)
            self.state.take_up(member, done, tensors, plain, self.folder.path)
        self.progress.note(f"{self.folder.path}: resuming after round {done} of {self.method.num_rounds}")
        then, now = self.folder.read_recipe().get("versions"), versions(self.config.algorithm.name)
        if then != now:
            self.progress.note(f"versions have changed, and results may: {then} when this run began, {now} now")
        return done

    def _load(self, index: int, done: int) -> tuple[int, dict[str, torch.Tensor], dict[str, Any]]:
        """A member's checkpoint, and its round. A site, which others do not have to be level with, takes an older one
        where one is damaged. Raises CheckpointError.
        """
        while True:
            try:
                return done, *self.store.load(index, done)
            except CheckpointError as error:
                older = [round for round in self.store.rounds(index) if round < done]
                if not self.group.survives_loss or not older:
                    raise
                self.progress.note(f"warning: {str(error).removesuffix(OLDER)}; the one before it is taken")
                done = older[-1]

    def _checkpoint(self, done: int) -> None:
        for member in self.members:
            try:
                self.store.save(member.index, done, *self.state.saved(member, done))
            except StorageError as error:
                if not self.group.survives_loss:
                    raise
                self.progress.note(f"warning: {error}; until then the run goes on without new checkpoints")
                return
        self._record(lambda: self.folder.event("checkpoint", round=done))
        # Only now that all members have this one.
        for member in self.members:
            self.store.prune(member.index)
            member.exchange.saved(done)

    def _evaluate(self, model: LanguageModel, by_client: bool = False) -> Measured:
        if not self.data.test.samples:
            return Measured({})
        return measure(model, self.data.test, self.config.eval, by_client=by_client)


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} became {value}; lower algorithm.lr or set algorithm.max_grad_norm, and start anew in another"
            " folder"
        )
