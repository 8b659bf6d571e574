"""What a site does, a function a command: write a charter, sign it, take part in the run it describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from peertune.algorithms import ALGORITHMS, METHODS
from peertune.assemble import check_exchange, make_algorithm, make_topology
from peertune.audit import AUDIT, AuditLog, Repeats
from peertune.charter import (
    Charter,
    Member,
    check_members,
    difference,
    piece_hashes,
    read_charter,
    sample_counts,
    shared_recipe,
    write_charter,
)
from peertune.ejection import ejection_path, needed, sign_ejection
from peertune.errors import CharterError, CheckpointError, ConfigError, Left
from peertune.identity import load_identity
from peertune.lock import FolderLock, is_held
from peertune.logfields import sentence
from peertune.memory import keep_freed
from peertune.model.load import TINY, resolve_path
from peertune.plugins import code_version
from peertune.prepare import prepare_model, prepare_tokenizer
from peertune.progress import Progress
from peertune.recipe import load_recipe
from peertune.run import run
from peertune.run_folder import RunFolder
from peertune.run_setup import Site
from peertune.runtimes import edges
from peertune.runtimes.network import NetworkGroup
from peertune.runtimes.node import Node
from peertune.runtimes.port import check_port
from peertune.runtimes.site_requests import Requests
from peertune.site import SiteOptions, check_base, fingerprints
from peertune.storage import check_writable, storage_errors


def new_charter(
    recipe: Path,
    overrides: Sequence[str],
    members: Sequence[Member],
    expires: date,
    to: Path,
    grace_s: float,
    quorum: int = 1,
    stall_s: float = 30.0,
    note: Callable[[str], None] = lambda message: None,
) -> Charter:
    """Write an unsigned charter for a recipe and its members.

    Args:
        note: told which keys of the recipe nothing uses, what of it is in no charter, and what sites have to do then.
    Raises:
        InputError: the recipe, the members or the file cannot be used.
    """
    if to.exists():
        raise CharterError(f"--to: {to} exists already; name a new file")
    if expires < (today := datetime.now(UTC).date()):
        raise CharterError(f"--expires: got {expires}, which is over, expected {today} or a later date")
    config, remarks = load_recipe(recipe, overrides, METHODS)
    method = ALGORITHMS[config.algorithm.name]
    if method.pools_data:
        raise CharterError(f"algorithm.name: got {config.algorithm.name!r}, which trains on all data in one place")
    if config.run.ranks_per_peer > 1:
        raise CharterError(f"run.ranks_per_peer: got {config.run.ranks_per_peer}, expected 1: a site is one process")
    if config.data.validation_rows:
        raise CharterError(
            f"data.validation_rows: got {config.data.validation_rows}, expected 0: they are kept back of all rows there"
            " are, which no site has; set data.validation_rows = 0, and join with --test FILE"
        )
    peers = members[: config.run.num_peers]
    if method.graph(config.topology).weights == "samples" and not all(member.samples for member in peers):
        raise CharterError(
            f"--member: {config.algorithm.name} weights sites by their number of samples; add #SAMPLES to each member"
        )
    module = prepare_model(config, torch.device("cpu"), recipe.parent)
    topology = make_topology(config, method, sample_counts(members, config.run.num_peers))
    base, tokenizer = fingerprints(module, prepare_tokenizer(config, recipe.parent))
    algorithm = make_algorithm(config, module, topology)
    check_exchange(config, algorithm)
    check_members(members, topology.num_members, edges(algorithm))
    if quorum > len(members):
        raise CharterError(f"--quorum: got {quorum}, expected at most the {len(members)} members there are")
    charter = Charter(
        version=code_version(config.algorithm.name),
        expires=expires,
        base=base,
        tokenizer=tokenizer,
        grace_s=grace_s,
        quorum=quorum,
        stall_s=stall_s,
        recipe=shared_recipe(config, with_path=_is_named(config.model.path, recipe.parent)),
        members=list(members),
    )
    write_charter(charter, to)
    for remark in remarks:
        note(remark)
    if config.data.task == "classification" and not config.data.labels:
        note(
            "data.labels: got none, so each site takes its own rows' labels for the classes; where a site may lack one,"
            ' name them all, as in ["no", "yes"]: with fewer to choose between a model seems better'
        )
    if config.model.trust_remote_code:
        note(
            "model.trust_remote_code is in no charter: each site decides for itself whether code beside the base may"
            " run there; one that lets it run joins with --set model.trust_remote_code=true"
        )
    return charter


def sign_charter(path: Path, identity: Path, copies: Sequence[Path] = ()) -> Charter:
    """Add this site's signature to a charter, and those that stand in copies of it.

    Raises:
        CharterError: it has expired, a signature in one of the files does not hold, a copy is of another charter, or
            the key is no member's.
        IdentityError: there is no key.
    """
    own, charter = load_identity(identity), read_charter(path)
    charter.check_validity()
    charter.check_signatures(str(path), but=own.id)  # its own is made anew
    for copy in copies:
        other = read_charter(copy)
        if differs := difference(charter, other.parts(), piece_hashes(other)):
            raise CharterError(f"{copy}: is another charter than {path}: {differs} differ; get a copy of the same one")
        other.check_signatures(str(copy))
        charter = charter.model_copy(update={"signatures": {**other.signatures, **charter.signatures}})
    charter = charter.signed(own)
    write_charter(charter, path)
    return charter


def join(options: SiteOptions, progress: Progress) -> dict[str, Any]:
    """Take part in the run of a charter; started again, go on from this site's last checkpoint.

    Returns:
        The summary, as this site knows it.
    Raises:
        InputError: the charter does not hold, or something given cannot be used.
        RunError: the run had to stop; the same command goes on.
        Left: it was asked to leave (`leave`).
    """
    keep_freed(shared=True)  # before the tokenizer's threads, each with a store of its own
    charter, own, out = read_charter(options.charter), load_identity(options.identity), options.out
    charter.check()
    check_writable(out, "--out")
    if is_held(out):
        at_work = FolderLock(out)
        at_work.acquire()  # says who it is, before anything is loaded
        at_work.release()  # it has just ended
    index = charter.index_of(own.id)
    config = options.config(charter)
    is_peer = index < config.run.num_peers
    if bool(options.train) != is_peer:
        role = "a peer, which trains: name its rows" if is_peer else "the server, which has no data: leave it out"
        raise ConfigError(f"--data: got {options.train!r}, but {charter.members[index].name} is {role}")
    audit, repeats = AuditLog(out / AUDIT, progress.note), Repeats()

    def log(event: str, **fields: Any) -> None:
        audit(event, **fields)
        if event not in ("started", "sent", "fetched", "arrived") and not repeats.is_one(event, fields):
            progress.note(sentence(event, fields))

    folder, listen = RunFolder(out), options.address(charter, index)
    if not folder.summary.exists():
        check_port(listen)  # before anything is loaded
    node = Node(charter, own, listen, log)
    resume = folder.holds_run
    counts = sample_counts(charter.members, config.run.num_peers)
    names = [member.name for member in charter.members]
    site = Site(index, counts, partial(check_base, charter, config.model.path), names, audit.contributions)
    requests = Requests(charter, options.charter, _leave_request(out))
    requests.leave.unlink(missing_ok=True)
    done = left = False
    try:
        summary = run(
            config,
            base=options.charter.parent,
            resume=resume,
            progress=progress,
            connect=lambda num_members, link: NetworkGroup(node, requests, is_robust=config.exchange.robust != "none"),
            site=site,
        )
        done = True
        return summary
    except Left:
        left = True
        raise
    finally:
        if done or left:
            requests.leave.unlink(missing_ok=True)  # done, or too late
        node.stop(charter.grace_s if done else 0.0, leaves=left)


def leave(out: Path) -> None:
    """Ask the site whose run is in a folder to leave it. Raises CheckpointError where there is none to leave."""
    if not (out / AUDIT).exists():
        raise CheckpointError(f"{out}: holds no run of a consortium; name the folder that `peertune join` was given")
    if RunFolder(out).summary.exists():
        raise CheckpointError(f"{out}: this run is finished; there is nothing to leave")
    if is_held(out) is False:
        raise CheckpointError(f"{out}: no process is at work on this run; there is nothing to leave")
    with storage_errors(out):
        _leave_request(out).touch()


def eject(path: Path, member: str, identity: Path) -> str:
    """Sign that a member is to be put out (see ejection). Returns what is to be done next.

    Raises:
        CharterError, IdentityError: the charter does not hold, there is no such member, or this site's key is none of
            its members'.
    """
    charter = read_charter(path)
    charter.check(charter.expires)  # a run may outlast its charter, and so may what is wrong with a member
    ejection = sign_ejection(path, charter, member, load_identity(identity))
    own, signers = ejection_path(path, ejection.member), ejection.signers(charter)
    missing = needed(charter) - len(signers)
    told = f"{own}: signed by {', '.join(signers)}; "
    if missing > 0:
        return (
            told + f"{missing} more must sign: pass this file on, to lie beside their charter; there the same command"
        )
    return told + "that is enough: put it beside the charter at every site; those that run take notice within a second"


def _leave_request(out: Path) -> Path:
    return out / "leave"


def _is_named(path: str, base: Path) -> bool:
    """Whether a base's path means the same at all sites: a hub's name, or the packaged model."""
    return path == TINY or not Path(resolve_path(path, base)).is_dir()
