"""What the sites of a consortium agree on before they start: one small TOML file that every member signs.

It holds the recipe without anybody's paths, the base's hash, the members in their order with their ids, and until when
it is valid. A signature covers all of that; it comes with the member's certificate, so a charter that all have signed
is everything one needs to know the others by. There is no server, and nobody to ask.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any

import tomli_w
from pydantic import AfterValidator, Field, ValidationError

from peertune.config import NonNegative, Positive, RunConfig, Section
from peertune.errors import CharterError
from peertune.identity import Identity, certificate_id, is_own, is_signed
from peertune.logfields import text
from peertune.plugins import code_version
from peertune.recipe import Methods, flatten, from_dict, parse_toml
from peertune.storage import write_atomically

MAX_PIECES = 400
"""Keys whose hashes one site tells another. With those of the parts that is 4 kB; gRPC carries 8 beside a call."""
PIECE = 8
"""Letters of such a hash."""
MAX_NAMED = 5
"""Keys named in which two charters differ."""
SAME_FILE = "give both sites the same file"
HOST = re.compile(r"[^\s/@#:\[\]]+|\[[0-9a-fA-F:.]+(%[\w.-]+)?\]")
"""A name, an IPv4 address, or an IPv6 address in brackets."""
OWN_KEYS = {"run": ("out", "device"), "model": ("trust_remote_code",), "data": ("train", "test")}
"""Keys of a recipe that are each site's own business, in no charter, and taken from none."""


def is_address(text: str) -> bool:
    """Whether a text is HOST:PORT; an IPv6 address without brackets is none: gRPC takes its port for a part of it."""
    host, _, port = text.rpartition(":")
    return bool(HOST.fullmatch(host)) and port.isdecimal() and 0 < int(port) < 65536


def _address(text: str) -> str:
    if text and not is_address(text):
        raise ValueError(f"got {text!r}, expected HOST:PORT, or [ADDRESS]:PORT with an IPv6 address")
    return text


def _plain(recipe: dict[str, Any]) -> dict[str, Any]:
    """What JSON tells apart: else a date and the text of one, which differ, would have one signature."""
    try:
        json.dumps(recipe, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("holds a date, a time, infinity or what is no number, which no key is") from None
    return recipe


class Member(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")]
    """What people call it."""
    id: Annotated[str, Field(pattern=r"^[a-z2-7]{52}$")]
    """Hash of its key, as `peertune keygen` prints it."""
    address: Annotated[str, AfterValidator(_address)] = ""
    """HOST:PORT where it can be reached; empty: it opens no port and dials out."""
    samples: NonNegative = 0
    """Its number of samples; only methods that weight sites by it need it (topology.weights = "samples")."""


class Signature(Section):
    certificate: str
    signature: str


class Charter(Section):
    version: str
    """Of peertune, and of the package that brings the method where another does; the same at all sites."""
    expires: date
    base: str
    """Hash of the base model's weights, with the adapter that a method puts on it."""
    tokenizer: str
    """Hash of the tokenizer and its chat template."""
    grace_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a round waits for a neighbour who is out of reach, before it goes on without him."""
    quorum: Positive = 1
    """Members that have to be there, or the run waits; a server counts."""
    stall_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds without a byte after which a connection is given up and dialled anew."""
    recipe: Annotated[dict[str, Any], AfterValidator(_plain)]
    members: Annotated[list[Member], Field(min_length=1)]
    signatures: dict[str, Signature] = Field(default_factory=dict)

    def parts(self) -> dict[str, str]:
        """A hash of each part that is signed, so that two charters can be told apart by name."""
        tree = self.model_dump(mode="json", exclude={"signatures"})
        return {
            key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for key, value in tree.items()
        }

    def pieces(self) -> dict[str, str]:
        """A short hash of each key, such as recipe.algorithm.lr or members.east.address, to name what differs.

        Of a charter of more than `MAX_PIECES` keys, members are left out, or all.
        """
        tree = self.model_dump(mode="json", exclude={"signatures", "members"})
        members = {
            member.name: {**member.model_dump(exclude={"name"}), "place": place}
            for place, member in enumerate(self.members)
        }
        keys = flatten(tree)
        for more in (flatten({"members": members}), {}):
            if len(keys | more) <= MAX_PIECES:
                return {key: _short_hash(key, value) for key, value in (keys | more).items()}
        return {}

    def digest(self) -> bytes:
        """What is signed."""
        return hashlib.sha256(json.dumps(self.parts(), sort_keys=True).encode()).digest()

    def signed(self, identity: Identity) -> Charter:
        """With one member's signature. Raises CharterError where the identity is no member's."""
        member = self.members[self.index_of(identity.id)]
        own = Signature(certificate=identity.certificate_pem.decode(), signature=identity.sign(self.digest()))
        return self.model_copy(update={"signatures": {**self.signatures, member.name: own}})

    def index_of(self, id: str) -> int:
        """A member's place. Raises CharterError where there is none of that id."""
        for index, member in enumerate(self.members):
            if member.id == id:
                return index
        names = ", ".join(member.name for member in self.members)
        raise CharterError(
            f"charter: no member has the id {id}; the members are {names}; use the identity that was given for this"
            " charter (--identity), or have a new one written"
        )

    def certificate(self, index: int) -> bytes:
        return self.signatures[self.members[index].name].certificate.encode()

    def check(self, today: date | None = None) -> None:
        """Refuse a charter that does not hold: expired, of another version, unsigned by someone, or altered.

        Raises:
            CharterError: it says which, and by whom.
        """
        self.check_validity(today)
        if missing := self.unsigned():
            have = "has" if len(missing) == 1 else "have"
            raise CharterError(
                f"charter: {', '.join(missing)} {have} not signed it; there: `peertune charter sign CHARTER.toml`"
            )
        self.check_signatures()

    def check_validity(self, today: date | None = None) -> None:
        """Raises CharterError where it has expired, or is for another version."""
        today = today or datetime.now(UTC).date()
        if today > self.expires:
            raise CharterError(
                f"charter: expired on {self.expires}; write a new one and have it signed; a run that has begun goes on"
                " with it, once all sites join with it and their old --out"
            )
        if self.quorum > len(self.members):
            raise CharterError(
                f"charter: its quorum is {self.quorum}, expected at most its {len(self.members)} members, or the run"
                " would wait for ever; write a new one"
            )
        if self.version != (here := code_version(self._method())):
            raise CharterError(f"charter: is for peertune {self.version}, this is {here}; all sites need the same")

    def _method(self) -> str:
        """The recipe's method; empty where it names none, which `config` refuses."""
        section = self.recipe.get("algorithm")
        return str(section.get("name", "")) if isinstance(section, dict) else ""

    def check_signatures(self, what: str = "charter", *, but: str = "") -> None:
        """Refuse signatures that do not hold; who has not signed yet is passed over.

        Args:
            what: begins the message.
            but: id of a member whose signature is not looked at.
        Raises:
            CharterError: it says whose does not, and why.
        """
        for member in self.members:
            found = self.signatures.get(member.name)
            if found is None or member.id == but:
                continue
            certificate = found.certificate.encode()
            if certificate_id(certificate) != member.id:
                raise CharterError(
                    f"{what}: {member.name}'s signature is by another key than its id says; ask who wrote it"
                )
            if not is_own(certificate):
                raise CharterError(
                    f"{what}: {member.name}'s certificate is not the one its key came with; have it signed anew"
                )
            if not is_signed(certificate, found.signature, self.digest()):
                raise CharterError(
                    f"{what}: it was altered after {member.name} signed it; get the file anew that was signed, or"
                    " delete its signatures and have the whole of it signed again"
                )

    def unsigned(self) -> list[str]:
        """Names of the members of whom there is no signature."""
        return [member.name for member in self.members if member.name not in self.signatures]

    def config(self, methods: Methods) -> RunConfig:
        """The recipe, with the sites' own keys at their defaults, whatever the charter says of them."""
        return from_dict(_without_own(self.recipe), methods)[0]


def shared_recipe(config: RunConfig, *, with_path: bool) -> dict[str, Any]:
    """A recipe without the keys that are each site's own, and without empty values, which TOML has not.

    Args:
        with_path: keep model.path, as it means the same everywhere.
    """
    tree = _without_own(config.model_dump(mode="json", exclude_none=True))
    if not with_path:
        del tree["model"]["path"]
    return tree


def parse_member(text: str) -> Member:
    """NAME=ID, NAME=ID@HOST:PORT, and either with #SAMPLES at its end. Raises CharterError."""
    name, _, rest = text.partition("=")
    rest, _, samples = rest.partition("#")
    id, _, address = rest.partition("@")
    try:
        return Member(name=name, id=id, address=address, samples=int(samples or 0))
    except (ValidationError, ValueError):
        raise CharterError(
            f"--member: got {text!r}, expected NAME=ID, NAME=ID@HOST:PORT or NAME=ID@HOST:PORT#SAMPLES, with the"
            " ID that `peertune keygen` printed, and an IPv6 address in brackets"
        ) from None


def check_members(members: Sequence[Member], num_members: int, edges: Sequence[tuple[int, int]]) -> None:
    """Refuse members that the recipe's graph cannot connect.

    Args:
        num_members: of the recipe, a server included.
        edges: pairs of members that exchange messages.
    Raises:
        CharterError: too many or too few, a name, id or address twice, an address that leads nowhere, or an edge with
            no end that can be reached.
    """
    if len(members) != num_members:
        raise CharterError(
            f"--member: got {len(members)} members for a recipe of {num_members} (run.num_peers, and a server, the"
            " last, where the method has one); name all of them, or set --set run.num_peers"
        )
    for key in ("name", "id", "address"):
        values = [getattr(member, key) for member in members]
        twice = next((value for value in values if value and values.count(value) > 1), None)
        if twice is not None:
            raise CharterError(f"--member: {key} {twice} stands there twice; every member needs its own")
    everywhere = next((m for m in members if m.address.rpartition(":")[0] in ("0.0.0.0", "[::]")), None)
    if everywhere is not None:
        raise CharterError(
            f"--member: {everywhere.name} has the address {everywhere.address}, at which a machine listens, but which"
            " leads others to themselves; give the name or address that others reach it by"
        )
    for i, j in edges:
        if not members[i].address and not members[j].address:
            raise CharterError(
                f"--member: {members[i].name} and {members[j].name} are neighbours, and neither has an address; give"
                " one of them HOST:PORT, or choose another graph"
            )


def sample_counts(members: Sequence[Member], num_peers: int) -> list[int]:
    """Samples by peer, for a W that is made of them; 1 for one who is not there, or does not say."""
    told = [member.samples or 1 for member in members[:num_peers]]
    return told + [1] * (num_peers - len(told))


def read_charter(path: Path) -> Charter:
    """Read a charter; `check` says whether it holds. Raises CharterError."""
    tree: dict[str, Any] = {}
    try:
        tree = parse_toml(path.read_text(encoding="utf-8"))
        return Charter.model_validate(tree)
    except FileNotFoundError:
        raise CharterError(f"{path}: no such charter; `peertune charter new` writes one") from None
    except ValidationError as error:
        told, here = text(tree.get("version"), 40), code_version("")
        if told and told.partition(" ")[0] != here:
            raise CharterError(
                f"{path}: is for peertune {told}, this is {here}, which cannot read it; all sites need the same"
            ) from None
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        advice = "get the file anew from whoever wrote it"
        if "members" not in tree:
            advice = "this is no charter; `peertune charter new` makes one of a recipe"
        raise CharterError(f"{path}: {place}: {problem['msg']}; {advice}") from None
    except ValueError as error:
        raise CharterError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise CharterError(f"{path}: cannot be read: {error.strerror}") from None


def write_charter(charter: Charter, path: Path) -> None:
    """Raises CharterError where it cannot be written."""
    try:
        write_atomically(path, tomli_w.dumps(charter.model_dump(), multiline_strings=True))
    except OSError as error:
        raise CharterError(f"{path}: cannot be written: {error.strerror}; name another place") from error


def difference(mine: Charter, theirs: Mapping[str, str], pieces: object = "") -> str:
    """Names of the keys in which two charters differ; empty: none.

    Args:
        theirs: the other's `parts`: whether and where they differ.
        pieces: the other's `piece_hashes`; of a part whose key cannot be told by them, as where they are missing or
            none of ours, the part is named.
    """
    own, known, keys = mine.parts(), _told(pieces), mine.pieces()
    differing = {key for key, hash in keys.items() if hash not in known} if known & {*keys.values()} else set()
    found: list[str] = []
    for part in sorted(own.keys() | theirs.keys()):
        if own.get(part) != theirs.get(part):
            found += sorted(key for key in differing if key.partition(".")[0] == part) or [text(part, 40)]
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more


def piece_hashes(charter: Charter) -> str:
    """What a site tells another of its charter's `pieces`: their hashes, one after the other."""
    return "".join(charter.pieces().values())


def _told(pieces: object) -> set[str]:
    text = pieces[: MAX_PIECES * PIECE] if isinstance(pieces, str) else ""
    return {text[start : start + PIECE] for start in range(0, len(text), PIECE)}


def _short_hash(key: str, value: Any) -> str:
    return hashlib.sha256(f"{key}={json.dumps(value, sort_keys=True)}".encode()).hexdigest()[:PIECE]


def _without_own(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without `OWN_KEYS`; what is no section stays as it is."""
    return {
        section: {key: value for key, value in keys.items() if key not in OWN_KEYS.get(section, ())}
        if isinstance(keys, Mapping)
        else keys
        for section, keys in recipe.items()
    }
