"""What a run of five sites survives: kills in every phase, frozen sites, cut, dead and slow lines, lost and full disks.

    python benchmarks/faults.py [--only NAME ...] [--cut-s 360]

Five sites as processes on loopback, DECA on the packaged tiny model, a ring. Each scenario is a run of its own; beside
them stand undisturbed runs. A row says whether all that could finish did, how much longer it took, how far the
survivors' held-out loss is from the undisturbed run's, whether all ended with the same weights, and who was left out by
whom.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from ctypes.util import find_library
from pathlib import Path
from typing import Any

from _harness import RESULTS, finish
from _sites import PHASES, Fault, Sites, kill, say, until
from parity import weights_hash

from peertune import checkpoint

NAMES = ["north", "east", "south", "west", "centre"]
RECIPE: dict[str, Any] = {
    "run": {"checkpoint_every": 4},
    "model": {"path": "tiny", "max_length": 64},
    "data": {"task": "text", "batch_size": 4},
    "topology": {"kind": "ring"},
    "algorithm": {
        "name": "deca", "lr": 1e-2, "eps": 2e-3, "outer_rounds": 2, "inner_steps": 5, "gossip_every": 1,
        "layers_per_block": 2,
    },
    "eval": {"max_samples": 60},
}  # fmt: skip
AT = 9
"""The round in which things happen, well inside the run."""
LIMIT_S = 300.0
Scenario = Callable[[Sites], list[str]]
"""Plays a run out; returns the sites that are not expected to finish."""


def undisturbed(sites: Sites) -> list[str]:
    start(sites)
    return []


def start(sites: Sites, faults: dict[str, Fault] | None = None) -> None:
    for name in sites.names:
        sites.start(name, (faults or {}).get(name))


def killed(victims: list[str], phase: str, *, returns: bool = True, empty: bool = False) -> Scenario:
    """kill -9 in a phase; where it returns, by the same command, as soon as it is dead."""

    def play(sites: Sites) -> list[str]:
        start(sites, {victim: Fault(phase, AT, kill) for victim in victims})
        for victim in victims:
            if sites.wait(victim, LIMIT_S) != -signal.SIGKILL:
                raise RuntimeError(f"{victim} was not killed in {phase}")
        for victim in victims:
            if empty:
                shutil.rmtree(sites.folder / victim / "run")
            if returns:
                sites.start(victim)
        return [] if returns else victims

    return play


def frozen(sites: Sites) -> list[str]:
    """SIGSTOP until both neighbours have gone on without it for three rounds."""
    start(sites)
    until(lambda: sites.round("east") >= AT, LIMIT_S)
    victim = sites.processes["east"].pid
    os.kill(victim, signal.SIGSTOP)
    until(lambda: all(len(sites.events(name, "left_out")) >= 3 for name in ("north", "south")), LIMIT_S)
    os.kill(victim, signal.SIGCONT)
    return []


def on_line(act: Callable[[Sites], None]) -> Scenario:
    """Something happens to the line between north and east, the only one that is dialled from outside at north."""

    def play(sites: Sites) -> list[str]:
        start(sites)
        until(lambda: sites.round("east") >= AT, LIMIT_S)
        act(sites)
        return []

    return play


def cut_for(seconds: float) -> Callable[[Sites], None]:
    def act(sites: Sites) -> None:
        assert sites.proxy is not None
        sites.proxy.cut(True)
        until(lambda: not any(process.is_alive() for process in sites.processes.values()), seconds)
        sites.proxy.cut(False)

    return act


def half_open(sites: Sites) -> None:
    """The connection stays, and nothing passes, until the sites have noticed."""
    assert sites.proxy is not None
    sites.proxy.hold(True)
    until(lambda: bool(sites.events("north", "stalled") + sites.events("east", "stalled")), LIMIT_S)
    sites.proxy.hold(False)


def slow(bytes_per_s: float) -> Callable[[Sites], None]:
    def act(sites: Sites) -> None:
        assert sites.proxy is not None
        sites.proxy.bytes_per_s = bytes_per_s

    return act


def full_disk(sites: Sites) -> list[str]:
    """From a round on, one site's checkpoints find no space."""

    def fill() -> None:
        def refuse(tensors: Any, path: Path) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        checkpoint.save_file = refuse

    start(sites, {"east": Fault("training", AT, fill)})
    return []


def faked_clock(library: str, days: int) -> Scenario:
    """One site's clock is so many days ahead (libfaketime); its time that only runs forward is left alone.

    With 0 days it tells what libfaketime itself costs.
    """

    def play(sites: Sites) -> list[str]:
        fake = {
            "LD_PRELOAD": library,
            "FAKETIME": f"+{days}d",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "OMP_NUM_THREADS": "1",
        }
        sites.start_under("east", fake)
        for name in sites.names:
            if name != "east":
                sites.start(name)
        least = time.time() + 80_000 * days
        if not until(lambda: any(e["time"] > least for e in sites.events("east", "connected")), LIMIT_S):
            raise RuntimeError(f"east's clock is not {days} days ahead")
        return []

    return play


def scenarios(options: argparse.Namespace) -> dict[str, Scenario]:
    found: dict[str, Scenario] = {f"undisturbed {i}": undisturbed for i in range(options.undisturbed)}
    found |= {f"kill {name} in {phase}": killed([name], phase) for name in NAMES for phase in PHASES}
    library = find_library("faketime") or next(map(str, Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), "")
    if library:
        found["clock a day ahead"] = faked_clock(library, 1)
        found["clock right, under libfaketime"] = faked_clock(library, 0)
    else:
        say("clock a day ahead: not played, there is no libfaketime")
    return found | {
        "two sites killed at once": killed(["east", "west"], "training"),
        "back on an empty disk": killed(["east"], "training", empty=True),
        "gone for good": killed(["east"], "training", returns=False),
        "gone for good in the agreement": killed(["east"], "agreement", returns=False),
        "two gone for good": killed(["east", "west"], "training", returns=False),
        "frozen for three rounds": frozen,
        "line cut": on_line(cut_for(options.cut_s)),
        "half-open connection": on_line(half_open),
        "line at a hundredth": on_line(slow(options.line_mb_s * 1e6 / 100)),
        "full disk at one site": full_disk,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="scenarios whose names hold one of these")
    parser.add_argument("--undisturbed", type=int, default=3, help="runs to compare with")
    parser.add_argument("--grace-s", type=float, default=10.0, help="the charter's grace")
    parser.add_argument("--stall-s", type=float, default=4.0, help="the charter's stall_s")
    parser.add_argument("--cut-s", type=float, default=360.0, help="seconds the line is cut")
    parser.add_argument("--line-mb-s", type=float, default=500.0, help="what a line of loopback carries, in MB/s")
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    chosen = {
        name: play
        for name, play in scenarios(options).items()
        if not options.only or "undisturbed" in name or any(text in name for text in options.only)
    }
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, play in chosen.items():
            home = (options.folder or Path(scratch)) / name.replace(" ", "-")
            rows[name] = carry_out(home, play, options)
            say(f"{name}: {rows[name]}")
    calm = [row for name, row in rows.items() if "undisturbed" in name]
    loss = statistics.mean(value for row in calm for value in row["loss"].values())
    wall = statistics.median(row["wall_s"] for row in calm)
    for row in rows.values():
        row["loss_off_by"] = max(abs(value / loss - 1) for value in row["loss"].values()) if row["loss"] else None
        row["lost_s"] = row["wall_s"] - wall
        row["lost_graces"] = row["lost_s"] / options.grace_s
    table(rows)
    figures = {
        "sites": len(NAMES), "rounds": calm[0]["rounds"], "grace_s": options.grace_s, "stall_s": options.stall_s,
        "cut_s": options.cut_s, "slow_bytes_per_s": options.line_mb_s * 1e4, "undisturbed_loss": loss,
        "undisturbed_wall_s": wall, "scenarios": rows,
    }  # fmt: skip
    finish("faults", figures, options.results)


def carry_out(home: Path, play: Scenario, options: argparse.Namespace) -> dict[str, Any]:
    sites = Sites(home, NAMES, RECIPE, grace_s=options.grace_s, stall_s=options.stall_s, proxied="north")
    began = time.monotonic()
    try:
        gone = play(sites)
        survivors = [name for name in NAMES if name not in gone]
        codes = {name: sites.wait(name, LIMIT_S) for name in survivors}
        wall_s = time.monotonic() - began
        summaries = {name: sites.summary(name) for name in survivors}
        hashes = {weights_hash(home / name / "run") for name in survivors if summaries[name]}
        return {
            "finished": [name for name in survivors if codes[name] == 0 and summaries[name]],
            "failed": {name: code for name, code in codes.items() if code != 0},
            "gone": gone,
            "wall_s": wall_s,
            "rounds": max(sites.round(name) for name in survivors),
            "loss": {n: s["metrics"]["average_model"]["loss"] for n, s in summaries.items() if s},
            "one_model": len(hashes) == 1,
            "left_out": {
                name: {w["went_without"]: w["rounds"] for w in s["rounds_without"]}
                for name, s in summaries.items()
                if s and s["rounds_without"]
            },
        }
    finally:
        sites.end()


def table(rows: dict[str, dict[str, Any]]) -> None:
    say("| scenario | finished | lost, in graces | loss off by | one model | left out |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        off = "" if row["loss_off_by"] is None else f"{100 * row['loss_off_by']:.1f} %"
        names = "; ".join(
            f"{by}: {', '.join(f'{who} {n}' for who, n in w.items())}" for by, w in row["left_out"].items()
        )
        finished = f"{len(row['finished'])} of {len(NAMES) - len(row['gone'])}"
        say(f"| {name} | {finished} | {row['lost_graces']:.1f} | {off} | {row['one_model']} | {names} |")


if __name__ == "__main__":
    main()
