"""What the command shows: bars on standard error while it works, a table and paths when it is done."""

from __future__ import annotations

import os
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import UnsupportedOperation
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from peertune.formatting import traffic
from peertune.logfields import printable
from peertune.metric import metric_named

PATIENCE_S = 1.0
"""Seconds that a remark may take to be written; then the work goes on, and nothing is shown until it is out."""


def add_command(commands: Any, name: str, help: str, **options: Any) -> Any:
    """A parser for one more command; `--help` of all commands and its own say the same of it."""
    return commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.", **options)


def add_set(parser: Any, help: str, key: str = "section.key") -> None:
    """An option for keys of a recipe."""
    parser.add_argument("--set", action="append", default=[], metavar=f"{key}=value", help=f"{help}; repeatable")


def add_number(parser: Any, flag: str, least: int, default: int | None, help: str, metavar: str = "N") -> None:
    """An option for a whole number from `least` on."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"got {text!r}, expected a whole number from {least} on")
        return int(text)

    parser.add_argument(flag, type=parse, default=default, metavar=metavar, help=help)


class Lossy:
    """A text stream without which the work goes on: what a full disk or a closed pipe does not take is lost, and so is
    what comes while a terminal is stopped or nobody reads the pipe, which may be for hours.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._text = stream, ""
        self._lock = threading.Lock()
        self._writer = threading.Thread()

    def write(self, text: str) -> int:
        self._text += text
        return len(text)

    def flush(self) -> None:
        with self._lock, suppress(RuntimeError):  # as many threads as there may be
            text, self._text = self._text, ""
            if text and not self._writer.is_alive():
                self._writer = threading.Thread(target=self._write, args=(text,), daemon=True)
                self._writer.start()
                self._writer.join(PATIENCE_S)

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError, AttributeError):  # AttributeError: there is no stream
            try:
                descriptor = self._stream.fileno()
            except UnsupportedOperation:
                self._stream.write(text)
                return
            data = text.encode(self._stream.encoding, "backslashreplace")
            while data:  # past the stream's own lock, for which the interpreter would wait at its end
                data = data[os.write(descriptor, data) :]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def progress_console() -> Console:
    """What progress and remarks are written to: standard error, as far as it can be written to."""
    return Console(file=cast(TextIO, Lossy(sys.stderr)))


def say(console: Console, text: str, style: str = "") -> None:
    """Print a text as it stands, whatever it holds, in lines as long as they are."""
    console.print(text, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True)


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
        if not self._bars.disable:  # rich before 14.3 ends a disabled one with an empty line
            self._bars.stop()

    def note(self, message: str) -> None:
        said = "\n".join(map(printable, f"note: {message}".split("\n")))  # a table has lines
        say(self._console, said, "dim")

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
        said = printable(f"[{number}/{total}] {label}")
        say(self._console, said)
        with Bars(self._console, f"[{number}/{total}]") as bars:
            yield bars


def summary_table(summary: dict[str, Any]) -> Table:
    """What a run achieved, a row a metric; at a site, what this one knows."""
    metrics, is_site, agreement = summary["metrics"], "contributions" in summary, summary.get("agreement")
    is_alone = agreement is not None and not agreement["with"] and bool(agreement["without"])
    table = Table(
        title=f"{summary['algorithm']}, {len(summary['bytes_sent_per_peer'])} peers, {summary['rounds']} rounds"
    )
    result = "this site's model" if is_alone else "agreed model" if is_site else "average model"
    own_columns = ["peers' own, mean", "worst peer"]
    if is_site:
        own_columns = ["its personal model" if "personal" in metrics else "before agreement"]
    for column in ("held-out", "before", result, *own_columns):
        table.add_column(column, justify="left" if column == "held-out" else "right")
    for name, value in metrics["average_model"].items():
        own = [peer[name] for peer in metrics.get("personal", metrics["peers"]) if peer and name in peer]
        spread = ["-"] * len(own_columns)  # a server in a consortium knows no peer's
        if own:
            spread = [f"{v:.4f}" for v in (sum(own) / len(own), metric_named(name).worst(own))][: len(own_columns)]
        table.add_row(name, *(f"{v:.4f}" for v in (metrics["before"][name], value)), *spread)
    sent = [count for count in summary["bytes_sent_per_peer"] if count is not None] or [0]  # a site knows its own
    told = f"{traffic(sum(sent) / len(sent))} on average, {traffic(max(sent))} at most"
    table.caption = (
        f"sent by {f'this site: {traffic(sent[0])}' if is_site else f'a peer: {told}'};"
        f" peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB; {summary['wall_s']:.0f} s"
    )
    if agreement:
        agreed, without = (", ".join(agreement[key]) or "nobody" for key in ("with", "without"))
        table.caption += f"\nagreed with: {agreed}; without: {without}"
        if agreement["unheard"]:
            table.caption += f"\nnot heard in the last round: {', '.join(agreement['unheard'])}"
        if not agreement.get("is_one", True):  # a summary may be of an older version
            table.caption += "\nwarning: they do not all hold one model; compare the hashes of the sites' model folders"
    if is_alone:
        table.caption += "\nwarning: the others end with other models than this one"
    return table


def print_summary(summary: dict[str, Any]) -> None:
    """What a run achieved, as a table; where nothing was held out to measure it by, in lines."""
    table, console = summary_table(summary), Console()
    if table.row_count:
        console.print(table)
    else:
        say(console, f"{table.title}\n{table.caption}")


def print_paths(out: Path) -> None:
    exported = next((folder for folder in (out / "model", out / "adapter") if folder.exists()), None)
    print(f"report: {out / 'report.html'}")
    if exported is None:
        print(f"model:  deleted; where the checkpoints are left, `peertune export {out} --to FOLDER` makes it anew")
        return
    print(f"{exported.name + ':':<8}{exported}")
    print(f"load it with: {loading(exported)}")


def loading(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return f"peft.AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
    code = ", trust_remote_code=True" if any(folder.glob("modeling_*.py")) else ""
    return f"transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}{code})"
