"""Putting a member out of a running consortium: a small TOML file that enough of the others sign.

It lies beside the charter, as CHARTER.eject-NAME.toml, and goes from site to site like the charter. A site that finds
one with enough signatures has nothing more to do with that member; the signatures are by the charter's keys, over the
charter's digest and the member's id, so a file of another run says nothing here. The member is told by the file's
content too, by those that would else dial it, and believes the signatures, not who sends them.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

import tomli_w
from pydantic import Field

from peertune.charter import Charter
from peertune.config import Section
from peertune.errors import CharterError
from peertune.identity import Identity, is_signed
from peertune.recipe import parse_toml
from peertune.storage import write_atomically


class Ejection(Section):
    member: str
    """Name of the one who is to go."""
    signatures: dict[str, str] = Field(default_factory=dict)
    """Name of a member -> its signature."""

    def signed(self, charter: Charter, identity: Identity) -> Ejection:
        """With one more signature. Raises CharterError where the identity is no member's, or its own."""
        name = charter.members[charter.index_of(identity.id)].name
        if name == self.member:
            raise CharterError(f"eject: {name} cannot eject itself; `peertune leave` is the way out")
        return self.model_copy(update={"signatures": {**self.signatures, name: identity.sign(_digest(charter, self))}})

    def signers(self, charter: Charter) -> list[str]:
        """Members, in the charter's order and the ejected one left out, whose signatures hold."""
        digest = _digest(charter, self)
        return [
            member.name
            for index, member in enumerate(charter.members)
            if member.name != self.member
            and member.name in self.signatures
            and is_signed(charter.certificate(index), self.signatures[member.name], digest)
        ]


def holds(ejection: Ejection, charter: Charter) -> bool:
    """Whether enough have signed that a member is to go."""
    is_member = any(member.name == ejection.member for member in charter.members)
    return is_member and len(ejection.signers(charter)) >= needed(charter)


def needed(charter: Charter) -> int:
    """How many have to sign: the quorum, and never fewer than more than half; or else all others."""
    return min(max(charter.quorum, len(charter.members) // 2 + 1), len(charter.members) - 1)


def ejection_path(charter: Path, member: str) -> Path:
    return charter.with_name(f"{charter.stem}.eject-{member}.toml")


def sign_ejection(path: Path, charter: Charter, member: str, identity: Identity) -> Ejection:
    """Write one with this site's signature, or add it to the one that is there.

    Args:
        path: of the charter's file.
        member: a member's name or id.
    Raises:
        CharterError: there is no such member, it is this site's own, or the file cannot be read or written.
    """
    named = next((each.name for each in charter.members if member in (each.name, each.id)), None)
    if named is None:
        names = ", ".join(each.name for each in charter.members)
        raise CharterError(f"eject: got {member!r}, expected a member's name or id; the members are {names}")
    own = ejection_path(path, named)
    found = read_ejection(own) if own.exists() else Ejection(member=named)
    if found.member != named:
        raise CharterError(f"{own}: is about {found.member}, expected {named}; it was tampered with: delete it")
    ejection = found.signed(charter, identity)
    try:
        write_atomically(own, tomli_w.dumps(ejection.model_dump()))
    except OSError as error:
        raise CharterError(f"{own}: cannot be written: {error.strerror}") from error
    return ejection


def read_ejection(path: Path) -> Ejection:
    """Raises CharterError where it is none."""
    try:
        return Ejection.model_validate(parse_toml(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise CharterError(f"{path}: is no ejection: {' '.join(str(error).split())[:200]}; get it anew") from None


def ejected(path: Path, charter: Charter) -> dict[int, Ejection]:
    """Ejections that hold of those beside a charter, whatever it is called here; by the member's place."""
    found = {}
    places = {member.name: index for index, member in enumerate(charter.members)}
    files: list[Path] = []
    with suppress(OSError):  # of a disk that is away for a while, or a process without a descriptor left
        files = sorted(path.parent.glob("*.eject-*.toml"))
    for file in files:
        try:
            ejection = read_ejection(file)
        except CharterError:
            continue  # half of it is copied
        if holds(ejection, charter):
            found[places[ejection.member]] = ejection
    return found


def _digest(charter: Charter, ejection: Ejection) -> bytes:
    id = next((member.id for member in charter.members if member.name == ejection.member), "")
    return hashlib.sha256(b"eject\n" + charter.digest() + id.encode()).digest()
