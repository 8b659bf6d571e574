"""What lies between a site and its neighbours: the lines, the clocks, and the time of a round that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from peertune.charter import SAME_FILE, Charter
from peertune.doctor.finding import Finding
from peertune.formatting import traffic
from peertune.identity import ALWAYS
from peertune.runtimes.message import SMALL_CHUNK
from peertune.runtimes.probe import LineQuality
from peertune.runtimes.proxy import THE_PROXY
from peertune.runtimes.survey import Survey
from peertune.workload import Workload

CLOCK_S = 60.0
"""Seconds by which clocks may differ."""


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
        if failure.startswith(THE_PROXY):
            advice = "see to the proxy and its password, or except the address from it with no_grpc_proxy"
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
    least = SMALL_CHUNK / node.charter.stall_s
    if min(measured.up, measured.down) < least:
        return Finding(check, "problem", text, f"a run needs {_rate(least)} both ways; get a faster line", values)
    if not dials and not came and survey.wait_s and measured.doing == "doctor":
        text += f"; it has not reached this site {waited}"
        return Finding(check, "warning", text, "see that this site's port is open to it", values)
    return Finding(check, "ok", text, values=values)


def check_clock(charter: Charter, measured: Mapping[int, LineQuality], now: datetime | None = None) -> Finding:
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
    measured: Mapping[int, LineQuality],
    others: Sequence[int],
    now: datetime | None = None,
) -> Finding:
    """Seconds of a round: its local steps, and the slowest line."""
    if workload is None:
        return Finding("round", "warning", "its time cannot be told without local steps", "see to base and data first")
    lines = {i: workload.line_s(i, found.up, found.down, found.rtt_s) for i, found in measured.items()}
    unknown = [charter.members[i].name for i in others if i not in measured]
    train_s = workload.steps * workload.step_s
    text = f"{workload.steps:.3g} local step{'' if workload.steps == 1 else 's'} of {workload.step_s:.3g} s"
    values: dict[str, Any] = {"step_s": workload.step_s, "steps": workload.steps, "rounds": workload.rounds}
    if unknown:
        advice = f"measure the line to {', '.join(unknown)} too"
        return Finding("round", "warning", f"its time cannot be told: {text}, and unknown lines", advice, values)
    line_s = max(lines.values(), default=0.0)
    if lines:
        slowest = max(lines, key=lambda i: lines[i])
        size = workload.sent.get(slowest, 0.0) + workload.received.get(slowest, 0.0)
        text += f", then {line_s:.3g} s for {traffic(size)} with {charter.members[slowest].name}"
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


def _rate(speed: float) -> str:
    mbit = 8 * speed / 1e6
    return f"{mbit:,.0f} Mbit/s" if mbit >= 100 else f"{mbit:.3g} Mbit/s"
