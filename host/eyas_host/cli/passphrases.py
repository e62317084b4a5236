"""Passphrases of keys: from a file, from the environment, or asked for on the terminal."""

from __future__ import annotations

import getpass
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from eyas_host.cli.options import KIT

if TYPE_CHECKING:
    from eyas_host.fleet.updates.repository import Repository


def passphrases(file: Path | None) -> Callable[[str, bool], str] | None:
    """A function that gives the passphrase of a key by its name; None where nobody can be asked."""
    from eyas_host.fleet.updates.keys import given_passphrase

    given = given_passphrase(file)
    if given is not None:
        return lambda name, new: given
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return None
    return _Terminal().ask


def open_repository(kit: Path | None, file: Path | None, folders: list[Path] | None) -> Repository:
    """The kit's repository with the keys and passphrases that were given."""
    from eyas_host.fleet.updates.repository import Repository

    return Repository(KIT if kit is None else kit, ask=passphrases(file), key_folders=tuple(folders or ()))


class _Terminal:
    """Asks on the terminal; an empty answer repeats the last passphrase."""

    def __init__(self) -> None:
        self._last = ""

    def ask(self, name: str, new: bool) -> str:
        again = " (empty: the same again)" if self._last else ""
        answer = getpass.getpass(f"{'New passphrase' if new else 'Passphrase'} of {name}{again}: ", sys.stderr)
        answer = answer or self._last
        if new and answer != self._last and getpass.getpass("Repeat it: ", sys.stderr) != answer:
            typer.echo("they differ", err=True)
            return self.ask(name, new)
        self._last = answer
        return answer
