"""Options and the keys of the configuration have one name; earlier names are answered with the present ones."""

from __future__ import annotations

import argparse

import msgspec
import pytest

from eyas_device.cli import RENAMED_OPTIONS, VERBS, _parser, main
from eyas_device.config import Config, TelemetrySection
from eyas_device.telemetry.tls import Security

MAIN_KEYS = {"--camera": "source"}
"""Option that has the name of its section -> the key that it sets."""
OF_THE_VERB = {
    "run": {"--frames", "--loop", "--accuracy"},
    "check": set[str](),
    "info": set[str](),
    "bench": {"--all", "--blocks", "--burst", "--choose", "--compare", "--seconds", "--sustained"},
    "doctor": set[str](),
    "snapshot": {"--every", "--frames", "--out"},
    "install": set[str](),
    "update": {"--agent", "--check", "--from", "--now", "--status", "--watch"},
    "slots": {"--roll-back"},
    "reload": {"--timeout"},
    "status": {"--timeout"},
    "service": {"--agent-updates", "--dry-run", "--now"},
}
"""Options that are about one run of a verb and so have no key."""
ALWAYS = {"--help", "--config", "--json"}
CONNECTING = ("run", "doctor")
KEYS = {
    field.name
    for section in msgspec.structs.fields(Config)
    if section.name != "output"
    for field in msgspec.structs.fields(type(getattr(Config(), section.name)))
}


def options(verb: str) -> set[str]:
    """The long options of a verb."""
    (verbs,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    return {option for option in verbs.choices[verb]._option_string_actions if option.startswith("--")}


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_that_overrides_a_key_has_its_name(verb: str) -> None:
    assert OF_THE_VERB[verb] <= options(verb)
    overriding = options(verb) - OF_THE_VERB[verb] - ALWAYS
    assert {MAIN_KEYS.get(one, one[2:].replace("-", "_")) for one in overriding} <= KEYS


@pytest.mark.parametrize("verb", CONNECTING)
def test_every_key_of_a_connection_has_an_option(verb: str) -> None:
    keys = {field.name for field in msgspec.structs.fields(Security)} | {"broker", "insecure"}
    assert keys <= {field.name for field in msgspec.structs.fields(TelemetrySection)}
    assert {f"--{key.replace('_', '-')}" for key in (*keys, "site", "name")} <= options(verb)


@pytest.mark.parametrize("old", list(RENAMED_OPTIONS))
def test_an_earlier_name_is_answered_with_the_present_one(old: str, capfd: pytest.CaptureFixture[str]) -> None:
    new = RENAMED_OPTIONS[old]
    assert new in options("run") and old not in options("run")
    for words in ([old, "1"], [f"{old}=1"]):
        assert main(["run", *words]) == 2
        out, err = capfd.readouterr()
        assert out == "" and f"; {old} is now {new} (see" in err and err.count("\n") == 1


def test_no_option_is_abbreviated(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--certif", "x"]) == 2
    assert "did you mean --certificate?" in capfd.readouterr().err
