"""The page of `peertune watch`: plain HTTP for this machine's own browser, on the loopback interface only.

    /             the page; /style.css and /watch.js beside it
    /events       server-sent events: the page's sections, whenever the run's folder has changed
    /state.json   the snapshot, as `peertune status --json` prints it
    /metrics      the same for Prometheus

A request must name a loopback host: a page of another site, whose name was made to point here, is refused. Nothing can
be changed through it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST

import peertune.report
from peertune.errors import CheckpointError, ConfigError
from peertune.watch.folder import RunWatch
from peertune.watch.metrics import exposition
from peertune.watch.page import fragments
from peertune.watch.state import Snapshot

ADDRESS = "127.0.0.1"
HOSTS = {"127.0.0.1", "localhost", "[::1]"}
POLL_S = 0.5
"""Seconds between looks at the folder."""
ALIVE_S = 15.0
"""Seconds after which a silent stream says that it is alive."""
TIMEOUT_S = 30.0
"""Seconds after which a client that neither reads nor writes is given up."""
MAX_CLIENTS = 32
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self';"
    " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


class News:
    """The newest snapshot of a folder, for all who listen.

    Args:
        path: the run's folder.
        note: told why the folder cannot be read, once for each reason.
    """

    def __init__(self, path: Path, note: Callable[[str], None] = lambda message: None) -> None:
        self._watch, self._note = RunWatch(path), note
        self._changed = threading.Condition()
        self._number = 0
        self.closed = threading.Event()
        self._message = b""
        self._look()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()

    def _look(self) -> None:
        with self._changed:
            if self._watch.poll() or not self._number:
                self.state = self._watch.snapshot()
                self._message = message(self.state)
                self._number += 1
                self._changed.notify_all()

    def _follow(self) -> None:
        told = ""
        while not self.closed.wait(POLL_S):
            try:
                self._look()
                told = ""
            except CheckpointError as error:
                if str(error) != told:
                    self._note(str(error))
                told = str(error)

    def fresh(self) -> Snapshot:
        """The run at this moment."""
        with self._changed:
            return self._watch.snapshot()

    def after(self, number: int) -> tuple[int, bytes]:
        """The next message after that of a number, and its own number; the same number where none comes for a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > number or self.closed.is_set(), ALIVE_S)
            return self._number, self._message

    def close(self) -> None:
        self.closed.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()
        self._watch.close()


def message(state: Snapshot) -> bytes:
    """A snapshot as a server-sent event."""
    done = f"{state.rounds_done}/{state.rounds_planned}" if state.rounds_planned else state.state
    title = f"{done} {state.site or state.method} · peertune watch"
    told = {"now": state.now, "title": title, "parts": fragments(state)}
    return b"data: " + json.dumps(told).encode() + b"\n\n"


class WatchServer(ThreadingHTTPServer):
    """Serves one folder's news until `close`.

    Args:
        port: 0: any that is free.
    Raises:
        ConfigError: the port cannot be opened.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, path: Path, port: int, note: Callable[[str], None] = lambda message: None) -> None:
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise ConfigError(
                f"--port: {port} cannot be opened: {error.strerror}; name another, or 0 for any that is free"
            ) from error
        self._places = threading.BoundedSemaphore(MAX_CLIENTS)
        try:
            self.news = News(path, note)
        except BaseException:
            self.server_close()
            raise

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.server_address[1]}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            request.settimeout(1.0)
            with suppress(OSError):
                request.sendall(b"HTTP/1.0 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error."""

    def close(self) -> None:
        self.news.close()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: WatchServer
    timeout = TIMEOUT_S
    server_version, sys_version = "peertune", ""

    def do_GET(self) -> None:
        if not is_loopback(self.headers.get_all("Host") or []):
            self._answer(421, "text/plain", b"peertune watch answers only to 127.0.0.1 and localhost\n")
            return
        here, path = Path(__file__).parent, self.path.partition("?")[0]
        if path == "/":
            self._answer(200, "text/html", (here / "page.html").read_bytes())
        elif path == "/style.css":
            style = Path(peertune.report.__file__).parent / "report.css"
            self._answer(200, "text/css", style.read_bytes() + (here / "watch.css").read_bytes())
        elif path == "/watch.js":
            self._answer(200, "text/javascript", (here / "watch.js").read_bytes())
        elif path == "/state.json":
            self._answer(200, "application/json", json.dumps(asdict(self.server.news.fresh())).encode())
        elif path == "/metrics":
            self._answer(200, CONTENT_TYPE_LATEST, exposition(self.server.news.fresh()))
        elif path == "/events":
            self._stream()
        else:
            self._answer(404, "text/plain", b"not found\n")

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind if ";" in kind else f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b"retry: 1000\n\n")
        number, news = 0, self.server.news
        while not news.closed.is_set():
            then, told = news.after(number)
            self.wfile.write(told if then != number else b": still here\n\n")
            number = then
            time.sleep(POLL_S / 2)  # a burst is one message

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not told of."""


def is_loopback(hosts: list[str]) -> bool:
    """Whether a request has one Host header, and that names the loopback interface, with any port or none."""
    if len(hosts) != 1:
        return False
    host = hosts[0].strip().lower()
    name, colon, port = host.rpartition(":")
    return host in HOSTS or (bool(colon) and name in HOSTS and port.isdecimal())
