"""The commands of a site in a consortium: keygen, charter, doctor, join, leave, eject (docs/consortium.md)."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from peertune.cli.output import Bars, add_command, add_number, add_set, print_paths, print_summary
from peertune.logfields import printable

if TYPE_CHECKING:
    from peertune.site import SiteOptions


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a date such as 2030-12-31") from None


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected seconds above 0")
    return value


def _wait(text: str) -> float:
    return 0.0 if text == "0" else _seconds(text)


def add_consortium(commands: Any) -> None:
    """Add them to the parser."""

    def own(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--identity", metavar="DIR", help="folder of this site's key; default: ~/.peertune")

    def site(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("charter", metavar="CHARTER.toml", help="as all have signed it")
        parser.add_argument("--data", metavar="FILE", help="this site's training data; a server has none")
        parser.add_argument("--test", metavar="FILE", help="its held-out data")
        parser.add_argument(
            "--out", default="runs/consortium", metavar="DIR", help="folder of the run; default: runs/consortium"
        )
        parser.add_argument(
            "--listen",
            metavar="HOST:PORT",
            help="where to accept connections; default: the port of this site's address in the charter",
        )
        parser.add_argument("--model", metavar="PATH", help="where the base lies here, if the charter does not name it")
        add_set(parser, "a key of this site's own, such as data.text_field=note")
        own(parser)

    keygen = add_command(commands, "keygen", help="make this site's key and print its id, for a charter")
    own(keygen)
    keygen.set_defaults(command=_keygen)

    charter = add_command(commands, "charter", help="what the sites of a consortium agree on: write it, sign it")
    actions = charter.add_subparsers(required=True, metavar="ACTION")
    new = add_command(actions, "new", help="write a charter for a recipe and its members", allow_abbrev=False)
    new.add_argument("recipe", metavar="RECIPE.toml", help="what all train and how; its data paths are left out")
    new.add_argument(
        "--member",
        action="append",
        required=True,
        metavar="NAME=ID[@HOST:PORT][#SAMPLES]",
        help="one each, in the peers' order; ID: what keygen printed there",
    )
    add_set(new, "override a key")
    new.add_argument("--expires", type=_date, required=True, metavar="YYYY-MM-DD", help="last day it is valid")
    new.add_argument(
        "--grace",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="seconds that a site out of reach is waited for; default: 600",
    )
    add_number(new, "--quorum", 1, 1, "wait while fewer members are there; default: 1")
    new.add_argument(
        "--stall",
        type=_seconds,
        default=30.0,
        metavar="S",
        help="seconds without a byte after which a connection is given up and dialled anew: one who falls silent, but"
        " whose connection stays open, is waited for so long or --grace, whichever is larger; a line has to carry 64 kB"
        " within it; default: 30",
    )
    new.add_argument("--to", default="charter.toml", metavar="FILE", help="default: charter.toml")
    new.set_defaults(command=_charter_new)
    sign = add_command(actions, "sign", help="add this site's signature")
    sign.add_argument("charter", metavar="CHARTER.toml", help="signed in place")
    sign.add_argument("copies", nargs="*", metavar="COPY.toml", help="others' copies of it, to take signatures from")
    own(sign)
    sign.set_defaults(command=_charter_sign)

    doctor = add_command(commands, "doctor", help="what stands between this site and a join", allow_abbrev=False)
    site(doctor)
    doctor.add_argument(
        "--wait",
        type=_wait,
        default=60.0,
        metavar="S",
        help="seconds that neighbours are waited for; 0: ask each once; default: 60",
    )
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    doctor.set_defaults(command=_doctor)

    join = add_command(
        commands, "join", help="take part in a charter's run; the same command goes on", allow_abbrev=False
    )
    site(join)
    hint = "; the same command goes on (`peertune leave DIR` ends it in good order, and nobody has to wait)"
    join.set_defaults(command=_join, goes_on=hint)

    eject = add_command(
        commands, "eject", help="sign that a member is put out of the run; it needs more than half of all"
    )
    eject.add_argument("charter", metavar="CHARTER.toml", help="the run's; what is signed lies beside it")
    eject.add_argument("member", metavar="MEMBER", help="name or id")
    own(eject)
    eject.set_defaults(command=_eject)

    leave = add_command(commands, "leave", help="have this site leave its run in good order; `join` brings it back")
    leave.add_argument("run", metavar="DIR", help="folder of the run")
    leave.set_defaults(command=_leave)


def _keygen(options: argparse.Namespace, console: Console) -> None:
    from peertune.identity import make_identity

    print(make_identity(_identity(options)).id)


def _charter_new(options: argparse.Namespace, console: Console) -> None:
    from peertune.charter import parse_member
    from peertune.consortium import new_charter

    members = [parse_member(text) for text in options.member]
    recipe, to = Path(options.recipe), Path(options.to)
    limits = (options.grace, options.quorum, options.stall)
    new_charter(recipe, options.set, members, options.expires, to, *limits, Bars(console).note)
    print(f"{to}: now let every member sign it: peertune charter sign {to}")


def _charter_sign(options: argparse.Namespace, console: Console) -> None:
    from peertune.consortium import sign_charter

    path = Path(options.charter)
    charter = sign_charter(path, _identity(options), [Path(copy) for copy in options.copies])
    missing = charter.unsigned()
    signed = [member.name for member in charter.members if member.name not in missing]
    print(f"{path}: signed by {', '.join(signed)}; missing: {', '.join(missing) or 'nobody'}")


def _eject(options: argparse.Namespace, console: Console) -> None:
    from peertune.consortium import eject

    print(eject(Path(options.charter), options.member, _identity(options)))


def _leave(options: argparse.Namespace, console: Console) -> None:
    from peertune.consortium import leave

    leave(Path(options.run))
    print(f"{options.run}: leaves at the end of its round; the same `peertune join` command comes back")


def _identity(options: argparse.Namespace) -> Path:
    from peertune.identity import default_folder

    return Path(options.identity) if options.identity else default_folder()


def _site(options: argparse.Namespace) -> SiteOptions:
    from peertune.site import SiteOptions

    return SiteOptions(
        charter=Path(options.charter),
        identity=_identity(options),
        out=Path(options.out),
        train=options.data or "",
        test=options.test or "",
        listen=options.listen or "",
        model=options.model or "",
        overrides=options.set,
    )


def _doctor(options: argparse.Namespace, console: Console) -> None:
    from peertune.doctor import Finding, examine
    from peertune.errors import PeertuneError

    def tell(finding: Finding) -> None:
        if not options.json:
            print(printable(str(finding)), flush=True)

    findings = examine(_site(options), wait_s=options.wait, tell=tell)
    if options.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    problems = [finding.check for finding in findings if finding.mark == "problem"]
    if problems:
        raise PeertuneError(f"doctor: {len(problems)} of {len(findings)} checks found a problem: {', '.join(problems)}")


def _join(options: argparse.Namespace, console: Console) -> None:
    from peertune.consortium import join

    with Bars(console) as bars:
        summary = join(_site(options), bars)
    print_summary(summary)
    print_paths(Path(options.out))
