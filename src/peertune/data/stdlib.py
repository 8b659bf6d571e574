"""Real text that is on every machine: the source of Python's own standard library, dealt to eight peers by subject.

The peers are non-IID by nature: decimal arithmetic shares little with XML parsers. Modules that no peer holds are what
the shipped base model was pre-trained on (`scripts/make_tiny_model.py`), so the base has seen none of the peers' text.

    load_stdlib("train"), load_stdlib("test")   five of every six chunks of each group, and the sixth
    load_stdlib("pretrain")                     whole files of every module outside the groups
"""

import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from peertune.errors import DataError
from peertune.seeds import numpy_rng

GROUPS: dict[str, tuple[str, ...]] = {
    "asyncio": ("asyncio",),
    "email": ("email", "mailbox"),
    "files and archives": ("bz2", "filecmp", "gzip", "lzma", "pathlib", "shutil", "tarfile", "tempfile", "zipfile"),
    "language reference": ("pydoc_data",),
    "numbers": ("_pydecimal", "fractions", "random", "statistics"),
    "testing": ("doctest", "unittest"),
    "web": ("ftplib", "http", "imaplib", "smtplib", "socketserver", "urllib", "wsgiref"),
    "xml": ("html", "plistlib", "xml", "xmlrpc"),
}
"""Subject -> modules, a peer each: modules and packages present from Python 3.11 to 3.14 on every system."""

_MIN_CHUNK, _GOOD_CHUNK, _MAX_CHUNK = 2000, 3000, 4000  # characters
_MAX_GROUP = 264_000  # characters kept of a group, train and test together: no group outweighs the others
_TEST_EVERY = 6
_SKIPPED_FOLDERS = {"__pycache__", "__phello__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
# `encodings` is tables of numbers; `_sysconfigdata*` and `config-*` are written when Python is built.
_SKIPPED_TOP = ("encodings", "_sysconfigdata", "config-", "__hello__", "sitecustomize", "usercustomize")


def load_stdlib(split: Literal["train", "test", "pretrain"]) -> tuple[list[dict[str, Any]], list[int]]:
    """Text of one split, in an order that depends on nothing but the Python version.

    Args:
        split: "train" or "test" (chunks of 2-4 kB of the groups' files), or "pretrain" (whole files of other modules).

    Returns:
        Rows {"text", "client": name of the group, "module": dotted name}, and each row's group as an index into
        `GROUPS`, shape [num_rows]. For "pretrain", client is "pretrain" and every index 0.

    Raises:
        DataError: a group's module is not installed as source text.
    """
    root = stdlib_root()
    files = {group: group_files(root, group) for group in GROUPS}
    if split == "pretrain":
        taken = {path for paths in files.values() for path in paths}
        rows = [
            {"text": text, "client": "pretrain", "module": _dotted(root, path)}
            for path in _sources(root)
            if path not in taken and (text := _read(path))
        ]
        return rows, [0] * len(rows)
    rows, groups = [], []
    for index, (group, paths) in enumerate(files.items()):
        for position, (module, text) in enumerate(_group_chunks(root, group, paths)):
            if (position % _TEST_EVERY == _TEST_EVERY - 1) == (split == "test"):
                rows.append({"text": text, "client": group, "module": module})
                groups.append(index)
    return rows, groups


def stdlib_root() -> Path:
    """The folder of the running Python's standard library (in a virtual environment, that of the Python under it)."""
    return Path(sysconfig.get_path("stdlib"))


def group_files(root: Path, group: str) -> list[Path]:
    """Source files of a group's modules, sorted; a module may be `name.py` or a package, which differs by version.

    Raises:
        DataError: a module has no source file below `root`.
    """
    found: list[Path] = []
    for module in GROUPS[group]:
        paths = [root / f"{module}.py"] if (root / f"{module}.py").is_file() else list(_sources(root / module))
        if not paths:
            raise DataError(
                f"standard library module {module!r} has no source in {root} (Python {platform.python_version()}); "
                "expected with every Python 3.11 to 3.14: install the complete standard library, or name your own data"
            )
        found += paths
    return sorted(found)


def cut(text: str) -> list[str]:
    """Cut source text into chunks of about 2-4 kB that join to `text` again.

    A chunk ends before a top-level definition once it has 2000 characters, before any method or paragraph from 3000,
    and at 4000 at the end of whatever line that is. A rest too short to stand alone joins the last chunk.
    """
    chunks: list[str] = []
    lines: list[str] = []
    size, after_decorator = 0, False
    for line in text.splitlines(keepends=True):
        top = line.startswith(("def ", "class ", "async def ", "@"))
        inner = line.lstrip().startswith(("def ", "class ", "async def ", "@")) or not line.strip()
        border = (top and size >= _MIN_CHUNK) or (inner and size >= _GOOD_CHUNK)
        if lines and ((border and not after_decorator) or size >= _MAX_CHUNK):
            chunks.append("".join(lines))
            lines, size = [], 0
        lines.append(line)
        size += len(line)
        after_decorator = line.lstrip().startswith("@")
    if chunks and size < _MIN_CHUNK // 2:
        chunks[-1] += "".join(lines)
    elif lines:
        chunks.append("".join(lines))
    return chunks


def _group_chunks(root: Path, group: str, paths: list[Path]) -> list[tuple[str, str]]:
    """(module, text) of a group's chunks in file order: without repeats, at most `_MAX_GROUP` characters of them."""
    seen: set[str] = set()
    fresh: list[tuple[str, str]] = []
    for path in paths:
        for text in cut(_read(path)):
            # A reference and its overview hold the same paragraphs; one of them in train and one in test would
            # measure memory. Short lines (`return None`) say nothing about it.
            telling = {line.strip() for line in text.splitlines() if len(line.strip()) > 30}
            if 2 * len(telling & seen) <= len(telling):
                fresh.append((_dotted(root, path), text))
            seen |= telling
    kept, size = [], 0
    for index in numpy_rng(0, "stdlib", group).permutation(len(fresh)).tolist():
        if size + len(fresh[index][1]) <= _MAX_GROUP:
            kept.append(index)
            size += len(fresh[index][1])
    return [fresh[index] for index in sorted(kept)]


def _sources(folder: Path) -> Iterator[Path]:
    """Python files below `folder` in sorted order, without tests and what is not standard library."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if not (_SKIPPED_FOLDERS & set(parts) or parts[0].startswith(_SKIPPED_TOP)):
            yield path


def _dotted(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _read(path: Path) -> str:
    """Text of a file; empty if it is not UTF-8 (a few old files are Latin-1)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""
