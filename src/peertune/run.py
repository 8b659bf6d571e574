"""A whole run in simulation: recipe -> data, model, peers -> rounds -> agreement -> summary, model, report.

This is the only place that puts the layers together. What is trained lives in `algorithms/`, how payloads travel in
`runtimes/`, what is on disk in `run_folder` and `checkpoint`.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import peertune
from peertune.algorithms import ALGORITHMS
from peertune.algorithms.base import LocalReport
from peertune.checkpoint import GENERATIONS, CheckpointStore
from peertune.config import RunConfig
from peertune.data.batches import Batches, UnionBatches
from peertune.data.chat import plain_template
from peertune.data.load import load_table
from peertune.data.partition import describe_partition, partition
from peertune.data.render import Rendered, Sample, find_labels, label_tokens, render
from peertune.errors import CheckpointError, ConfigError, DataError, DivergedError
from peertune.evaluate import Metrics, evaluate
from peertune.memory import peak_bytes, reset_peak
from peertune.model.blocks import Block, block_table, frozen_names, is_tied, partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model, load_model, load_tokenizer
from peertune.peer import Peer
from peertune.report import write_report
from peertune.run_folder import RunFolder, save_model
from peertune.runtimes import Member, agree, play_round
from peertune.runtimes.simulation import Mailbox
from peertune.seeds import derive_seed, numpy_rng
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


@dataclass(frozen=True)
class Prepared:
    """Data of a run, dealt and tokenised."""

    tokenizer: Any
    train: list[Rendered]
    """By peer."""
    test: list[Sample]
    labels: list[list[int]]
    """Token ids of each label; empty unless the task is classification."""
    classes: list[dict[str, Any]]
    """Who holds what, by peer, for the report."""


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
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    reset_peak(device)
    data = prepare_data(config, base)
    module = load_model(config.model, device, base)
    simulation = Simulation(config, folder, data, module, device, progress, list(notes))
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
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"run.device: got {name!r}, expected auto, cpu, or a GPU of this machine such as cuda:0"
        ) from error
    return device


def prepare_data(config: RunConfig, base: Path | None) -> Prepared:
    """Load, deal and tokenise the data. Raises DataError, ModelError (tokenizer)."""
    section, seed = config.data, config.run.seed
    table = load_table(section.train, section, base=base)
    test = load_table(section.test, section, base=base) if section.test else None
    label_names = find_labels(table.rows, section) if section.task == "classification" else []
    partition_seed = seed if section.partition.seed is None else section.partition.seed
    parts = partition(table.rows, table.source, config.run.num_peers, section, partition_seed)
    tokenizer = load_tokenizer(config.model, base)
    if section.task in ("instruction", "chat") and tokenizer.chat_template is None:
        tokenizer.chat_template = plain_template(tokenizer)  # exported with the model, so that its users render alike
    length = config.model.max_length
    train = []
    for peer, rows in enumerate(parts):
        try:
            train.append(render([table.rows[i] for i in rows], section, tokenizer, length, label_names))
        except DataError as error:
            raise DataError(f"peer {peer}: {error}") from error
    held_out: list[Sample] = []
    if test is not None:
        held_out = render(test.rows, section, tokenizer, length, label_names).samples
        limit = config.eval.max_samples
        if limit and len(held_out) > limit:
            keep = numpy_rng(seed, "eval").choice(len(held_out), limit, replace=False)
            held_out = [held_out[i] for i in sorted(keep)]
    return Prepared(
        tokenizer=tokenizer,
        train=train,
        test=held_out,
        labels=label_tokens(tokenizer, label_names),
        classes=describe_partition(table.rows, parts, section),
    )


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
    ) -> None:
        self.config, self.folder, self.data, self.progress, self.notes = config, folder, data, progress, notes
        self.device = device
        method = ALGORITHMS[config.algorithm.name]
        layers = getattr(config.algorithm, "layers_per_block", 0)
        self.blocks = partition_blocks(module, layers, config.model.train_embeddings)
        if is_tied(module) and config.model.train_embeddings == "untied":
            notes.append(
                'token embedding and output head are one tensor: frozen (model.train_embeddings = "all" trains it)'
            )
        self.num_models = 1 if method.pools_data else config.run.num_peers
        self.topology = self._topology()
        mailbox = Mailbox()
        own = {name for block in self.blocks for name in block.parameters}
        self.members: list[Member] = []
        for index in range(self.num_models):
            model = LanguageModel(clone_model(module, own), config.model)
            peer = Peer(index, model, self.blocks, self._batches(index), config.run.seed)
            self.members.append(Member(method(peer, config.algorithm), mailbox.endpoint(index)))
        self.average = LanguageModel(module, config.model)
        """The base, then wherever an average is wanted; shares what is frozen with the peers."""
        self.method = self.members[0].algorithm
        self.store = CheckpointStore(folder.checkpoints, self.num_models)
        self.before: Metrics = {}
        self.started = time.monotonic()

    def carry_out(self, resume: bool) -> dict[str, Any]:
        """Rounds, agreement, summary, exported model, report."""
        done = self._resume() if resume else 0
        self.folder.require_space(self._foreseen_bytes())
        if done == 0:
            self.folder.create({"config": self.config.to_dict(), "versions": versions()})
            self.folder.rewind(0)
            self.folder.event("start", **self._start_event())
            self.before = self._evaluate(self.average)
            self.folder.event("eval", round=0, average_model=self.before, peers=None)
        for note in self.notes:
            self.progress.note(note)
        for round in range(done, self.method.num_rounds):
            self._round(round)
        return self._finish()

    def _round(self, round: int) -> None:
        reports = play_round(round, self.members, self.topology)
        losses = [float(report.loss) for report in reports]
        last = round + 1 == self.method.num_rounds
        for peer, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise DivergedError(
                    f"peer {peer}, round {round}: the training loss became {loss}; lower algorithm.lr or set"
                    " algorithm.max_grad_norm, and start anew in another folder"
                )
        if round % self.config.run.log_every == 0 or last:
            self.folder.event("round", **self._round_event(round, reports, losses))
        every = self.config.eval.every
        if every and (round + 1) % every == 0 and not last:
            self._load_average()
            self.folder.event("eval", round=round + 1, average_model=self._evaluate(self.average), peers=None)
        every = self.config.run.checkpoint_every
        if last or ((round + 1) % every == 0 if every else self.method.is_boundary(round)):
            self._checkpoint(round + 1)
        self.progress.rounds(round + 1, self.method.num_rounds, sum(losses) / len(losses))

    def _finish(self) -> dict[str, Any]:
        rounds = self.method.num_rounds
        peers = [self._evaluate(member.algorithm.peer.model) for member in self.members]
        if self.method.agrees:
            hops = agree(rounds, self.members, self.topology)
            self.folder.event("agreement", hops=hops, bytes_sent=self._bytes_sent())
        self._load_average()
        average = self._evaluate(self.average)
        self.folder.event("eval", round=rounds, average_model=average, peers=peers)
        metrics = {"before": self.before, "average_model": average, "peers": peers}
        wall_s, peak = self._wall_s(), peak_bytes(self.device)
        save_model(self.folder.model, self.average.module, self.data.tokenizer)
        self.folder.event("end", metrics=metrics, wall_s=wall_s, peak_memory_bytes=peak)
        summary = {
            "config": self.config.to_dict(),
            "versions": versions(),
            "seed": self.config.run.seed,
            "algorithm": self.config.algorithm.name,
            "metrics": metrics,
            "bytes_sent_per_peer": self._bytes_sent(),
            "rounds": rounds,
            "wall_s": wall_s,
            "peak_memory_bytes": peak,
            "weights": self.topology.weights.tolist(),
            "lambda2": self.topology.second_eigenvalue,
        }
        self.folder.write_summary(summary)
        write_report(self.folder.path)
        return summary

    def _topology(self) -> Topology:
        section, seed = self.config.topology, self.config.run.seed
        counts = [len(rendered.samples) for rendered in self.data.train]
        seed = seed if section.seed is None else section.seed
        return build_topology(section, self.num_models, seed, counts if self.num_models > 1 else None)

    def _batches(self, index: int) -> Batches | UnionBatches:
        """A peer's batches; for a method that pools the data, the union of all peers' batches."""
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
        return UnionBatches(every) if self.num_models < len(every) else every[index]

    def _resume(self) -> int:
        """Rounds already done: those of the newest complete checkpoint, which is taken up; 0 where there is none."""
        done = self.store.newest_complete()
        if done is None:
            self.progress.note(f"{self.folder.path}: no complete checkpoint; starting from the beginning")
            return 0
        self.folder.rewind(done)
        for member in self.members:
            tensors, plain = self.store.load(member.index, done)
            if plain["data"] != self._data_print(member.index):
                raise CheckpointError(
                    f"{self.folder.path}: peer {member.index}'s data has changed since this run began: got"
                    f" {self._data_print(member.index)} sequences and tokens, expected {plain['data']}; bring the old"
                    " data back or start anew"
                )
            member.algorithm.load_state_dict(tensors, plain["algorithm"], done)
            member.algorithm.peer.batches.load_state_dict(plain["batches"])
            member.exchange.load_state_dict(plain["exchange"])
            self.before, elapsed = plain["before"], plain["wall_s"]
        self.started = time.monotonic() - elapsed
        self.folder.event("resume", round=done)
        self.progress.note(f"{self.folder.path}: resuming after round {done} of {self.method.num_rounds}")
        return done

    def _checkpoint(self, done: int) -> None:
        for member in self.members:
            tensors, plain = member.algorithm.state_dict(done)
            state = {
                "algorithm": plain,
                "batches": member.algorithm.peer.batches.state_dict(),
                "exchange": member.exchange.state_dict(),
                "data": self._data_print(member.index),
                "before": self.before,
                "wall_s": self._wall_s(),
            }
            self.store.save(member.index, done, tensors, state)
        self.store.prune()
        self.folder.event("checkpoint", round=done)

    def _evaluate(self, model: LanguageModel) -> Metrics:
        if not self.data.test:
            return {}
        return evaluate(model, self.data.test, self.data.tokenizer.pad_token_id, labels=self.data.labels)

    @torch.no_grad()
    def _load_average(self) -> None:
        """Put the peers' weighted average into `self.average`, tensor by tensor."""
        own = dict(self.average.module.named_parameters())
        for name in self.method.shared_names():
            own[name].copy_(self._mean(name))

    def _mean(self, name: str) -> Tensor:
        total: Tensor | float = 0.0
        for member, weight in zip(self.members, self.topology.stationary, strict=True):
            total = member.algorithm.shared(name) * float(weight) + total
        assert isinstance(total, Tensor)
        return total

    def _consensus_distance(self, round: int) -> float | None:
        """sqrt(mean_i ||theta_i - mean||^2) over the tensors that the round trained; None for a lone model."""
        if len(self.members) == 1:
            return None
        total = 0.0
        for name in self.method.shared_names(round):
            peers = torch.stack([member.algorithm.shared(name) for member in self.members])
            total += float(torch.linalg.vector_norm(peers - peers.mean(0))) ** 2
        return math.sqrt(total / len(self.members))

    def _bytes_sent(self) -> list[int]:
        return [member.exchange.bytes_sent for member in self.members]

    def _wall_s(self) -> float:
        return time.monotonic() - self.started

    def _data_print(self, index: int) -> list[int]:
        """Sequences and tokens a peer holds: enough to notice that its data was exchanged."""
        held = self.data.train if self.method.pools_data else [self.data.train[index]]
        return [sum(len(r.samples) for r in held), sum(r.num_tokens for r in held)]

    def _foreseen_bytes(self) -> int:
        """Disk the checkpoints and the exported model will need: generations kept, one being written, the model."""
        sizes: dict[str, int] = {name: p.numel() for name, p in self.average.module.named_parameters()}
        trained = sum(sizes[n] for block in self.blocks for n in block.parameters)
        largest = max(sum(sizes[n] for n in block.parameters) for block in self.blocks)
        return (GENERATIONS + 1) * self.num_models * (4 * trained + 8 * largest) + 4 * sum(sizes.values())

    def _round_event(self, round: int, reports: Sequence[LocalReport], losses: list[float]) -> Mapping[str, Any]:
        return {
            "round": round,
            **self.method.position(round),
            "loss": losses,
            "lr": reports[0].lr,
            "grad_norm": [float(report.grad_norm) for report in reports],
            "consensus_distance": self._consensus_distance(round),
            "bytes_sent": self._bytes_sent(),
            "epochs": [member.algorithm.peer.batches.epochs for member in self.members],
            "wall_s": self._wall_s(),
        }

    def _start_event(self) -> Mapping[str, Any]:
        module = self.average.module
        sizes = {name: p.numel() for name, p in module.named_parameters()}
        held = [
            {
                "samples": shown["samples"],
                "classes": shown["classes"],
                "sequences": len(rendered.samples),
                "tokens": rendered.num_tokens,
                "cut": rendered.num_cut,
                "dropped": rendered.num_dropped,
            }
            for shown, rendered in zip(self.data.classes, self.data.train, strict=True)
        ]
        cut, dropped = (sum(peer[key] for peer in held) for key in ("cut", "dropped"))
        if cut or dropped:
            self.notes.append(f"{cut} training rows were cut to model.max_length, {dropped} had nothing to learn from")
        return {
            "config": self.config.to_dict(),
            "versions": versions(),
            "notes": self.notes,
            "model": {
                "parameters": sum(sizes.values()),
                "trained": sum(sizes[n] for block in self.blocks for n in block.parameters),
                "frozen": frozen_names(module, self.blocks),
            },
            "blocks": [_describe(block, sizes) for block in self.method.blocks],
            "peers": held,
            "edges": self.topology.edges,
            "weights": self.topology.weights.tolist(),
            "lambda2": self.topology.second_eigenvalue,
            "rounds": self.method.num_rounds,
        }


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import transformers

    return {
        "peertune": peertune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _describe(block: Block, sizes: Mapping[str, int]) -> dict[str, Any]:
    count = sum(sizes[name] for name in block.parameters)
    return {"index": block.index, "name": block.name, "parameters": count, "tensors": len(block.parameters)}


__all__ = ["Progress", "Silent", "Simulation", "block_table", "prepare_data", "resolve_device", "run", "versions"]
