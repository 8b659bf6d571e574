"""The commands that look at a run from outside: watch, status (docs/consortium.md)."""

from __future__ import annotations

import argparse
import json
import webbrowser
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from peertune.cli.output import Bars, add_command

PORT = 7017


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a port from 0 to 65535; 0: any that is free")
    return int(text)


def add_watch(commands: Any) -> None:
    """Add them to the parser."""
    watch = add_command(commands, "watch", help="a local page that follows a run; also its metrics for Prometheus")
    watch.add_argument("folder", metavar="DIR", help="folder of the run")
    watch.add_argument("--port", type=_port, default=PORT, metavar="N", help=f"default: {PORT}; 0: any that is free")
    watch.add_argument("--open", action="store_true", help="open it in the browser")
    watch.set_defaults(command=_watch)

    status = add_command(commands, "status", help="how a run is getting on; exit code 1 where its process is gone")
    status.add_argument("folder", metavar="DIR", help="folder of the run")
    status.add_argument("--json", action="store_true", help="all that is known, as JSON")
    status.set_defaults(command=_status)


def _watch(options: argparse.Namespace, console: Console) -> None:
    from peertune.watch.server import WatchServer

    note = Bars(console).note
    server = WatchServer(Path(options.folder), options.port, note)
    try:
        if server.news.state.state == "empty":
            note(f"{options.folder}: no run yet; the page shows it as soon as there is one")
        print(f"{server.url}  (metrics: {server.url}metrics; Ctrl-C ends it, not the run)", flush=True)
        if options.open:
            webbrowser.open(server.url)
        server.serve_forever()
    finally:
        server.close()


def _status(options: argparse.Namespace, console: Console) -> int:
    from peertune.watch import read_state, status_lines

    state = read_state(Path(options.folder))
    print(json.dumps(asdict(state), indent=1) if options.json else "\n".join(status_lines(state)))
    return 1 if state.state == "stopped" else 0
