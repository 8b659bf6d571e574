"""A whole run in simulation: recipe -> data, model, peers -> rounds -> agreement -> summary, model, report.

This is the only place that puts the layers together. What is trained lives in `algorithms/`, how payloads travel in
`runtimes/`, what is on disk in `run_folder` and `checkpoint`.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import peertune
from peertune.algorithms import ALGORITHMS
from peertune.algorithms.base import LocalReport
from peertune.checkpoint import GENERATIONS, CheckpointStore
from peertune.config import RunConfig
from peertune.data.batches import Batches, UnionBatches
from peertune.errors import CheckpointError, ConfigError, DivergedError
from peertune.evaluation import Measured, measure
from peertune.memory import peak_bytes, reset_peak
from peertune.model.blocks import Block, block_table, frozen_names, is_tied, partition_blocks
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model, load_model
from peertune.peer import Peer
from peertune.prepare import Prepared, base_print, check_vocabulary, data_print, prepare_data
from peertune.report import write_report
from peertune.run_folder import RunFolder, save_model
from peertune.runtimes import Member, agree, play_round
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
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    if device.type == "cuda":
        # Else the attention's backward pass adds in an order of its own, and no two runs are bitwise equal.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    reset_peak(device)
    data = prepare_data(config, base)
    module = load_model(config.model, device, base)
    check_vocabulary(data, module.get_input_embeddings().weight.shape[0], config.model.path)  # type: ignore[operator]
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
        self.base_print = base_print(module, own)
        held = [data.train] if method.pools_data else [[rendered] for rendered in data.train]
        self.data_prints = [data_print(each) for each in held]
        self.members: list[Member] = []
        for index, batches in enumerate(self._batches()):
            model = LanguageModel(clone_model(module, own), config.model)
            peer = Peer(index, model, self.blocks, batches, config.run.seed)
            self.members.append(Member(method(peer, config.algorithm), mailbox.endpoint(index)))
        self.average = LanguageModel(module, config.model)
        """The base, then wherever an average is wanted; shares what is frozen with the peers."""
        self.method = self.members[0].algorithm
        self.store = CheckpointStore(folder.checkpoints, self.num_models)
        self.before = Measured({})
        self.started = time.monotonic()

    def carry_out(self, resume: bool) -> dict[str, Any]:
        """Rounds, agreement, summary, exported model, report."""
        done = self._resume() if resume else 0
        self.folder.require_space(self._foreseen_bytes())
        self.progress.note("blocks:\n" + block_table(self.average.module, self.method.blocks))
        if done == 0:
            pi = self.topology.stationary.tolist()
            base = str(self.base.absolute())
            self.folder.create(
                {"config": self.config.to_dict(), "versions": versions(), "stationary": pi, "base": base}
            )
            self.folder.rewind(0)
            self.folder.event("start", **self._start_event())
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
        reports = play_round(round, self.members, self.topology)
        losses = [float(report.loss) for report in reports]
        last = round + 1 == self.method.num_rounds
        for peer, (loss, report) in enumerate(zip(losses, reports, strict=True)):
            _require_finite(f"peer {peer}, round {round}: the training loss", loss)
            _require_finite(f"peer {peer}, round {round}: the gradient's norm", float(report.grad_norm))
        if round % self.config.run.log_every == 0 or last:
            self.folder.event("round", **self._round_event(round, reports, losses))
        every = self.config.eval.every
        if every and (round + 1) % every == 0 and not last:
            self._load_average()
            self.folder.event("eval", round=round + 1, average_model=self._evaluate(self.average).overall, peers=None)
        every = self.config.run.checkpoint_every
        if last or ((round + 1) % every == 0 if every else self.method.is_boundary(round)):
            self._checkpoint(round + 1)
        self.progress.rounds(round + 1, self.method.num_rounds, sum(losses) / len(losses))

    def _finish(self) -> dict[str, Any]:
        rounds = self.method.num_rounds
        own = [self._evaluate(member.algorithm.peer.model, by_client=True) for member in self.members]
        peers = [measured.overall for measured in own]
        if self.method.agrees:
            hops = agree(rounds, self.members, self.topology)
            self.folder.event("agreement", hops=hops, bytes_sent=self._bytes_sent())
        self._load_average(agreed=self.method.agrees)
        agreed = self._evaluate(self.average, by_client=True)
        average = agreed.overall
        for name, value in average.items():
            _require_finite(f"the average model's {name}", value)
        self.folder.event("eval", round=rounds, average_model=average, peers=peers)
        metrics: dict[str, Any] = {"before": self.before.overall, "average_model": average, "peers": peers}
        if agreed.by_client:
            metrics["by_client"] = {
                "before": self.before.by_client,
                "average_model": agreed.by_client,
                "peers": [measured.by_client for measured in own],
            }
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
        write_report(self.folder.path)
        self.folder.write_summary(summary)
        return summary

    def _topology(self) -> Topology:
        section, seed = self.config.topology, self.config.run.seed
        counts = [len(rendered.samples) for rendered in self.data.train]
        seed = seed if section.seed is None else section.seed
        topology = build_topology(section, self.config.run.num_peers, seed, counts)
        return topology if self.num_models > 1 else Topology("alone", 1, np.ones((1, 1)))

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
        return [UnionBatches(every)] if self.num_models < len(every) else every

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
            member.algorithm.peer.batches.load_state_dict(plain["batches"])
            member.exchange.load_state_dict(plain["exchange"])
            self.before = Measured(plain["before"], plain.get("before_by_client", {}))
            elapsed = plain["wall_s"]
        self.started = time.monotonic() - elapsed
        self.progress.note(f"{self.folder.path}: resuming after round {done} of {self.method.num_rounds}")
        then = self.folder.read_recipe().get("versions")
        if then != versions():
            self.progress.note(f"versions have changed, and results may: {then} when this run began, {versions()} now")
        return done

    def _checkpoint(self, done: int) -> None:
        for member in self.members:
            tensors, plain = member.algorithm.state_dict(done)
            state = {
                "algorithm": plain,
                "batches": member.algorithm.peer.batches.state_dict(),
                "exchange": member.exchange.state_dict(),
                "data": self.data_prints[member.index],
                "base": self.base_print,
                "before": self.before.overall,
                "before_by_client": self.before.by_client,
                "wall_s": self._wall_s(),
            }
            self.store.save(member.index, done, tensors, state)
        self.store.prune()
        self.folder.event("checkpoint", round=done)

    def _evaluate(self, model: LanguageModel, by_client: bool = False) -> Measured:
        if not self.data.test.samples:
            return Measured({})
        return measure(model, self.data.test, self.config.eval, by_client=by_client)

    @torch.no_grad()
    def _load_average(self, agreed: bool = False) -> None:
        """Put the peers' weighted average into `self.average`; where all agreed, what each of them holds."""
        own = dict(self.average.module.named_parameters())
        for name in self.method.shared_names():
            own[name].copy_(self.method.shared(name) if agreed else self._mean(name))

    def _mean(self, name: str) -> Tensor:
        first, *others = [(m.algorithm, float(p)) for m, p in zip(self.members, self.topology.stationary, strict=True)]
        total = first[0].shared(name) * first[1]
        for algorithm, weight in others:
            total.add_(algorithm.shared(name), alpha=weight)
        return total

    def _consensus_distance(self, round: int) -> float | None:
        """sqrt(mean_i ||theta_i - mean||^2) over the tensors that the round trained; None for a lone model."""
        if len(self.members) == 1:
            return None
        total = 0.0
        for name in self.method.shared_names(round):
            mean = self._mean(name)
            for member in self.members:
                total += float(torch.linalg.vector_norm(member.algorithm.shared(name).sub_(mean))) ** 2
        return math.sqrt(total / len(self.members))

    def _bytes_sent(self) -> list[int]:
        return [member.exchange.bytes_sent for member in self.members]

    def _wall_s(self) -> float:
        return time.monotonic() - self.started

    def _foreseen_bytes(self) -> int:
        """Disk the checkpoints and the exported model will need: generations kept, one being written, the model."""
        sizes: dict[str, int] = {name: p.numel() for name, p in self.average.module.named_parameters()}
        trained = sum(sizes[n] for block in self.blocks for n in block.parameters)
        largest = max(sum(sizes[n] for n in block.parameters) for block in self.method.blocks)
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


def _require_finite(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} became {value}; lower algorithm.lr or set algorithm.max_grad_norm, and start anew in another"
            " folder"
        )


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
