"""The `peertune` command. It reads arguments, calls the library and prints what that says: no logic of its own.

Reading order: output, signals, keys, consortium, watch, command.
"""

from peertune.cli.command import ENVIRONMENT, main

__all__ = ["ENVIRONMENT", "main"]
