"""`eyas keys`: create, show and replace the keys that sign releases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.support.logs import show as say
from eyas_device.support.streams import to_json
from eyas_host.cli.options import KIT, KeysOption, KitOption, PassphraseFile, kit_option

if TYPE_CHECKING:
    from eyas_host.fleet.updates.ceremony import Signed


def init(
    kit: KitOption = None,
    root_keys: Annotated[int, typer.Option(min=1, max=9, help="Number of the root's keys.")] = 3,
    threshold: Annotated[int, typer.Option(min=1, max=9, help="How many of them have to sign a new root.")] = 2,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Create the keys and the empty repository of a kit."""
    from eyas_host.cli.passphrases import passphrases
    from eyas_host.fleet.updates.ceremony import create
    from eyas_host.fleet.updates.keys import SigningError

    folder = KIT if kit is None else kit
    ask = passphrases(passphrase_file)
    if ask is None:
        raise SigningError("the keys need a passphrase: give --passphrase-file, or set EYAS_KEY_PASSPHRASE")
    repository = create(folder, ask, root_keys=root_keys, threshold=threshold)
    option = kit_option(folder)
    say(f"{repository.folder}: the repository, to be served to devices or copied to a stick")
    say(f"{repository.keys.folder}: its keys, never to be served")
    say("move root-*.pem to sticks that lie in different places, and targets-*.pem off the server; keep copies")
    say(f"next: eyas enroll NAME --camera SPEC --update-url URL{option}, then eyas publish BUNDLE{option}")


def show(
    kit: KitOption = None,
    keys: KeysOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the keys: what each signs, where it lies, and when what it signed expires."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.inventory import list_keys

    rows = list_keys(open_repository(kit, None, keys))
    if json:
        print(to_json(rows, sys.stdout))
        return
    for row in rows:
        expires = f"expires in {row.expires_days:.0f} days" if row.expires_days is not None else ""
        say(f"{row.name:<12} {row.id[:8]}  {row.place or 'not here':<40} {row.needed:<8} {expires}".rstrip())


def rotate(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="Keys to replace, as `eyas keys show` names them; online: all that lie on the server; root: none, the "
            "root is only renewed.",
        ),
    ],
    kit: KitOption = None,
    keys: KeysOption = None,
    uri: Annotated[
        str, typer.Option(metavar="URI", help="Take a key that lies in a device or service, e.g. hsm:2, not a new one.")
    ] = "",
    public: Annotated[Path | None, typer.Option("--public", metavar="FILE", help="Its public part, PEM.")] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Replace keys by new ones, and sign again what the old ones had signed."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.ceremony import rotate as run

    repository = open_repository(kit, passphrase_file, keys)
    result = run(repository, names, uri=uri, public=public)
    _show_result(result, kit, f"{', '.join(names)} replaced")


def sign(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Root that waits, on a machine without the kit.", show_default=False),
    ] = None,
    kit: KitOption = None,
    keys: KeysOption = None,
    key: Annotated[
        list[Path] | None, typer.Option("--key", metavar="PEM", help="Of FILE: private key that signs; repeatable.")
    ] = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Add signatures to a root that waits for them."""
    from eyas_host.cli.passphrases import open_repository, passphrases
    from eyas_host.fleet.updates.ceremony import sign as run
    from eyas_host.fleet.updates.ceremony import sign_file
    from eyas_host.fleet.updates.keys import SigningError

    if file is not None or key:
        if file is None or not key:
            raise SigningError("FILE and --key PEM belong together; without both, the kit's own waiting root is signed")
        signed = sign_file(file, key, passphrases(passphrase_file))
        say(f"{file}: signed by {', '.join(one[:8] for one in signed)}; bring it back into the kit's keys/pending/")
        return
    _show_result(run(open_repository(kit, passphrase_file, keys)), kit, "signed")


def _show_result(result: Signed, kit: Path | None, done: str) -> None:
    if result.pending is None:
        say(f"{done}; root version {result.version} is published" if result.version else done)
        return
    option = kit_option(KIT if kit is None else kit)
    say(f"{result.pending}: waits for {result.missing} more of {', '.join(result.candidates)}")
    say(f"where the key is at hand: eyas keys sign{option} --keys DIR, or elsewhere: eyas keys sign FILE --key PEM")
