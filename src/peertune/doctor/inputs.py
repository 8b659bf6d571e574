"""What a site was given: the charter, its key, its rows, the base, and the graph that it is in."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import torch

from peertune.algorithms import ALGORITHMS, Algorithm
from peertune.assemble import make_algorithm, make_batches, make_topology
from peertune.charter import Charter, check_members, read_charter, sample_counts
from peertune.config import RunConfig
from peertune.doctor.finding import Finding, problem
from peertune.errors import IdentityError, InputError, ModelError
from peertune.identity import Identity, load_identity
from peertune.prepare import Prepared, check_vocabulary, prepare_data, prepare_model, prepare_tokenizer
from peertune.runtimes import edges
from peertune.site import check_base
from peertune.topology import Topology

SOON_DAYS = 7
"""A charter that is valid for fewer days is remarked on."""


def check_charter(path: Path, today: date | None = None) -> tuple[Charter | None, list[Finding]]:
    """Whether it can be read and holds, and for how long; no charter where it cannot be read."""
    today = today or datetime.now(UTC).date()
    try:
        charter = read_charter(path)
    except InputError as error:
        return None, [problem("charter", error, "get the file anew from whoever wrote it")]
    try:
        charter.check(today)
    except InputError as error:
        return charter, [problem("charter", error, "have a new one written and signed")]
    days = (charter.expires - today).days
    text = f"signed by all {len(charter.members)}, for this version, valid until {charter.expires} ({days} days)"
    if days >= SOON_DAYS:
        return charter, [Finding("charter", "ok", text, values={"days": days})]
    advice = "if the run may take longer, have one with a later date signed"
    return charter, [Finding("charter", "warning", text, advice, {"days": days})]


def check_key(folder: Path, charter: Charter | None) -> tuple[Identity | None, list[Finding]]:
    """Whether this site's key can be used, and is a member's."""
    try:
        own = load_identity(folder)
    except IdentityError as error:
        return None, [problem("key", error, "see `peertune keygen`")]
    if charter is None:
        return own, [Finding("key", "ok", f"found in {folder}; no charter to look for it in")]
    try:
        name = charter.members[charter.index_of(own.id)].name
    except InputError as error:
        return own, [problem("key", error, "name the right folder with --identity")]
    return own, [Finding("key", "ok", f"that of {name}, readable by this user only", values={"member": name})]


def check_data(config: RunConfig, charter: Charter, base: Path, index: int) -> tuple[Prepared | None, list[Finding]]:
    """Whether the rows load, and render with this recipe's task."""
    is_peer, name = index < config.run.num_peers, charter.members[index].name
    if config.data.train and not is_peer:
        return None, [Finding("data", "problem", f"{name} is the server, which has none", "leave --data out")]
    missing = [Finding("data", "warning", "not looked at", "name the file with --data")] * is_peer
    if not config.data.train and not (config.data.test and is_peer):
        return None, missing or [Finding("data", "ok", "none: this is the server")]
    try:
        data = prepare_data(config, base, index)
    except ModelError:
        return None, [Finding("data", "warning", "not looked at, for want of a tokenizer", "see to the base first")]
    except InputError as error:
        return None, [problem("data", error, "correct the file, or its fields with --set")]
    if index not in data.train:
        return data, missing
    own = data.train[index]
    count, told = len(own.samples), charter.members[index].samples
    text = f"{count} samples, {own.num_tokens} tokens; {own.num_cut} cut, {own.num_dropped} with nothing to learn from"
    values = {"samples": count, "held_out": len(data.test.samples)}
    section = ALGORITHMS[config.algorithm.name].graph(config.topology)
    if section.weights == "samples" and told != count:
        text += f"; the charter weights this site by {told}"
        return data, [Finding("data", "warning", text, "have the number put right in a new charter", values)]
    return data, [Finding("data", "ok", text, values=values)]


def check_topology(config: RunConfig, charter: Charter) -> tuple[Topology | None, list[Finding]]:
    """The graph, and what is wrong with it."""
    counts = sample_counts(charter.members, config.run.num_peers)
    try:
        return make_topology(config, ALGORITHMS[config.algorithm.name], counts), []
    except InputError as error:
        return None, [problem("graph", error, "have a new charter written")]


def check_model(
    config: RunConfig,
    charter: Charter,
    base: Path,
    index: int,
    device: torch.device,
    data: Prepared | None,
    topology: Topology | None,
) -> tuple[Algorithm | None, list[Finding]]:
    """Whether base and tokenizer are the charter's; and the method, ready to train with what is here."""
    try:
        tokenizer = prepare_tokenizer(config, base) if data is None else data.tokenizer
        module = prepare_model(config, device, base)
        if data is not None:
            check_vocabulary(module, config.model.path, data.test, data.train.values())
        check_base(charter, config.model.path, module, tokenizer)
    except InputError as error:
        return None, [problem("base", error, "name the right folder with --model")]
    same = Finding("base", "ok", "weights and tokenizer are those of the charter")
    if topology is None:
        return None, [same]
    try:
        pools = ALGORITHMS[config.algorithm.name].pools_data
        batches = None if data is None else make_batches(config, data, pools).get(index)
        return make_algorithm(config, module, topology, index, batches), [same]
    except InputError as error:
        return None, [same, problem("recipe", error, "have a new charter written")]


def check_edges(
    charter: Charter, topology: Topology | None, algorithm: Algorithm | None
) -> tuple[list[tuple[int, int]], list[Finding]]:
    """Pairs of neighbours, and what is wrong with them; those of the graph where the method cannot be had."""
    if topology is None:
        return [], []
    pairs = topology.edges if algorithm is None else edges(algorithm)
    try:
        check_members(charter.members, topology.num_members, pairs)
    except InputError as error:
        return [], [problem("graph", error, "have a new charter written")]
    return pairs, []
