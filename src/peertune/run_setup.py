"""What a process plays a run with: the members it hosts and their group, the method, the folder, and what is counted.

Made once, before the first round, and the same for every runtime. The rounds are `run`'s, what follows them is
`run_end`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peertune.algorithms import ALGORITHMS
from peertune.assemble import check_exchange, make_batches, make_parts, make_pool, make_topology, wrap_model
from peertune.average import Average
from peertune.checkpoint import CheckpointStore
from peertune.config import LinkSection, RunConfig
from peertune.errors import ModelError
from peertune.evaluation import Measured, measure
from peertune.model.blocks import is_tied
from peertune.model.language_model import LanguageModel
from peertune.model.load import clone_model
from peertune.peer import Peer
from peertune.prepare import Prepared, base_fingerprint, data_fingerprint, model_blocks
from peertune.progress import Progress
from peertune.robust import ends_in_agreement
from peertune.run_folder import RunFolder
from peertune.run_state import RunState
from peertune.runtimes import Group, Member
from peertune.topology import Topology

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


class RunSetup:
    """What this process plays a run with.

    Args:
        connect: the runtime.
        resume: go on from the newest complete checkpoint, where there is one.
    Raises:
        InputError: the parts do not go together; nothing was written.
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
        self.store = CheckpointStore(folder.checkpoints, num_shards, shard)
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
            folder.check(self.config.to_dict(), self.resume, None if self.site is None else self.site.index)
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

    def record(self, write: Callable[[], None]) -> None:
        """Let the recorder write, and the others wait for it."""
        if self.group.is_recorder:
            write()
        self.group.gather([None] * len(self.members))

    def evaluate(self, model: LanguageModel, by_client: bool = False) -> Measured:
        """A model's quality on the test rows; nothing where there are none."""
        if not self.data.test.samples:
            return Measured({})
        return measure(model, self.data.test, self.config.eval, by_client=by_client)

    def name_of(self, member: int) -> int | str:
        """What a member is called: at a site by the charter, else by its index."""
        return member if self.site is None else self.site.members[member]
