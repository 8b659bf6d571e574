"""A whole run in simulation: recipe -> data, model, peers -> rounds -> agreement -> summary, model, report.

This is the only place that puts the layers together. What is trained lives in `algorithms/`, how payloads travel in
`runtimes/`, what is on disk in `run_folder` and `checkpoint`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from peertune.algorithms import ALGORITHMS, Algorithm
from peertune.checkpoint import GENERATIONS, CheckpointStore
from peertune.config import RunConfig
from peertune.data.batches import Batches, UnionBatches
from peertune.errors import CheckpointError, ConfigError, DivergedError
from peertune.evaluation import Measured, measure
from peertune.link import Clock
from peertune.memory import peak_bytes, reset_peak
from peertune.model.adapters import core_of
from peertune.model.blocks import block_table, is_tied
from peertune.model.language_model import LanguageModel
from peertune.model.layers import has_dropout
from peertune.model.load import clone_model, load_full_model
from peertune.model.quantization import num_weights, refuse_quantized
from peertune.peer import Peer
from peertune.prepare import (
    Prepared,
    base_print,
    check_vocabulary,
    data_print,
    model_blocks,
    prepare_data,
    prepare_model,
)
from peertune.records import bytes_sent, round_event, start_event, summary_of, versions
from peertune.report import write_report
from peertune.run_folder import RunFolder, save_trained
from peertune.runtimes import Member, agree, play_round, thread_pool
from peertune.runtimes.simulation import Mailbox
from peertune.seeds import derive_seed
from peertune.topology import Topology, build_topology


class Progress(Protocol):
    """Told how a run goes on. The command line draws bars; tests listen."""

    def note(self, message: str) -> None:
        """A sentence for the user."""

    def rounds(self, done: int, total: int, loss: float | None) -> None:
        """`done` of `total` rounds are over; mean training loss of the last."""


class Silent:
    """A `Progress` that says nothing."""

    def note(self, message: str) -> None: ...

    def rounds(self, done: int, total: int, loss: float | None) -> None: ...


def run(
    config: RunConfig,
    *,
    base: Path | None = None,
    notes: Sequence[str] = (),
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        config: the recipe; `config.run.out` is the folder everything is written to.
        base: folder of the recipe file, from which relative paths are tried second.
        notes: remarks on the recipe, to be shown and kept.
        resume: go on from the newest complete checkpoint, or start anew where there is none.
    Returns:
        The summary, as written to summary.json.
    Raises:
        InputError: something given cannot be used; nothing was written.
        RunError: the run had to stop; its last checkpoint is intact.
    """
    progress = progress or Silent()
    folder = RunFolder(Path(config.run.out))
    folder.check(config.to_dict(), resume)
    if resume and folder.summary.exists():
        progress.note(f"{folder.path}: this run is finished already")
        return folder.read_summary()
    device = resolve_device(config.run.device)
    if config.run.threads or config.run.parallel_peers > 1:
        torch.set_num_threads(config.run.threads or 1)
    if device.type == "cuda":
        # Else the attention's backward pass adds in an order of its own, and no two runs are bitwise equal.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    reset_peak(device)
    data = prepare_data(config, base)
    module = prepare_model(config, device, base)
    check_vocabulary(data, core_of(module).get_input_embeddings().weight.shape[0], config.model.path)
    simulation = Simulation(config, folder, data, module, device, progress, [*notes, *data.notes], base or Path())
    return simulation.carry_out(resume)


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; "auto" is a GPU if there is one.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"run.device: got {name!r}, expected auto, cpu, or a GPU of this machine such as cuda:0"
        ) from error
    return device


class Simulation:
    """One run of N virtual peers on one device."""

    def __init__(
        self,
        config: RunConfig,
        folder: RunFolder,
        data: Prepared,
        module: torch.nn.Module,
        device: torch.device,
        progress: Progress,
        notes: list[str],
        base: Path = Path(),
    ) -> None:
        self.config, self.folder, self.data, self.progress, self.notes = config, folder, data, progress, notes
        self.device, self.base = device, base
        method = ALGORITHMS[config.algorithm.name]
        self.blocks = model_blocks(config, module, method.frozen)
        if config.algorithm.adapter == "none" and is_tied(module) and config.model.train_embeddings == "untied":
            notes.append(
                'token embedding and output head are one tensor: frozen (model.train_embeddings = "all" trains it)'
            )
        self.pools = method.pools_data
        self.topology = self._topology(method)
        own = {name for block in self.blocks for name in block.parameters}
        refuse_quantized(module, own)
        self.base_print = base_print(module, own)
        held = [data.train] if self.pools else [[rendered] for rendered in data.train]
        num_models = 1 if self.pools else config.run.num_peers
        self.clock = Clock(num_models, config.link)
        mailbox = Mailbox(self.clock)
        hub: list[None] = [None] if self.topology.has_hub else []
        self.data_prints = [data_print(each) for each in held] + ["" for _ in hub]
        self.members: list[Member] = []
        plain: bool | None = None
        for index, batches in enumerate([*self._batches(), *hub]):
            model = LanguageModel(clone_model(module, own), config.model, has_plain_head=plain)
            plain = model.has_plain_head
            peer = Peer(index, model, self.blocks, batches, config.run.seed)
            self.members.append(Member(method(peer, config.algorithm, self.topology), mailbox.endpoint(index)))
        # Only now: an instance whose layers were taken over cannot be cloned.
        self.average = LanguageModel(module, config.model, has_plain_head=plain)
        """The base, then wherever an average is wanted; shares what is frozen with the peers."""
        self.peers = [member for member in self.members if not member.is_hub]
        self.method = self.members[0].algorithm
        self.store = CheckpointStore(folder.checkpoints, len(self.members))
        self.pool = self._pool()
        self.before = Measured({})
        self.started = time.monotonic()

    def carry_out(self, resume: bool) -> dict[str, Any]:
        """Rounds, agreement, summary, exported model, report."""
        done = self._resume() if resume else 0
        self.folder.require_space(self._foreseen_bytes())
        self.progress.note("blocks:\n" + block_table(self.average.module, self.method.blocks))
        if done == 0:
            base = str(self.base.absolute())
            members = len(self.members)
            self.folder.create(
                {"config": self.config.to_dict(), "versions": versions(), "base": base, "members": members}
            )
            self.folder.rewind(0)
            self.folder.event("start", **start_event(self.config, self.method, self.data, self.notes))
            self.before = self._evaluate(self.average, by_client=True)
            self.folder.event("eval", round=0, average_model=self.before.overall, peers=None)
        else:
            self.folder.rewind(done)
            self.folder.event("resume", round=done)
        for note in self.notes:
            self.progress.note(note)
        for round in range(done, self.method.num_rounds):
            self._round(round)
        return self._finish()

    def _round(self, round: int) -> None:
        reports = play_round(round, self.members, self.pool)
        self.clock.local([0.0 if report is None else report.cpu_s for report in reports])
        last = round + 1 == self.method.num_rounds
        for peer, report in enumerate(reports):
            if report is not None:
                _require_finite(f"peer {peer}, round {round}: the training loss", float(report.loss))
                _require_finite(f"peer {peer}, round {round}: the gradient's norm", float(report.grad_norm))
        if round % self.config.run.log_every == 0 or last:
            distance = self._consensus_distance(round)
            fields = round_event(round, self.members, reports, distance, self.clock, self._wall_s())
            self.folder.event("round", **fields)
        every = self.config.eval.every
        if not every and self.config.eval.points:
            every = max(1, self.method.num_rounds // self.config.eval.points)
        if every and (round + 1) % every == 0 and not last:
            self._load_average(round + 1)
            self.folder.event("eval", round=round + 1, average_model=self._evaluate(self.average).overall, peers=None)
        every = self.config.run.checkpoint_every
        if last or ((round + 1) % every == 0 if every else self.method.is_boundary(round)):
            self._checkpoint(round + 1)
        losses = [float(report.loss) for report in reports if report is not None]
        self.progress.rounds(round + 1, self.method.num_rounds, sum(losses) / len(losses) if losses else None)

    def _finish(self) -> dict[str, Any]:
        rounds = self.method.num_rounds
        own = [self._evaluate(member.algorithm.peer.model, by_client=True) for member in self.peers]
        peers = [measured.overall for measured in own]
        hops = agree(rounds, self.members)
        if hops:
            self.folder.event("agreement", hops=hops, bytes_sent=bytes_sent(self.members))
        self._load_average(rounds, agreed=self.method.agrees)
        agreed = self._evaluate(self.average, by_client=True)
        average = agreed.overall
        for name, value in average.items():
            _require_finite(f"the average model's {name}", value)
        self.folder.event("eval", round=rounds, average_model=average, peers=peers)
        metrics: dict[str, Any] = {"before": self.before.overall, "average_model": average, "peers": peers}
        if self.config.algorithm.local_modules:
            metrics["personal"] = [self._evaluate(member.algorithm.peer.model).overall for member in self.peers]
        if agreed.by_client:
            metrics["by_client"] = {
                "before": self.before.by_client,
                "average_model": agreed.by_client,
                "peers": [measured.by_client for measured in own],
            }
        wall_s, peak = self._wall_s(), peak_bytes(self.device)
        save_trained(
            self.folder.model,
            self.average.module,
            self.data.tokenizer,
            lambda: load_full_model(self.config.model, torch.device("cpu"), self.base),
            self.folder.adapter,
        )
        self.folder.event("end", metrics=metrics, wall_s=wall_s, peak_memory_bytes=peak)
        summary = summary_of(self.config, self.members, metrics, self.clock, wall_s, peak)
        write_report(self.folder.path)
        self.folder.write_summary(summary)
        return summary

    def _pool(self) -> Executor | None:
        """Threads for the peers' local phases, where the recipe asks for them."""
        section = self.config.run
        if section.parallel_peers == 1:
            return None
        for reason, applies in (
            (f"run.threads = {section.threads}, expected 1", section.threads > 1),
            (f"device {self.device}, expected a CPU", self.device.type != "cpu"),
            ("a model with dropout, whose draws come from one generator", has_dropout(self.average.module)),
        ):
            if applies:
                raise ConfigError(
                    f"run.parallel_peers: got {section.parallel_peers} with {reason}; set run.parallel_peers = 1"
                )
        return thread_pool(section.parallel_peers)

    def _topology(self, method: type[Algorithm]) -> Topology:
        if self.pools:
            return Topology("alone", 1, np.ones((1, 1)))
        section = method.graph(self.config.topology)
        if section != self.config.topology:
            self.notes.append(
                f"{self.config.algorithm.name} runs on topology.kind = {section.kind!r}, weights = {section.weights!r}"
            )
        counts = [len(rendered.samples) for rendered in self.data.train]
        seed = self.config.run.seed if section.seed is None else section.seed
        topology = build_topology(section, self.config.run.num_peers, seed, counts)
        return replace(topology, has_hub=method.has_hub(section))

    def _batches(self) -> Sequence[Batches | UnionBatches]:
        """Each model's batches: a peer's own; for a method that pools the data, the union of all peers'."""
        fixed = self.config.model.prefix_cache or self.config.model.compile
        every = [
            Batches(
                rendered.samples,
                self.config.data.batch_size,
                seed=derive_seed(self.config.run.seed, i, "batches"),
                pad_id=self.data.tokenizer.pad_token_id,
                pad_to=self.config.model.max_length if fixed else 0,
            )
            for i, rendered in enumerate(self.data.train)
        ]
        return [UnionBatches(every)] if self.pools else every

    def _resume(self) -> int:
        """Rounds already done: those of the newest complete checkpoint, which is taken up; 0 where there is none."""
        done = self.store.newest_complete()
        if done is None:
            self.progress.note(f"{self.folder.path}: no complete checkpoint; starting from the beginning")
            return 0
        for member in self.members:
            tensors, plain = self.store.load(member.index, done)
            for what, now in (("data", self.data_prints[member.index]), ("base", self.base_print)):
                if plain[what] != now:
                    raise CheckpointError(
                        f"{self.folder.path}: peer {member.index}'s {what} has"
                        " changed since this run began; bring the old one back, or start anew in another folder"
                    )
            member.algorithm.load_state_dict(tensors, plain["algorithm"], done)
            if member.algorithm.peer.batches is not None:
                member.algorithm.peer.batches.load_state_dict(plain["batches"])
            member.exchange.load_state_dict(plain["exchange"])
            self.before = Measured(plain["before"], plain.get("before_by_client", {}))
            elapsed = plain["wall_s"]
            self.clock.load_state_dict(plain["clock"])
        self.started = time.monotonic() - elapsed
        self.progress.note(f"{self.folder.path}: resuming after round {done} of {self.method.num_rounds}")
        then = self.folder.read_recipe().get("versions")
        if then != versions():
            self.progress.note(f"versions have changed, and results may: {then} when this run began, {versions()} now")
        return done

    def _checkpoint(self, done: int) -> None:
        for member in self.members:
            tensors, plain = member.algorithm.state_dict(done)
            batches = member.algorithm.peer.batches
            state = {
                "algorithm": plain,
                "batches": None if batches is None else batches.state_dict(),
                "exchange": member.exchange.state_dict(),
                "common": list(member.algorithm.common),
                "consensus": list(member.algorithm.consensus(done)),
                "data": self.data_prints[member.index],
                "base": self.base_print,
                "before": self.before.overall,
                "before_by_client": self.before.by_client,
                "wall_s": self._wall_s(),
                "clock": self.clock.state_dict(),
            }
            self.store.save(member.index, done, tensors, state)
        self.store.prune()
        self.folder.event("checkpoint", round=done)

    def _evaluate(self, model: LanguageModel, by_client: bool = False) -> Measured:
        if not self.data.test.samples:
            return Measured({})
        return measure(model, self.data.test, self.config.eval, by_client=by_client)

    @torch.no_grad()
    def _load_average(self, round: int, agreed: bool = False) -> None:
        """Put the peers' weighted average after some rounds into `self.average`; where all agreed, what each holds."""
        own = dict(self.average.module.named_parameters())
        weights = self.method.consensus(round)
        for name in self.method.shared_names():
            if agreed:
                own[name].copy_(self.method.shared(name))
            else:
                own[name].copy_(_weighted_mean((member.algorithm.shared(name) for member in self.peers), weights))

    def _consensus_distance(self, round: int) -> float | None:
        """sqrt(mean_i ||theta_i - mean||^2) over the tensors that the round trained; None for a lone model."""
        if len(self.peers) == 1:
            return None
        total, weights = 0.0, self.method.consensus(round + 1)
        for name in self.method.shared_names(round):
            held = [member.algorithm.shared(name) for member in self.peers]
            mean = _weighted_mean(held, weights)
            total += sum(float(torch.linalg.vector_norm(tensor.sub_(mean))) ** 2 for tensor in held)
        return math.sqrt(total / len(self.peers))

    def _wall_s(self) -> float:
        return time.monotonic() - self.started

    def _foreseen_bytes(self) -> int:
        """Disk the checkpoints and the exported model will need: generations kept, one being written, the model."""
        sizes: dict[str, int] = {name: num_weights(p) for name, p in self.average.module.named_parameters()}
        trained = sum(sizes[n] for block in self.blocks for n in block.parameters)
        largest = max(sum(sizes[n] for n in block.parameters) for block in self.method.blocks)
        return (GENERATIONS + 1) * len(self.members) * (4 * trained + 8 * largest) + 4 * sum(sizes.values())


def _weighted_mean(tensors: Iterable[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i x_i in the order given: float32, a new tensor."""
    pairs = zip(tensors, weights, strict=True)
    first, weight = next(pairs)
    total = first * weight
    for tensor, weight in pairs:
        total.add_(tensor, alpha=weight)
    return total


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} became {value}; lower algorithm.lr or set algorithm.max_grad_norm, and start anew in another"
            " folder"
        )
