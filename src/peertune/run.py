"""A whole run: recipe -> data, model, peers -> rounds, with checkpoints -> the end.

The same for every runtime: a process plays the members that its group gives it. What it plays them with is made in
`run_setup`, what follows the rounds is in `run_end`. What is trained lives in `algorithms/`, how payloads travel in
`runtimes/`, what is on disk in `run_folder` and `checkpoint`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from peertune.algorithms import ALGORITHMS
from peertune.checkpoint import OLDER, newest_common
from peertune.config import RunConfig
from peertune.errors import CheckpointError, ConfigError, Left, StorageError, require_finite
from peertune.memory import keep_freed, reset_peak
from peertune.model.blocks import block_table
from peertune.prepare import check_vocabulary, prepare_data, prepare_model, resolve_device
from peertune.progress import Progress, Silent
from peertune.records import combined_fields, peer_fields, round_event, start_event, versions
from peertune.run_end import agree_on_model, conclude
from peertune.run_folder import RunFolder
from peertune.run_setup import Connect, Inputs, RunSetup, Site
from peertune.runtimes import play_round
from peertune.runtimes.simulation import SimulatedGroup
from peertune.workload import foreseen_bytes

_AT_WORK = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    """Refuse a run beside another in this process: what PyTorch draws from has one state a process."""
    if not _AT_WORK.acquire(blocking=False):
        raise ConfigError(
            "run: got a second one while this process carries out another, whose random draws it would change, expected"
            " one at a time; wait until that has ended, or start a process for each"
        )
    try:
        yield
    finally:
        _AT_WORK.release()


@_alone()
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

    It sets PyTorch's threads as the recipe says (run.threads), on a GPU its deterministic algorithms, and keeps freed
    memory for the next use; all of that stays when it is over. A process carries out one run at a time, in any thread.

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
        InputError: something given cannot be used (`errors` has its kinds); nothing was written.
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
    folder.check(config.to_dict(), resume, None if site is None else site.index)
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


class Run(RunSetup):
    """One run, as far as this process plays it."""

    def carry_out(self) -> dict[str, Any]:
        """Rounds, agreement, summary, exported model, report; returns the summary."""
        done = self._resume() if self.resume else 0
        self.record(lambda: self._open(done))
        self.folder.require_seen()
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
        config, base = self.config.to_dict(), str(self.base.absolute())
        if done == 0:
            recipe = {
                "config": config, "versions": versions(self.config.algorithm.name), "base": base,
                "members": self.num_members, "site": None if self.site is None else self.site.index,
                "labels": list(self.data.label_names),
            }  # fmt: skip
            self.folder.create(recipe)
        elif self.site is not None:
            self.folder.moved(config=config, base=base)
        if not self.folder.rewind(done):  # also where the log was lost, as one is that no disk had yet at a power cut
            self.folder.event("start", **start_event(self.config, self.method, self.data, self.notes, self.agrees))
        if done == 0:
            self.state.before = self.evaluate(self.average.model, by_client=True)
            self.folder.event("eval", round=0, average_model=self.state.before.overall, peers=None)
        else:
            self.folder.event("resume", round=done)

    def _round(self, round: int) -> None:
        reports = play_round(round, self.members, self.pool, self.parts)
        last = round + 1 == self.method.num_rounds
        for member, report in zip(self.peers, reports, strict=True):
            if report is not None:
                self.state.cpu_s[member.index] += report.cpu_s
                require_finite(f"peer {member.index}, round {round}: the training loss", float(report.loss))
                require_finite(f"peer {member.index}, round {round}: the gradient's norm", float(report.grad_norm))
        if self.group.clock is not None:
            self.group.clock.local([0.0 if report is None else report.wall_s for report in reports])
        if round % self.config.run.log_every == 0 or last:
            self._log(round, [*reports, *[None] * (len(self.members) - len(self.peers))])
        every = self.config.eval.every
        if not every and self.config.eval.points:
            every = math.ceil(self.method.num_rounds / self.config.eval.points)
        if every and (round + 1) % every == 0 and not last and self.average.load(round + 1):
            self.record(lambda: self._evaluate_average(round + 1))
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
        self.folder.event("eval", round=round, average_model=self.evaluate(self.average.model).overall, peers=None)

    def _finish(self) -> dict[str, Any]:
        agreed = self.state.agreed
        if agreed is None:
            self.state.agreed = agreed = agree_on_model(self)
            if self.group.survives_loss:
                # The others will not agree with this site a second time, should it be killed before its end.
                self._checkpoint(self.method.num_rounds)
        return conclude(self, agreed)

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
        self.record(lambda: self.folder.event("checkpoint", round=done))
        # Only now that all members have this one.
        for member in self.members:
            self.store.prune(member.index)
            member.exchange.saved(done)
