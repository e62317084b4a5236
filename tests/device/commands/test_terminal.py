"""What comes from files, names and brokers cannot control the terminal, whatever verb shows it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.bundle import MANIFEST
from eyas_device.cli import main

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2028\r\n\x7f"
"""Clears the screen, sets the title, colours, turns the direction of writing, ends lines."""


def harmless(text: str) -> bool:
    """Whether a terminal only prints the text."""
    return all(line.isprintable() for line in text.split("\n"))


def put(tree: Any, path: tuple[str | int, ...], value: str) -> None:
    """Set a value, or rename a key where the path ends with "*"."""
    for key in path[:-1]:
        tree = tree[key]
    if path[-1] == "*":
        tree[value] = tree.pop(next(iter(tree)))
    else:
        tree[path[-1]] = value


FIELDS: dict[str, tuple[str | int, ...]] = {
    "name": ("name",),
    "version": ("version",),
    "label": ("labels", 0),
    "decision": ("decision",),
    "notice": ("notices", 0),
    "reason": ("reasons", "*"),
    "evidence": ("evidence", "litert-fp32", "*"),
    "artefact": ("artefacts", 0, "name"),
    "runtime": ("artefacts", 0, "runtime"),
    "precision": ("artefacts", 0, "precision"),
    "file": ("artefacts", 0, "files", 0, "path"),
    "digest": ("artefacts", 0, "files", 0, "sha256"),
    "colour": ("preprocessing", "fit"),
}


def manifest_of(bundle: Path) -> dict[str, Any]:
    """The bundle's manifest, with something in every place that text may be."""
    tree: dict[str, Any] = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    tree["notices"], tree["reasons"] = ["notice"], {"litert": "why"}
    tree["evidence"] = {"litert-fp32": {"accuracy": 0.5}}
    return tree


@pytest.fixture(scope="module")
def copied(pristine_bundle: Path) -> Iterator[Path]:
    """A bundle whose manifest may be overwritten."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(pristine_bundle, Path(folder) / "bundle"))


@pytest.fixture
def shown(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls a verb and returns all that it printed."""

    def call(*words: object) -> str:
        main(list(map(str, words)))
        return "".join(capfd.readouterr())

    return call


@pytest.mark.parametrize("field", list(FIELDS))
def test_no_text_of_a_manifest_reaches_the_terminal_raw(
    field: str, copied: Path, pristine_bundle: Path, shown: Callable[..., str], tmp_path: Path
) -> None:
    tree = manifest_of(pristine_bundle)
    put(tree, FIELDS[field], f"before{EVIL}after")
    (copied / MANIFEST).write_bytes(msgspec.json.encode(tree))
    for words in (
        ("info", copied),
        ("check", copied),
        ("run", "--bundle", copied, "--camera", "fake:?frames=2"),
        ("snapshot", "--bundle", copied, "--camera", "fake:?frames=2", "--out", tmp_path / "out"),
        ("install", copied, "--state", tmp_path / "state"),
    ):
        text = shown(*words)
        assert text and harmless(text), (words[0], text)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(sorted(FIELDS)), text=st.text(st.characters(categories=["Cc", "Cf", "Zl", "L"]), min_size=1)
)
def test_any_text_of_a_manifest(
    field: str, text: str, copied: Path, pristine_bundle: Path, shown: Callable[..., str]
) -> None:
    tree = manifest_of(pristine_bundle)
    put(tree, FIELDS[field], text)
    (copied / MANIFEST).write_bytes(msgspec.json.encode(tree))
    for words in (("info", copied), ("info", "--json", copied)):
        assert harmless(shown(*words))


@pytest.mark.parametrize(
    "words",
    [
        "info PATH",
        "check PATH",
        "install PATH --state STATE",
        "slots --state PATH",
        "status --state PATH",
        "reload --state PATH",
        "doctor --config PATH",
        "run --config PATH",
        "run --bundle PATH --camera fake:",
        "run --bundle BUNDLE --camera folder:PATH",
        "run --bundle BUNDLE --camera PATH",
        "run --bundle BUNDLE --camera fake: --runtime PATH",
        "run --bundle BUNDLE --camera fake: --artefact PATH",
        "run --bundle BUNDLE --camera fake: --broker PATH",
        "run --bundle BUNDLE --camera fake: --name PATH",
        "run PATH",
        "PATH",
        "snapshot --bundle BUNDLE --camera folder:IMAGES --out OUT",
        "run --bundle BUNDLE --camera folder:IMAGES --json",
        "run --bundle BUNDLE --camera folder:IMAGES --accuracy",
    ],
)
def test_names_of_files_and_words_of_the_command_line(
    words: str, pristine_bundle: Path, shown: Callable[..., str], tmp_path: Path
) -> None:
    images = tmp_path / "images" / f"x{EVIL}"
    images.mkdir(parents=True)
    (images / f"a{EVIL}.png").write_bytes(b"no image")
    places = {"PATH": tmp_path / f"x{EVIL}", "IMAGES": images.parent, "BUNDLE": pristine_bundle}
    places |= {"STATE": tmp_path / "state", "OUT": tmp_path / "out"}
    text = shown(
        *(next((word.replace(k, str(v)) for k, v in places.items() if k in word), word) for word in words.split())
    )
    assert text and harmless(text), text


def test_values_of_the_configuration(shown: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    for section, key in (("device", "name"), ("camera", "source"), ("telemetry", "broker"), ("x", "y")):
        path.write_bytes(msgspec.toml.encode({section: {key: EVIL, f"k{EVIL}": EVIL}}))
        for verb in ("run", "doctor"):
            text = shown(verb, "--config", path)
            assert text and harmless(text), text
