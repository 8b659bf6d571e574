"""The `peertune` command: reads arguments, calls the library, prints what it says. No logic of its own.

Exit codes: 0 done; 1 a run stopped, resumable; 2 something given cannot be used; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

import peertune
from peertune.errors import PeertuneError

EPILOG = """\
examples:
  peertune demo                                     eight peers, three minutes, a report to look at
  peertune run recipe.toml --out runs/first         carry out a recipe
  peertune run recipe.toml --set algorithm.lr=1e-4 --set topology.kind=ring --out runs/second
  peertune run recipe.toml --out runs/first --resume
  peertune compare recipe.toml --algorithms deca,local --seeds 0,1,2 --out runs/compared
  peertune eval runs/first/model --data test.jsonl --task classification
"""


class Bars:
    """Shows a run's progress on standard error."""

    def __init__(self, console: Console, label: str = "training") -> None:
        self._console = console
        self._label = label
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Bars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, message: str) -> None:
        self._console.print(f"note: {message}", style="dim", markup=False, highlight=False, emoji=False, soft_wrap=True)

    def rounds(self, done: int, total: int, loss: float | None) -> None:
        if self._task is None:
            self._task = self._bars.add_task(self._label, total=total, loss="")
        self._bars.update(self._task, completed=done, loss="" if loss is None else f"loss {loss:.3f}")


class GridBars:
    """Shows a comparison's progress: a line a cell, and a cell's own bar while it runs."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, message: str) -> None:
        Bars(self._console).note(message)

    @contextmanager
    def cell(self, label: str, number: int, total: int) -> Iterator[Bars]:
        self._console.print(f"[{number}/{total}] {label}", markup=False, highlight=False, emoji=False, soft_wrap=True)
        with Bars(self._console, f"[{number}/{total}]") as bars:
            yield bars


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _quiet_libraries()
        options.command(options, console)
    except PeertuneError as error:
        rank = f" rank {os.environ['RANK']}" if "RANK" in os.environ else ""  # under torchrun
        console.print(f"peertune{rank}: error: {error}", markup=False, highlight=False, emoji=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        ways = {_run: "; go on with --resume", _compare: "; the same command goes on"}
        resumable = ways.get(options.command, "")
        console.print(f"peertune: interrupted{resumable}", markup=False)
        return 130
    return 0


def _run(options: argparse.Namespace, console: Console) -> None:
    from peertune.algorithms import METHODS
    from peertune.config import load_recipe

    overrides = list(options.set)
    if options.out is not None:
        overrides.append(f"run.out={json.dumps(options.out, ensure_ascii=False)}")
    config, notes = load_recipe(options.recipe, overrides, METHODS)
    from peertune.run import launch

    with Bars(console) as bars:
        summary = launch(config, base=Path(options.recipe).parent, notes=notes, resume=options.resume, progress=bars)
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this command once a peer
        Console().print(_summary_table(summary))
        _print_paths(Path(config.run.out))


def _demo(options: argparse.Namespace, console: Console) -> None:
    from peertune.demo import demo

    def bars(label: str) -> Bars:
        return Bars(console, label)

    table = demo(Path(options.out), bars)
    Console().print(table)
    _print_paths(Path(options.out) / "deca")


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
    Console().print(terminal_table(found.rows))
    for sentence in found.verdicts:
        print(f"- {sentence}")
    for kind, path in found.files.items():
        print(f"{kind + ':':10}{path}")


def _keygen(options: argparse.Namespace, console: Console) -> None:
    from peertune.identity import default_folder, make_identity

    print(make_identity(Path(options.identity) if options.identity else default_folder()).id)


def _charter_new(options: argparse.Namespace, console: Console) -> None:
    from peertune.charter import parse_member
    from peertune.consortium import new_charter

    members = [parse_member(text) for text in options.member]
    to = Path(options.to)
    new_charter(Path(options.recipe), options.set, members, options.expires, to, options.grace)
    print(f"{to}: now let every member sign it: peertune charter sign {to}")


def _charter_sign(options: argparse.Namespace, console: Console) -> None:
    from peertune.consortium import sign_charter
    from peertune.identity import default_folder

    charter = sign_charter(Path(options.charter), Path(options.identity) if options.identity else default_folder())
    missing = [member.name for member in charter.members if member.name not in charter.signatures]
    print(f"{options.charter}: signed by {', '.join(charter.signatures)}; missing: {', '.join(missing) or 'nobody'}")


def _join(options: argparse.Namespace, console: Console) -> None:
    from peertune.consortium import join
    from peertune.identity import default_folder

    with Bars(console) as bars:
        summary = join(
            Path(options.charter),
            identity=Path(options.identity) if options.identity else default_folder(),
            train=options.data or "",
            test=options.test or "",
            out=Path(options.out),
            listen=options.listen or "",
            model=options.model or "",
            overrides=options.set,
            progress=bars,
        )
    Console().print(_summary_table(summary))
    _print_paths(Path(options.out))


def _report(options: argparse.Namespace, console: Console) -> None:
    from peertune.report import write_report

    print(write_report(Path(options.folder)))


def _export(options: argparse.Namespace, console: Console) -> None:
    from peertune.export import export

    export(Path(options.folder), Path(options.to))
    print(f"{options.to}: load it with {_loading(Path(options.to))}")


def _eval(options: argparse.Namespace, console: Console) -> None:
    from peertune.config import EvalSection
    from peertune.errors import ConfigError
    from peertune.export import evaluate_model

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
        harness_tasks=tasks,
        trust_remote_code=options.trust_remote_code,
    ):
        print(json.dumps(line), flush=True)


def _summary_table(summary: dict[str, Any]) -> Table:
    """What a run achieved, a row a metric."""
    metrics = summary["metrics"]
    table = Table(
        title=f"{summary['algorithm']}, {len(summary['bytes_sent_per_peer'])} peers, {summary['rounds']} rounds"
    )
    for column in ("held-out", "before", "average model", "peers' own, mean", "worst peer"):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    for name, value in metrics["average_model"].items():
        own = [peer[name] for peer in metrics.get("personal", metrics["peers"]) if peer and name in peer]
        spread = ["-", "-"]  # a server in a consortium knows no peer's
        if own:
            worst = max(own) if name in ("loss", "call_loss", "perplexity") else min(own)
            spread = [f"{v:.4f}" for v in (sum(own) / len(own), worst)]
        table.add_row(name, *(f"{v:.4f}" for v in (metrics["before"][name], value)), *spread)
    sent = [count for count in summary["bytes_sent_per_peer"] if count is not None] or [0]  # a site knows its own
    table.caption = (
        f"sent by a peer: {sum(sent) / len(sent) / 1e6:,.1f} MB on average, {max(sent) / 1e6:,.1f} MB at most;"
        f" peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB; {summary['wall_s']:.0f} s"
    )
    return table


def _print_paths(out: Path) -> None:
    exported = next(folder for folder in (out / "model", out / "adapter") if folder.exists())
    print(f"report: {out / 'report.html'}")
    print(f"{exported.name + ':':<8}{exported}")
    print(f"load it with: {_loading(exported)}")


def _loading(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
    code = ", trust_remote_code=True" if any(folder.glob("modeling_*.py")) else ""
    return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}{code})"


def _quiet_libraries() -> None:
    """Our own bars and messages replace those of the libraries below us."""
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils import logging

    disable_progress_bar()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _keys_help() -> str:
    """All keys of a recipe with defaults and what they mean, from the sections' own docstrings."""
    from peertune.algorithms import METHODS
    from peertune.config import RunConfig, Section

    lines = ["keys of a recipe (set in the TOML file or with --set):"]

    def line(name: str, field: Any, remark: str = "") -> None:
        default = json.dumps(field.default, default=str)
        lines.append(f"    {name} = {default}".ljust(38) + remark + " ".join((field.description or "").split()))

    def show(section: type[Section], prefix: str) -> None:
        lines.append(f"\n  [{prefix}]")
        inner: list[tuple[str, type[Section]]] = []
        for name, field in section.model_fields.items():
            kind = field.annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                inner.append((name, kind))
                continue
            line(name, field)
        for name, kind in inner:
            show(kind, f"{prefix}.{name}")

    for name, field in RunConfig.model_fields.items():
        if name == "algorithm":
            show(METHODS["deca"], name)
            lines.append("\n  [algorithm], of other methods")
            known = METHODS["deca"].model_fields.keys()
            for key in sorted({key for m in METHODS.values() for key in m.model_fields} - known):
                users = [method for method, m in METHODS.items() if key in m.model_fields]
                line(key, METHODS[users[0]].model_fields[key], f"({', '.join(users)}) ")
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            show(field.annotation, name)
    return "\n".join(lines)


class _RunHelp(argparse.Action):
    """`peertune run --help` with all keys; made only when asked for, as it loads the methods."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.epilog = _keys_help()
        parser.print_help()
        parser.exit()


def _at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number from {least} on")
        return int(text)

    return parse


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a date such as 2030-12-31") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return value


def _add_consortium(commands: Any) -> None:
    """The commands of a site in a consortium (docs/consortium.md)."""

    def own(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--identity", metavar="DIR", help="folder of this site's key; default: ~/.peertune")

    keygen = commands.add_parser("keygen", help="make this site's key and print its id, for a charter")
    own(keygen)
    keygen.set_defaults(command=_keygen)

    charter = commands.add_parser("charter", help="what the sites of a consortium agree on: write it, sign it")
    actions = charter.add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser("new", help="write a charter for a recipe and its members", allow_abbrev=False)
    new.add_argument("recipe", metavar="RECIPE.toml")
    new.add_argument(
        "--member", action="append", required=True, metavar="NAME=ID[@HOST:PORT][#SAMPLES]", help="in order; repeatable"
    )
    new.add_argument("--set", action="append", default=[], metavar="section.key=value", help="override a key")
    new.add_argument("--expires", type=_date, required=True, metavar="YYYY-MM-DD", help="last day it is valid")
    new.add_argument("--grace", type=_seconds, default=600.0, metavar="S", help="wait so long for a site out of reach")
    new.add_argument("--to", default="charter.toml", metavar="FILE")
    new.set_defaults(command=_charter_new)
    sign = actions.add_parser("sign", help="add this site's signature")
    sign.add_argument("charter", metavar="CHARTER.toml")
    own(sign)
    sign.set_defaults(command=_charter_sign)

    join = commands.add_parser(
        "join", help="take part in a charter's run; the same command goes on", allow_abbrev=False
    )
    join.add_argument("charter", metavar="CHARTER.toml")
    join.add_argument("--data", metavar="FILE", help="this site's training data; a server has none")
    join.add_argument("--test", metavar="FILE", help="its held-out data")
    join.add_argument("--out", default="runs/consortium", metavar="DIR", help="folder of the run")
    join.add_argument("--listen", metavar="HOST:PORT", help="default: the port of this site's address in the charter")
    join.add_argument("--model", metavar="PATH", help="where the base lies here")
    join.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="a key of this site's own"
    )
    own(join)
    join.set_defaults(command=_join)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="peertune", description=peertune.__doc__, epilog=EPILOG, formatter_class=raw, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"peertune {peertune.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="carry out a recipe", formatter_class=raw, add_help=False, allow_abbrev=False)
    run.add_argument("-h", "--help", action=_RunHelp, nargs=0, help="show this, and every key of a recipe")
    run.add_argument("recipe", metavar="RECIPE.toml")
    run.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a key; repeatable"
    )
    run.add_argument("--out", metavar="DIR", help="folder of the run (run.out)")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in that folder")
    run.set_defaults(command=_run)

    demo = commands.add_parser("demo", help="DECA on eight peers with Python's own standard library, in minutes")
    demo.add_argument("--out", default="peertune-demo", metavar="DIR")
    demo.set_defaults(command=_demo)

    compare = commands.add_parser(
        "compare",
        help="methods side by side: the same data and budget, differences tested over seeds",
        allow_abbrev=False,
    )
    compare.add_argument(
        "recipes", nargs="+", metavar="RECIPE.toml", help="each a contestant, or one with --algorithms"
    )
    compare.add_argument(
        "--algorithms", metavar="A,B,...", help="methods, each name or name:key=value, such as deca:discrepancy=none"
    )
    compare.add_argument("--seeds", default="0,1,2", metavar="S,S,...", help="run.seed of the cells; default: 0,1,2")
    compare.add_argument(
        "--set", action="append", default=[], metavar="section.key=value", help="override a key for all; repeatable"
    )
    compare.add_argument(
        "--budget", default="samples", metavar="KIND", help="what all spend alike: samples (default), bytes or seconds"
    )
    compare.add_argument(
        "--tune",
        metavar="KEY=X,Y,...",
        help="a grid of an [algorithm] key, chosen on validation rows, such as lr=1e-4,1e-3",
    )
    compare.add_argument(
        "--workers", type=_at_least(1), default=1, metavar="N", help="cells at a time, each in a process (samples only)"
    )
    compare.add_argument("--out", default="runs/compared", metavar="DIR", help="folder; an unfinished one goes on")
    compare.set_defaults(command=_compare)

    _add_consortium(commands)

    report = commands.add_parser("report", help="write a run's HTML page anew, also while the run goes on")
    report.add_argument("folder", metavar="DIR")
    report.set_defaults(command=_report)

    export = commands.add_parser("export", help="write a run's average model as a folder that from_pretrained loads")
    export.add_argument("folder", metavar="DIR")
    export.add_argument("--to", required=True, metavar="DIR")
    export.set_defaults(command=_export)

    evaluate = commands.add_parser("eval", help="metrics of a model on data files, one JSON line each")
    evaluate.add_argument("model", metavar="MODEL", help="folder or hub name")
    evaluate.add_argument("--data", nargs="+", default=[], metavar="FILE")
    evaluate.add_argument("--task", choices=["text", "classification", "instruction", "chat"], help="of all files")
    evaluate.add_argument("--max-samples", type=_at_least(0), default=0, metavar="N", help="rows at most; 0: all")
    evaluate.add_argument(
        "--max-length",
        type=_at_least(8),
        default=0,
        metavar="N",
        help="tokens of a sequence at most; default: 256, for --lm-eval the model's own",
    )
    evaluate.add_argument(
        "--generate",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="rows of a file answered by greedy generation: calls, final numbers",
    )
    evaluate.add_argument(
        "--max-new-tokens", type=_at_least(1), default=128, metavar="N", help="tokens of an answer at most"
    )
    evaluate.add_argument(
        "--choices",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="rows with calls where the functions offered are scored by their likelihood",
    )
    evaluate.add_argument(
        "--lm-eval", metavar="TASK,TASK", help="tasks of lm-evaluation-harness; needs pip install 'peertune[eval]'"
    )
    evaluate.add_argument(
        "--trust-remote-code", action="store_true", help="let code that comes with the model run, such as bottlenecks'"
    )
    evaluate.set_defaults(command=_eval)
    return parser
