"""What a site brings to the run of a charter: its options, and the base and tokenizer that all agreed on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peertune.algorithms import METHODS
from peertune.charter import Charter, is_address
from peertune.config import RunConfig
from peertune.errors import CharterError, ConfigError
from peertune.model.load import TINY
from peertune.prepare import base_fingerprint
from peertune.recipe import apply_override, from_dict

SITE_KEYS = (
    *("run.device", "run.threads", "run.log_every", "model.trust_remote_code"),
    *("data.text_field", "data.text_b_field", "data.label_field"),
    *("data.instruction_field", "data.input_field", "data.output_field"),
    *("data.messages_field", "data.system_field", "data.tools_field"),
)
"""Keys a site may set for itself: how its own files and machine are, and whether code beside the base may run there."""


@dataclass(frozen=True, kw_only=True)
class SiteOptions:
    """What a site brings to the run of a charter: its key, its files, how its machine is reached.

    Raises:
        ConfigError: `listen` or `overrides` cannot be what is meant, whatever the charter.
    """

    charter: Path
    """File of the charter, signed by all."""
    identity: Path
    """Folder of this site's key."""
    out: Path
    """Folder of the run."""
    train: str = ""
    """This site's training data; empty on a server only."""
    test: str = ""
    """Its held-out data; empty: nothing is evaluated."""
    listen: str = ""
    """HOST:PORT to open; empty: the port of this site's address in the charter, on all interfaces; none without."""
    model: str = ""
    """Where the base lies here; empty: as in the recipe."""
    overrides: Sequence[str] = ()
    """`section.key=value` of `SITE_KEYS`."""

    def __post_init__(self) -> None:
        if self.listen and not is_address(self.listen):
            raise ConfigError(f"--listen: got {self.listen!r}, expected HOST:PORT, such as 0.0.0.0:7000 or [::]:7000")
        for text in self.overrides:
            if text.partition("=")[0].strip() not in SITE_KEYS:
                raise ConfigError(f"--set {text!r}: the charter fixes this key; a site may set {', '.join(SITE_KEYS)}")

    def config(self, charter: Charter) -> RunConfig:
        """The charter's recipe with this site's own keys. Raises ConfigError."""
        tree = charter.config(METHODS).to_dict()
        tree["data"] |= {"train": self.train, "test": self.test}
        tree["run"]["out"] = str(self.out)
        tree["model"]["path"] = self.model or tree["model"]["path"]
        for text in self.overrides:
            apply_override(tree, text)
        return from_dict(tree, METHODS)[0]

    def address(self, charter: Charter, index: int) -> str:
        """HOST:PORT that this site, the charter's member `index`, opens; empty: none."""
        port = charter.members[index].address.rpartition(":")[2]
        return self.listen or (f"[::]:{port}" if port else "")


def fingerprints(module: Any, tokenizer: Any) -> tuple[str, str]:
    """Hashes of the base with its adapter, and of the tokenizer with its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    text = f"{words}\n{tokenizer.chat_template}"
    return base_fingerprint(module, set()), hashlib.sha256(text.encode()).hexdigest()


def check_base(charter: Charter, path: str, module: Any, tokenizer: Any) -> None:
    """Refuse another base or tokenizer than the charter's. Raises CharterError."""
    found, agreed = fingerprints(module, tokenizer), (charter.base, charter.tokenizer)
    tried = ", the packaged base, which is tried where no other is named," if path == TINY else ""
    for what, mine, theirs in zip(("weights", "tokenizer"), found, agreed, strict=True):
        if mine != theirs:
            raise CharterError(
                f"model.path: the {what} in {path!r}{tried} are not those of the charter; get the same base as"
                " the other sites, and name its folder with --model"
            )
