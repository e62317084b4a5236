"""The options of a connection are those of the device; earlier names are answered with the present ones."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from typer.main import get_command

from eyas_device.telemetry.tls import Security
from eyas_host.cli.app import RENAMED_OPTIONS, app
from tests.support.inside import eyas

CONNECTING = ("forget", "collect", "watch")


def options(verb: str) -> set[str]:
    """The options of a verb."""
    command = get_command(app).commands[verb]  # type: ignore[attr-defined]
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("verb", CONNECTING)
def test_a_verb_that_connects_has_the_options_of_the_device(verb: str) -> None:
    keys = {field.name for field in msgspec.structs.fields(Security)} | {"broker", "insecure"}
    assert {f"--{key.replace('_', '-')}" for key in keys} <= options(verb)


@pytest.mark.parametrize("verb", CONNECTING)
def test_an_earlier_name_is_answered_with_the_present_one(verb: str, tmp_path: Path) -> None:
    for words in (["--cert", "x"], ["--cert=x"]):
        done = eyas(tmp_path, verb, *words)
        assert done == (2, "", f"eyas: {verb}: --cert is now {RENAMED_OPTIONS['--cert']}\n")


@pytest.mark.parametrize("verb", CONNECTING)
def test_a_password_without_tls_has_to_be_accepted(verb: str, tmp_path: Path) -> None:
    name = ["cam-7"] if verb == "forget" else []
    done = eyas(tmp_path, verb, *name, "--broker", "127.0.0.1:1", "--user", "me")
    assert done.code == 2 and "--insecure" in done.err and done.err.count("\n") == 1, done.err
