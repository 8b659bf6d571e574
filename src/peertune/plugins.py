"""Methods that other packages bring: their entry points of the group `peertune.algorithms`.

A package names each in its pyproject.toml, and recipes then know it wherever it is installed beside peertune:

    [project.entry-points."peertune.algorithms"]
    lazy_gossip = "my_methods.lazy_gossip:LazyGossip"

No recipe and no charter can name code that is not installed.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import peertune
from peertune.errors import ConfigError

GROUP = "peertune.algorithms"


@lru_cache
def found() -> dict[str, EntryPoint]:
    """Method -> entry point; of two packages that bring one name, the first in the order of their names."""
    points = sorted(entry_points(group=GROUP), key=lambda point: _package(point)[0])
    return {point.name: point for point in reversed(points)}


def load(point: EntryPoint) -> Any:
    """What an entry point names. Raises ConfigError where its package cannot be imported."""
    try:
        return point.load()
    except Exception as error:
        package, version = _package(point)
        raise ConfigError(
            f"{package} {version} brings the method {point.name!r} as {point.value}, which cannot be imported"
            f" ({type(error).__name__}: {error}); mend or uninstall it"
        ) from error


def code_version(method: str) -> str:
    """What has to be the same wherever peers run a method: peertune, and the package that brings the method."""
    point = found().get(method)
    if point is None:
        return peertune.__version__
    package, version = _package(point)
    return f"{peertune.__version__} with {package} {version}"


def _package(point: EntryPoint) -> tuple[str, str]:
    return ("", "") if point.dist is None else (point.dist.name, point.dist.version)
