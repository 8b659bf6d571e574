"""The command itself: its parser, the commands of one machine, errors and exit codes.

Exit codes: 0 done; 1 a run stopped, resumable, or `doctor` found a problem, or `status` nobody at work; 2 something
given cannot be used; 128 and the signal's number where one ended it, 130 by Ctrl-C; 141 whoever read the output went
away.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

import peertune
from peertune.cli.consortium import add_consortium
from peertune.cli.keys import KeysHelp
from peertune.cli.output import (
    Bars,
    GridBars,
    add_command,
    add_number,
    add_set,
    loading,
    print_paths,
    print_summary,
    progress_console,
    say,
)
from peertune.cli.signals import ended_as_by_ctrl_c
from peertune.cli.watch import add_watch
from peertune.errors import PeertuneError
from peertune.logfields import printable

EPILOG = """\
examples:
  peertune demo                                     eight peers, a few minutes, a report to look at
  peertune run recipe.toml --out runs/first         carry out a recipe
  peertune run recipe.toml --set algorithm.lr=1e-4 --set topology.kind=ring --out runs/second
  peertune run recipe.toml --out runs/first --resume
  peertune compare recipe.toml --algorithms deca,local --seeds 0,1,2 --out runs/compared
  peertune eval runs/first/model --data test.jsonl --task classification
"""

ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",  # it warns at each fork
    # Our own bars and messages replace those of the libraries below us, in processes that we start as well.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' too
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "critical",
    "GRPC_VERBOSITY": "NONE",  # what keeps a neighbour away is told by `unreachable` in words
    # Its own resolver asks the name server for names in /etc/hosts too, 12 s where none answers, and knows no nsswitch.
    "GRPC_DNS_RESOLVER": "native",
    # PyTorch's threads wait for each other a dozen times a step of the optimiser's, by default for milliseconds of
    # spinning, even where the one waited for has no core: beside others' work a step took 40 times as long as on one
    # thread. So much is what libgomp itself takes where it knows that there are too few cores.
    "GOMP_SPINCOUNT": "1000",
}
"""What those libraries read when they are imported, where the user has not set it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:  # else a run's file is where libraries write errors to
        pass
    os.close(opened)
    try:
        try:
            return _main(arguments)
        finally:
            print(end="", flush=True)  # now, and not at the interpreter's end, where an error cannot be caught
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141


def _reader_is_gone() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; what is left in its buffer is dropped."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    console = progress_console()
    # A rank may be within a call of another library, where no handler runs; workers end when their parent is gone.
    is_several = "RANK" in os.environ or getattr(options, "workers", 1) > 1
    may_hear = not is_several and threading.current_thread() is threading.main_thread()
    try:
        with ended_as_by_ctrl_c() if may_hear else nullcontext():
            return _carry_out(options, console)
    except KeyboardInterrupt as interrupt:
        by, resumable = f" by {interrupt}" if interrupt.args else "", getattr(options, "goes_on", "")
        say(console, f"peertune: interrupted{by}{resumable}")
        return 128 + signal.Signals[str(interrupt) or "SIGINT"]


def _carry_out(options: argparse.Namespace, console: Console) -> int:
    for name, value in ENVIRONMENT.items():
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:  # over which it would win
            os.environ.setdefault(name, value)
    try:
        return int(options.command(options, console) or 0)
    except PeertuneError as error:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # under torchrun
        kind = "error: " if error.exit_code else ""
        said = printable(f"peertune{rank}: {kind}{error}")  # it may quote a file that came from anybody
        say(console, said)
        return error.exit_code
    except PermissionError as error:
        if error.filename is None:
            raise  # of no file, as where a system has no semaphores for --workers
        place = printable(str(error.filename))
        say(console, f"peertune: error: {place}: {error.strerror}; give this command as the user whose files these are")
        return 2


class _Parser(argparse.ArgumentParser):
    """Says which option an unknown one is nearest to; those of commands too, whose usage it then shows."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            wrong = next((text.partition("=")[0] for text in unknown if text.startswith("--")), "")
            near = difflib.get_close_matches(wrong, flags, 1, 0.6)
            self.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
        return found, unknown


def _run(options: argparse.Namespace, console: Console) -> None:
    from peertune.algorithms import METHODS
    from peertune.recipe import load_recipe

    overrides = list(options.set)
    if options.out is not None:
        overrides.append(f"run.out={json.dumps(options.out, ensure_ascii=False)}")
    config, notes = load_recipe(options.recipe, overrides, METHODS)
    from peertune.launch import launch

    with Bars(console) as bars:
        summary = launch(config, base=Path(options.recipe).parent, notes=notes, resume=options.resume, progress=bars)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a rank
        print_summary(summary)
        print_paths(Path(config.run.out))


def _demo(options: argparse.Namespace, console: Console) -> None:
    from peertune.demo import demo

    Console().print(demo(Path(options.out), partial(Bars, console)))
    print_paths(Path(options.out) / "deca")


def _compare(options: argparse.Namespace, console: Console) -> None:
    from peertune.compare import Options, compare
    from peertune.compare.table import terminal_table

    asked = Options.parse(
        options.recipes,
        options.out,
        algorithms=options.algorithms,
        overrides=options.set,
        seeds=options.seeds,
        budget=options.budget,
        tune=options.tune,
        workers=options.workers,
    )
    found = compare(asked, GridBars(console))
    Console().print(terminal_table(found.rows, Console().width))
    for sentence in found.verdicts:
        print(f"- {sentence}")
    for kind, path in found.files.items():
        print(f"{kind + ':':10}{path}")


def _report(options: argparse.Namespace, console: Console) -> None:
    from peertune.report import write_report

    print(write_report(Path(options.folder)))


def _export(options: argparse.Namespace, console: Console) -> None:
    from peertune.export import export
    from peertune.run_folder import RunFolder

    done = export(
        Path(options.folder),
        Path(options.to),
        options.peer,
        adapter=options.adapter,
        trust_remote_code=options.trust_remote_code,
    )
    if done is not None:
        is_site = RunFolder(Path(options.folder)).read_recipe().get("site") is not None
        whose = "this site's own model, " if is_site else ""
        print(f"{options.folder}: {whose}of its newest checkpoint, after round {done}")
    print(f"{options.to}: load it with {loading(Path(options.to))}")


def _eval(options: argparse.Namespace, console: Console) -> None:
    from peertune.config import EvalSection
    from peertune.errors import ConfigError
    from peertune.measure_files import evaluate_model

    tasks = [name for name in (options.lm_eval or "").split(",") if name]
    if not options.data and not tasks:
        raise ConfigError("eval: got nothing to measure on, expected --data FILE with --task, or --lm-eval TASKS")
    settings = EvalSection(
        max_samples=options.max_samples,
        generate_samples=options.generate,
        max_new_tokens=options.max_new_tokens,
        choice_samples=options.choices,
    )
    for line in evaluate_model(
        options.model,
        options.data,
        options.task,
        settings,
        max_length=options.max_length,
        dtype=options.dtype,
        harness_tasks=tasks,
        trust_remote_code=options.trust_remote_code,
        overrides=options.set,
    ):
        print(json.dumps(line), flush=True)


class _GivenOnce(argparse.Action):
    """An option that cannot be given twice, where one may think that both count."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest)
        if before is not None:
            parser.error(f"{option_string}: got it twice, expected once: {before!r} or {values!r}")
        setattr(namespace, self.dest, values)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="peertune", description=peertune.__doc__, epilog=EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"peertune {peertune.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = add_command(
        commands, "run", help="carry out a recipe", formatter_class=raw, add_help=False, allow_abbrev=False
    )
    run.add_argument("-h", "--help", action=KeysHelp, nargs=0, help="show this, and every key of a recipe")
    run.add_argument("recipe", metavar="RECIPE.toml", help="what to train, on what and how")
    add_set(run, "override a key")
    run.add_argument("--out", metavar="DIR", help="folder of the run (run.out); default: the recipe's")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in that folder")
    run.set_defaults(command=_run, goes_on="; go on with --resume")

    demo = add_command(commands, "demo", help="DECA on eight peers with Python's own standard library, in minutes")
    demo.add_argument("--out", default="peertune-demo", metavar="DIR", help="folder; default: peertune-demo")
    demo.set_defaults(command=_demo)

    compare = add_command(
        commands,
        "compare",
        help="methods side by side: the same data and budget, differences tested over seeds",
        allow_abbrev=False,
    )
    compare.add_argument(
        "recipes", nargs="+", metavar="RECIPE.toml", help="each a contestant, or one with --algorithms"
    )
    compare.add_argument(
        "--algorithms", metavar="A,B,...", help="each name or name:key=value, such as deca:topology.kind=ring"
    )
    compare.add_argument("--seeds", default="0,1,2", metavar="S,S,...", help="run.seed of the cells; default: 0,1,2")
    add_set(compare, "override a key for all")
    compare.add_argument(
        "--budget", default="samples", metavar="KIND", help="what all spend alike: samples (default), bytes or seconds"
    )
    compare.add_argument(
        "--tune",
        action=_GivenOnce,
        metavar="KEY=X,Y,...",
        help="a grid of an [algorithm] key, chosen on validation rows, such as lr=1e-4,1e-3",
    )
    add_number(compare, "--workers", 1, 1, "cells at a time, each in a process (samples only)")
    compare.add_argument(
        "--out",
        default="runs/compared",
        metavar="DIR",
        help="folder; an unfinished one goes on; default: runs/compared",
    )
    compare.set_defaults(command=_compare, goes_on="; the same command goes on")

    add_consortium(commands)
    add_watch(commands)

    report = add_command(commands, "report", help="write a run's HTML page anew, also while the run goes on")
    report.add_argument("folder", metavar="DIR", help="folder of the run")
    report.set_defaults(command=_report)

    export = add_command(commands, "export", help="write a run's average model as a folder that from_pretrained loads")
    export.add_argument("folder", metavar="DIR", help="folder of the run")
    export.add_argument("--to", required=True, metavar="DIR", help="folder to write, new or empty")
    add_number(export, "--peer", 0, None, "with what is personal to this peer, parts or a whole model", "I")
    export.add_argument("--adapter", action="store_true", help="the adapter alone, as peft loads it, not merged")
    export.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code that comes with the base run, whatever the recipe says",
    )
    export.set_defaults(command=_export)

    evaluate = add_command(commands, "eval", help="metrics of a model on data files, one JSON line each")
    evaluate.add_argument("model", metavar="MODEL", help="folder or hub name")
    evaluate.add_argument("--data", nargs="+", default=[], metavar="FILE", help="what to measure on")
    evaluate.add_argument(
        "--task", choices=["text", "classification", "instruction", "chat"], help="what the rows of all files are"
    )
    add_set(evaluate, "how the files are read, such as data.text_field=sentence", "data.key")
    for flag, least, default, help in (
        ("--max-samples", 0, 0, "rows at most, drawn; 0: all"),
        ("--max-length", 8, 0, "tokens of a sequence at most; default: 256, for --lm-eval the model's own"),
        ("--generate", 0, 0, "rows of a file answered by greedy generation: calls, final numbers"),
        ("--max-new-tokens", 1, 128, "tokens of an answer at most; default: 128"),
        ("--choices", 0, 0, "rows with calls where the functions offered are scored by their likelihood"),
    ):
        add_number(evaluate, flag, least, default, help)
    evaluate.add_argument(
        "--lm-eval", metavar="TASK,TASK", help="tasks of lm-evaluation-harness; needs pip install 'peertune[eval]'"
    )
    evaluate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type the weights are held in; bfloat16 takes half the memory; default: float32",
    )
    evaluate.add_argument(
        "--trust-remote-code", action="store_true", help="let code that comes with the model run, such as bottlenecks'"
    )
    evaluate.set_defaults(command=_eval)
    return parser
