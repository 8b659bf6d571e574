"""The exception tree. Every error a user can cause is a `PeertuneError`; anything else that escapes is a bug of ours.

    PeertuneError                 exit code 1
    ├── InputError (ValueError)   exit code 2: found before anything was trained or written
    │   ├── ConfigError           a recipe, an override or a command line
    │   ├── DataError             a data file or what is in it
    │   ├── ModelError            a base model or its tokenizer
    │   ├── TopologyError         a graph or a mixing matrix
    │   ├── IdentityError         a site's key or certificate
    │   ├── CharterError          what the sites of a consortium agreed on
    │   └── CheckpointError       a run folder or a checkpoint in it
    ├── Left                      exit code 0: a site left the run in good order, as it was asked to
    └── RunError                  exit code 1: a run stopped; what it had reached is on disk and `--resume` goes on
        ├── DivergedError         a loss or a weight became NaN or infinite
        ├── StorageError          the disk is full or refused a write
        ├── PeerLostError         another process of the run is gone, and the runtime cannot go on without it
        └── TurnedAwayError       the other sites take nothing from this one any more

Messages say what was got, what was expected and what to do, in one line.
"""

import math


class PeertuneError(Exception):
    """Base class. `exit_code` is what the command line returns."""

    exit_code = 1


class InputError(PeertuneError, ValueError):
    """Something the user gave cannot be used. Nothing was trained or written."""

    exit_code = 2


class ConfigError(InputError):
    """A recipe, an override or a command line is wrong."""


class DataError(InputError):
    """A data file is missing, broken, or holds nothing to learn from."""


class ModelError(InputError):
    """A base model or tokenizer cannot be loaded or trained."""


class TopologyError(InputError):
    """A graph is disconnected, or its mixing matrix would not keep the mean."""


class IdentityError(InputError):
    """A site's key or certificate is missing, damaged, or open to others."""


class CharterError(InputError):
    """A consortium's charter does not hold, or is not this site's."""


class CheckpointError(InputError):
    """A run folder is taken, damaged, or belongs to another recipe."""


class Left(PeertuneError):
    """A site has left its run, with a checkpoint, as it was asked to; the same command brings it back."""

    exit_code = 0


class RunError(PeertuneError):
    """A run had to stop; its last checkpoint is intact."""


class DivergedError(RunError):
    """A loss or a weight became NaN or infinite."""


class StorageError(RunError):
    """The disk is full, or refused a write."""


class PeerLostError(RunError):
    """Another process of the run is gone, and the runtime cannot go on without it."""


class TurnedAwayError(RunError):
    """The other sites take nothing from this one: it was ejected, or runs elsewhere already."""


def require_finite(what: str, value: float) -> None:
    """Stop a run that has diverged. Raises DivergedError."""
    if not math.isfinite(value):
        raise DivergedError(
            f"{what} became {value}; lower algorithm.lr or set algorithm.max_grad_norm, and start anew in another"
            " folder"
        )
