"""One training step, block by block: full AdamW, LoRA (peft), BAdam (PyPI `badam`), peertune and a hand-written limit.

    python benchmarks/block_step.py                     # 46.9 M parameters, CPU
    python benchmarks/block_step.py --shape 1b          # 1.1 B parameters, a GPU
    python benchmarks/block_step.py --quick             # a toy, in seconds

For each: FLOPs of a step, its time, and the allocator's peak, weights included, at the first, middle and last block;
then whole ascending sweeps over the blocks. Contestants take turns, so that a slow spell of the machine falls on all.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _contestants import CONTESTANTS, Contestant, Options, Shape
from _harness import RESULTS, Clock, count_flops, finish, interleaved, peak_bytes

from peertune.data.batches import Batch
from peertune.seeds import torch_rng

SHAPES = {
    "base": Shape(hidden=512, layers=12, heads=8, kv_heads=8, intermediate=1408, vocabulary=8192, batch=4, length=256),
    "1b": Shape(
        hidden=2048, layers=22, heads=32, kv_heads=4, intermediate=5632, vocabulary=32000, batch=4, length=1024
    ),
    "quick": Shape(hidden=64, layers=4, heads=4, kv_heads=4, intermediate=128, vocabulary=512, batch=2, length=32),
}
STEPS_PER_BLOCK = 4
NOTES = (
    "peak_bytes counts everything torch's allocator holds, weights included, over a block's first two steps",
    "peak_bytes of cached contestants includes the cache where it lies in the same memory (always on a CPU)",
    "FLOPs are those of matrix products; FlopCounterMode has no formula for the CPU's fused attention",
    "peertune's own attention on a CPU is matrix products, so its FLOPs are counted, and only its",
    "checkpointed: full and LoRA recompute every layer, the others those from the active block upwards",
    "badam's own checkpointing callback crashes on transformers 5; its authors' policy is emulated, non-reentrant",
    "badam, limit: embeddings, head and last norm are frozen; peertune trains the last norm with the last layer",
    "timings exclude compilation; cached steps find their samples' prefixes ready, but in sweeps pay to advance them",
    "sweep_* counts switching blocks, sweep_steps_cpu_s leaves it out (badam collects garbage at each switch)",
)


def make_batches(shape: Shape, count: int, device: torch.device) -> list[Batch]:
    """Random tokens; every one is a target, so that no contestant can save on the head."""
    generator = torch_rng(0, "batches")
    size = (shape.batch, shape.length)
    mask = torch.ones(size, dtype=torch.int64, device=device)
    return [
        Batch(
            input_ids=torch.randint(0, shape.vocabulary, size, generator=generator).to(device),
            attention_mask=mask,
            loss_mask=mask.bool(),
            sample_ids=tuple(range(i * shape.batch, (i + 1) * shape.batch)),
        )
        for i in range(count)
    ]


def measure_step(
    name: str, shape: Shape, device: torch.device, blocks: Sequence[int], checkpointing: bool
) -> dict[str, Any]:
    """FLOPs and peak memory of a step at each block, on fresh models.

    Returns:
        {"flops": {block: n}, "peak_bytes": {block: n}}; a compiled contestant has no FLOPs of its own.
    """
    kind, options = CONTESTANTS[name]
    options = dataclasses.replace(options, checkpointing=checkpointing)
    batch = make_batches(shape, 1, device)[0]
    found: dict[str, Any] = {"peak_bytes": {}} if options.compile else {"flops": {}, "peak_bytes": {}}
    for block in blocks if kind.block_wise else blocks[:1]:
        contestant = kind(shape, device, options)

        def prepare(contestant: Contestant = contestant, block: int = block) -> None:
            contestant.setup()
            if contestant.options.cache or contestant.options.compile:
                contestant.set_block(block)
                contestant.step(batch)

        def first_steps(contestant: Contestant = contestant, block: int = block) -> None:
            contestant.set_block(block)
            contestant.step(batch)
            contestant.step(batch)

        found["peak_bytes"][str(block)] = peak_bytes(prepare, first_steps, device)
        if not options.compile:
            with contextlib.suppress(AssertionError):  # before 2.12, torch has no formula for grouped keys on a GPU
                found["flops"][str(block)] = count_flops(functools.partial(contestant.step, batch))
        contestant.teardown()
    if not kind.block_wise:
        for figures in filter(None, found.values()):
            figures |= {str(block): figures[str(blocks[0])] for block in blocks}
    return found


def time_steps(
    contestants: Mapping[str, Contestant], batch: Batch, blocks: Sequence[int], repeats: int, device: torch.device
) -> dict[str, dict[str, dict[str, float]]]:
    """Median times of a warm step: name -> "cpu_s" | "wall_s" -> block -> seconds."""
    times: dict[str, dict[str, dict[str, float]]] = {name: {"cpu_s": {}, "wall_s": {}} for name in contestants}
    for block in blocks:
        for contestant in contestants.values():
            contestant.set_block(block)
            for _ in range(2):
                contestant.step(batch)
        work = {name: functools.partial(c.step, batch) for name, c in contestants.items()}
        for name, medians in interleaved(work, repeats, device).items():
            for clock, seconds in medians.items():
                times[name][clock][str(block)] = seconds
    return times


def time_sweeps(
    contestants: Mapping[str, Contestant], batches: Sequence[Batch], num_blocks: int, sweeps: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Whole ascending sweeps, each block a turn of one step a batch; switching blocks is part of it.

    Returns:
        name -> {"sweep_cpu_s", "sweep_wall_s": median seconds a step, switching included; "sweep_steps_cpu_s": without
        it; "last_loss": of the last step}.
    """
    totals: dict[str, list[list[float]]] = {name: [] for name in contestants}
    losses: dict[str, float] = {}
    gc.collect()
    gc.freeze()  # badam collects garbage at each switch: it shall not pay for the objects of all the others
    for _ in range(sweeps):
        spent = {name: [0.0, 0.0, 0.0] for name in contestants}
        for block in range(num_blocks):
            for name, contestant in contestants.items():
                with Clock(device) as switch:
                    contestant.set_block(block)
                with Clock(device) as steps:
                    for batch in batches:
                        loss = contestant.step(batch)
                for i, seconds in enumerate((switch.cpu_s + steps.cpu_s, switch.wall_s + steps.wall_s, steps.cpu_s)):
                    spent[name][i] += seconds / (num_blocks * len(batches))
                losses[name] = loss.item()
        for name, seconds_a_step in spent.items():
            totals[name].append(seconds_a_step)
    gc.unfreeze()
    keys = ("sweep_cpu_s", "sweep_wall_s", "sweep_steps_cpu_s")
    return {
        name: {
            **{key: statistics.median(column) for key, column in zip(keys, zip(*runs, strict=True), strict=True)},
            "last_loss": losses[name],
        }
        for name, runs in totals.items()
    }


def ratios(contestants: Mapping[str, Mapping[str, Any]], against: str) -> dict[str, Any]:
    """Every figure of every contestant over the same figure of `against`, as far as both have it."""

    def over(mine: Any, theirs: Any) -> Any:
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            return {key: over(mine[key], theirs[key]) for key in mine if key in theirs}
        return round(mine / theirs, 4)

    skip = ("description", "first_loss", "last_loss")
    base = {key: value for key, value in contestants[against].items() if key not in skip}
    return {name: over(figures, base) for name, figures in contestants.items() if name != against}


def table(figures: Mapping[str, Any]) -> str:
    """What was measured, a line a contestant."""
    clock, seconds = ("wall_s", "s a step") if figures["device"] == "cuda" else ("cpu_s", "CPU s a step")
    lines = [f"{'':<24}{'GFLOP':^21}{seconds:^21}{'peak MB':^21}{'with checkpointing':^21}sweep, {seconds}"]
    for name, found in figures["contestants"].items():
        cells = [
            " / ".join(f"{value / unit:.{digits}f}" for value in values.values()) if values else "-"
            for values, unit, digits in (
                (found.get("flops"), 1e9, 0),
                (found.get(clock), 1, 3),
                (found.get("peak_bytes"), 1e6, 0),
                (found.get("checkpointed", {}).get("peak_bytes"), 1e6, 0),
            )
        ]
        sweep = f"{found[f'sweep_{clock}']:.3f}" if f"sweep_{clock}" in found else "-"
        lines.append(f"{name:<24}" + "".join(f"{cell:^21}" for cell in cells) + sweep)
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures, as plain data."""
    torch.set_num_threads(arguments.threads)
    device, shape = torch.device(arguments.device), SHAPES[arguments.shape]
    blocks = (
        list(range(shape.layers)) if arguments.all_blocks else sorted({0, (shape.layers - 1) // 2, shape.layers - 1})
    )
    absent = {
        n for n in arguments.contestants if (needs := CONTESTANTS[n][0].needs) and not importlib.util.find_spec(needs)
    }
    names = [n for n in arguments.contestants if n not in absent]
    found: dict[str, dict[str, Any]] = {n: {"description": describe(n)} for n in names}
    for name in names if not arguments.skip_memory else ():
        print(f"{name}: FLOPs and memory", file=sys.stderr)
        found[name] |= measure_step(name, shape, device, blocks, checkpointing=False)
        if CONTESTANTS[name][1] == Options():
            found[name]["checkpointed"] = measure_step(name, shape, device, blocks, checkpointing=True)
    if arguments.repeats or arguments.sweeps:
        contestants = {name: CONTESTANTS[name][0](shape, device, CONTESTANTS[name][1]) for name in names}
        batches = make_batches(shape, STEPS_PER_BLOCK, device)
        for name, contestant in contestants.items():
            contestant.setup()
            contestant.set_block(0)
            found[name]["first_loss"] = contestant.step(batches[0]).item()
        # Also with no repeats: these steps compile the graphs that the sweeps need.
        times = time_steps(contestants, batches[0], blocks, max(1, arguments.repeats), device)
        swept = time_sweeps(contestants, batches, shape.layers, arguments.sweeps, device) if arguments.sweeps else {}
        for name, contestant in contestants.items():
            found[name] |= (times[name] if arguments.repeats else {}) | swept.get(name, {})
            contestant.teardown()
    figures = {
        "shape": {"name": arguments.shape, **dataclasses.asdict(shape)},
        "dtype": "bfloat16",
        "device": device.type,
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "sweeps": arguments.sweeps,
        "steps_per_block": STEPS_PER_BLOCK,
        "blocks": blocks,
        "contestants": found,
        "absent": {name: f"pip install {CONTESTANTS[name][0].needs}" for name in sorted(absent)},
        "notes": list(NOTES),
    }
    for against in ("full", "badam"):
        if against in found:
            figures[f"over_{against}"] = ratios(found, against)
    return figures


def describe(name: str) -> str:
    """A contestant's class in a line, and what is switched on."""
    kind, options = CONTESTANTS[name]
    switched = [key for key, value in dataclasses.asdict(options).items() if value]
    return f"{(kind.__doc__ or '').splitlines()[0]}{' With: ' + ', '.join(switched) + '.' if switched else ''}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contestants", nargs="*", metavar="CONTESTANT", help=f"some of {', '.join(CONTESTANTS)}; all")
    parser.add_argument("--shape", choices=list(SHAPES), default="base")
    parser.add_argument("--quick", action="store_true", help="a toy shape, one repeat, nothing compiled unless named")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps at each of three blocks; 0: none")
    parser.add_argument("--sweeps", type=int, default=5, help="timed sweeps over all blocks; 0: none")
    parser.add_argument("--all-blocks", action="store_true", help="measure a step at every block, not at three")
    parser.add_argument("--skip-memory", action="store_true", help="times only, neither FLOPs nor memory")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.contestants) - set(CONTESTANTS):
        parser.error(f"got {', '.join(sorted(unknown))}; contestants are {', '.join(CONTESTANTS)}")
    if arguments.quick:
        arguments.shape, arguments.repeats, arguments.sweeps = "quick", 1, 1
    if not arguments.contestants:
        compiled = not arguments.quick
        arguments.contestants = [n for n, (_, o) in CONTESTANTS.items() if compiled or not o.compile]
    figures = run(arguments)
    print(table(figures))
    parts = ["block_step", *([] if arguments.shape == "base" else [arguments.shape])]
    parts += [] if arguments.repeats or arguments.sweeps else ["memory"]
    finish("-".join(parts), figures, arguments.results)


if __name__ == "__main__":
    main()
