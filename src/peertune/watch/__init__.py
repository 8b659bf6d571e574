"""A run while it goes on: its state from its own logs, as a local page, for Prometheus, and in the terminal.

Reading order: logs, state, folder, page, terminal, metrics, server.
"""

from peertune.watch.folder import read_state
from peertune.watch.terminal import status_lines

__all__ = ["read_state", "status_lines"]
