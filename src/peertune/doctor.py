"""What stands between a site and a run, found before it joins: a finding a check, each with what to do about it.

No file is written, and nothing of the site's data is sent. The lines to the neighbours are measured by
`runtimes/probe`: it takes a neighbour who joins, or examines himself, at the same time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from peertune.algorithms import ALGORITHMS, METHODS, Algorithm
from peertune.assemble import make_algorithm, make_batches, make_topology
from peertune.charter import SAME_FILE, Charter, check_members, read_charter, sample_counts
from peertune.config import RunConfig
from peertune.consortium import SiteOptions, check_base
from peertune.errors import ConfigError, IdentityError, InputError, ModelError
from peertune.identity import ALWAYS, Identity, load_identity
from peertune.memory import available_bytes
from peertune.prepare import (
    Prepared,
    check_vocabulary,
    prepare_data,
    prepare_model,
    prepare_tokenizer,
    resolve_device,
)
from peertune.run_folder import RunFolder, nearest_existing
from peertune.runtimes import edges
from peertune.runtimes.message import CHUNK_SIZE
from peertune.runtimes.node import Node
from peertune.runtimes.probe import Measured
from peertune.runtimes.survey import Survey
from peertune.topology import Topology
from peertune.workload import Workload, foreseen_bytes, needed_bytes, rehearse

Mark = Literal["ok", "warning", "problem"]
SOON_DAYS = 7
"""A charter that is valid for fewer days is remarked on."""
CLOCK_S = 60.0
"""Seconds by which clocks may differ."""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    mark: Mark
    text: str
    advice: str = ""
    """What to do; empty where all is well."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Figures, with units in their names."""

    def __str__(self) -> str:
        return f"{self.mark:<7}  {self.check}: {self.text}" + (f"; {self.advice}" if self.advice else "")


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
        say([_problem("recipe", error, "get the charter anew from whoever wrote it")])
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
        is_usable = say(check_folder(Path(config.run.out), config))
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
                found = [_problem("memory", error, "take a machine with more, or agree on a smaller batch")]
        say(found or [predict(charter, workload, survey.measured, others)])
        return findings
    finally:
        if node is not None:
            node.stop(0.0)


def check_charter(path: Path, today: date | None = None) -> tuple[Charter | None, list[Finding]]:
    """Whether it can be read and holds, and for how long; no charter where it cannot be read."""
    today = today or datetime.now(UTC).date()
    try:
        charter = read_charter(path)
    except InputError as error:
        return None, [_problem("charter", error, "get the file anew from whoever wrote it")]
    try:
        charter.check(today)
    except InputError as error:
        return charter, [_problem("charter", error, "have a new one written and signed")]
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
        return None, [_problem("key", error, "see `peertune keygen`")]
    if charter is None:
        return own, [Finding("key", "ok", f"found in {folder}; no charter to look for it in")]
    try:
        name = charter.members[charter.index_of(own.id)].name
    except InputError as error:
        return own, [_problem("key", error, "name the right folder with --identity")]
    return own, [Finding("key", "ok", f"that of {name}, readable by this user only", values={"member": name})]


def check_port(node: Node) -> Finding:
    """Start this site's end of the lines; whether its port can be opened, where it has one."""
    try:
        node.start([])
    except IdentityError as error:
        return _problem("port", error, "name another with --listen")
    if not node.listen:
        return Finding("port", "ok", "none: this site only dials out")
    return Finding("port", "ok", f"{node.listen} can be opened")


def check_device(config: RunConfig) -> tuple[torch.device, list[Finding]]:
    """Where the site would train; the CPU where that is not to be had."""
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    try:
        device = resolve_device(config.run.device)
    except InputError as error:
        return torch.device("cpu"), [_problem("device", error, "set run.device")]
    if device.type == "cpu":
        return device, [Finding("device", "ok", f"no GPU in use: the CPU, {torch.get_num_threads()} threads")]
    free, total = torch.cuda.mem_get_info(device)
    text = f"{torch.cuda.get_device_name(device)}, {_size(free)} of {_size(total)} free"
    return device, [Finding("device", "ok", text, values={"free_bytes": free})]


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
        return None, [_problem("data", error, "correct the file, or its fields with --set")]
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
        return None, [_problem("graph", error, "have a new charter written")]


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
        return None, [_problem("base", error, "name the right folder with --model")]
    same = Finding("base", "ok", "weights and tokenizer are those of the charter")
    if topology is None:
        return None, [same]
    try:
        pools = ALGORITHMS[config.algorithm.name].pools_data
        batches = None if data is None else make_batches(config, data, pools).get(index)
        return make_algorithm(config, module, topology, index, batches), [same]
    except InputError as error:
        return None, [same, _problem("recipe", error, "have a new charter written")]


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
        return [], [_problem("graph", error, "have a new charter written")]
    return pairs, []


def check_folder(path: Path, config: RunConfig) -> list[Finding]:
    """What is wrong with the run's folder. It is made and removed again where it is not there: only that tells."""
    folder = RunFolder(path)
    made: list[Path] = []
    try:
        folder.check(config.to_dict(), resume=folder.holds_run)
        made = [each for each in (path, *path.parents) if not each.exists()]
        path.mkdir(parents=True, exist_ok=True)
    except InputError as error:
        return [_problem("folder", error, "name another with --out")]
    except OSError as error:
        return [Finding("folder", "problem", f"{path} cannot be made: {error.strerror}", "name another with --out")]
    finally:
        for each in made:
            with suppress(OSError):  # it was not made, or is in use already
                each.rmdir()
    return []


def check_disk(config: RunConfig, algorithm: Algorithm) -> Finding:
    """Whether there is room for what the run writes."""
    folder, need = RunFolder(Path(config.run.out)), foreseen_bytes(algorithm, 1)
    try:
        folder.require_space(need)
    except InputError as error:
        return _problem("disk", error, "name another folder with --out")
    free = shutil.disk_usage(nearest_existing(folder.path)).free
    text = f"{_size(free)} free for {folder.path}, the run needs about {_size(need)}"
    text += "; it holds this run already, which goes on" * folder.holds_run
    return Finding("disk", "ok", text, values={"free_bytes": free, "need_bytes": need})


def check_memory(algorithm: Algorithm, num_neighbors: int, device: torch.device, available: int | None) -> Finding:
    """Whether there is room for weights, optimiser and messages.

    Args:
        available: bytes the host had to give before the base was loaded; None: not known.
    """
    weights, messages = needed_bytes(algorithm, num_neighbors)
    need = weights + messages
    text = f"about {_size(need)} needed: {_size(weights)} for weights and optimiser, {_size(messages)} for messages"
    text += "; a batch's activations come on top"
    values: dict[str, Any] = {"need_bytes": need, "available_bytes": available}
    room = available
    if device.type == "cuda":
        held = sum(p.numel() * p.element_size() for p in algorithm.peer.model.module.parameters())
        room, need = torch.cuda.mem_get_info(device)[0] + held, weights
        text += f"; the GPU has {_size(room)}"
        if available is not None and available < messages:
            return Finding("memory", "problem", f"{text}; the host {_size(available)}", "free some memory", values)
    elif room is None:
        return Finding("memory", "warning", text, "see that there is so much: this system does not say", values)
    else:
        text += f"; {_size(room)} available"
    if room < need:
        advice = "free some, take a machine with more, or agree on smaller blocks, an adapter, or bfloat16"
        return Finding("memory", "problem", text, advice, values)
    if room < 1.5 * need:
        return Finding("memory", "warning", text, "watch it while the first rounds go on", values)
    return Finding("memory", "ok", text, values=values)


def check_line(survey: Survey, index: int) -> Finding:
    """What is known of the line to one neighbour."""
    node, measured, failure = survey.node, survey.measured.get(index), survey.failures.get(index)
    member, came = node.charter.members[index], survey.came(index)
    check, dials = f"line to {member.name}", node.dials(index)
    who = f"this site dials {member.address}" if dials else "it dials this site"
    differs = measured.differs if measured is not None and measured.differs else survey.refusal(index)
    if differs:
        differs = differs.removesuffix(f"; {SAME_FILE}")
        return Finding(check, "problem", f"{who}; its charter is another: {differs}", SAME_FILE)
    if dials and failure:
        advice = "run `peertune doctor` or `join` there at the same time, and see that its port is open"
        return Finding(check, "problem", f"{who}; it cannot be reached: {failure}", advice)
    together, waited = "run `peertune doctor` there at the same time", f"within {survey.wait_s:g} s"
    if measured is None:
        if index in survey.postponed:
            text = f"{who}; {survey.postponed[index]}"
        elif dials:
            text = f"{who}; it is busy with others' measurements"
        elif came:
            text = f"{who}; its run has reached it, but only it can measure the line"
        else:
            text = f"{who}, and has not {waited}" if survey.wait_s else f"{who}, and was not waited for"
        return Finding(check, "warning", text, together)
    values = {**asdict(measured), "dials": dials, "name": member.name}
    text = (
        f"{who}; round trip {1000 * measured.rtt_s:.1f} ms, {_rate(measured.up)} there, {_rate(measured.down)} back"
        f" (it runs {measured.doing})"
    )
    least = CHUNK_SIZE / node.charter.stall_s
    if min(measured.up, measured.down) < least:
        return Finding(check, "problem", text, f"a run needs {_rate(least)} both ways; get a faster line", values)
    if not dials and not came and survey.wait_s and measured.doing == "doctor":
        text += f"; it has not reached this site {waited}"
        return Finding(check, "warning", text, "see that this site's port is open to it", values)
    return Finding(check, "ok", text, values=values)


def check_clock(charter: Charter, measured: Mapping[int, Measured], now: datetime | None = None) -> Finding:
    """This site's clock against those of its neighbours; else against what a certificate may say."""
    now = now or datetime.now(UTC)
    offsets = {charter.members[i].name: found.clock_s for i, found in measured.items()}
    advice = "set the clocks; an expiry is read from them"
    if not ALWAYS[0] < now < ALWAYS[1]:
        return Finding("clock", "warning", f"it says {now:%Y-%m-%d}", advice)
    wrong = {name: f"{name}'s is {timedelta(seconds=round(s))} ahead" for name, s in offsets.items() if s > CLOCK_S}
    wrong |= {name: f"{name}'s is {timedelta(seconds=round(-s))} behind" for name, s in offsets.items() if s < -CLOCK_S}
    if wrong:
        return Finding("clock", "warning", ", ".join(wrong.values()), advice, offsets)
    if not offsets:
        return Finding("clock", "ok", f"{now:%Y-%m-%d %H:%M} UTC; no neighbour to compare it with")
    furthest = max(abs(offset) for offset in offsets.values())
    return Finding("clock", "ok", f"at most {furthest:.2f} s from the neighbours'", values=offsets)


def predict(
    charter: Charter,
    workload: Workload | None,
    measured: Mapping[int, Measured],
    others: Sequence[int],
    now: datetime | None = None,
) -> Finding:
    """Seconds of a round: its local steps, and the slowest line."""
    if workload is None:
        return Finding("round", "warning", "its time cannot be told without local steps", "see to base and data first")
    lines = {i: workload.line_s(i, found.up, found.down, found.rtt_s) for i, found in measured.items()}
    unknown = [charter.members[i].name for i in others if i not in measured]
    train_s = workload.steps * workload.step_s
    text = f"{workload.steps:.3g} local steps of {workload.step_s:.3g} s"
    values: dict[str, Any] = {"step_s": workload.step_s, "steps": workload.steps, "rounds": workload.rounds}
    if unknown:
        advice = f"measure the line to {', '.join(unknown)} too"
        return Finding("round", "warning", f"its time cannot be told: {text}, and unknown lines", advice, values)
    line_s = max(lines.values(), default=0.0)
    if lines:
        slowest = max(lines, key=lambda i: lines[i])
        size = workload.sent.get(slowest, 0.0) + workload.received.get(slowest, 0.0)
        text += f", then {line_s:.3g} s for {_size(size)} with {charter.members[slowest].name}"
        if len(lines) > 1:
            text += f" ({sum(lines.values()):.3g} s for all, where they share one line)"
    seconds = train_s + line_s
    total = timedelta(seconds=min(round(seconds * workload.rounds), 10**9))
    text = f"about {seconds:.3g} s: {text}; {workload.rounds} rounds in {total}, if the neighbours keep pace"
    values |= {"seconds": seconds, "line_s": line_s, "total_s": seconds * workload.rounds}
    if ((now or datetime.now(UTC)) + total).date() > charter.expires:
        return Finding(
            "round", "warning", text, f"the charter ends on {charter.expires}: have a later date signed", values
        )
    return Finding("round", "ok", text, values=values)


def _problem(check: str, error: Exception, advice: str) -> Finding:
    """An error as a finding; its last part says what to do, where it has one: a ModelError ends with its cause."""
    text, _, own = ("", "", str(error)) if isinstance(error, ModelError) else str(error).rpartition("; ")
    return Finding(check, "problem", text or own, own if text else advice)


def _size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


def _rate(speed: float) -> str:
    mbit = 8 * speed / 1e6
    return f"{mbit:,.0f} Mbit/s" if mbit >= 100 else f"{mbit:.3g} Mbit/s"
