"""No verb looks a server up, connects to one that was not named, or leaves a file outside its folders."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from eyas_device.cli import VERBS as ALL
from eyas_device.updates.slots import Slots
from tests.support.audited import Audit, Audited, audited, remote, written
from tests.support.fleet_parts import wait_until
from tests.support.repositories import make_repository

VERBS = {
    "check": ("check", "{bundle}"),
    "info": ("info", "{bundle}"),
    "run on litert": ("run", "--bundle", "{bundle}", "--camera", "fake:?frames=3", "--runtime", "litert"),
    "run on openvino": ("run", "--bundle", "{bundle}", "--camera", "fake:?frames=3", "--runtime", "openvino"),
    "run on onnx": ("run", "--bundle", "{bundle}", "--camera", "fake:?frames=3", "--runtime", "onnx"),
    "blocks": (
        *("bench", "--bundle", "{bundle}", "--runtime", "openvino", "--seconds", "0.1"),
        "--blocks",
        "{folder}/b.json",
    ),
    "doctor": ("doctor", "--bundle", "{bundle}", "--camera", "fake:?frames=3"),
    "install": ("install", "{bundle}", "--state", "{state}"),
    "service": ("service", "install", "--dry-run"),
    "update": ("update", "--from", "{folder}/repository", "--config", "{folder}/update.toml"),
    "slots": ("slots", "--state", "{state}"),
    "snapshot": ("snapshot", "--camera", "fake:?frames=1", "--bundle", "{bundle}", "--out", "{folder}/out"),
}

BESIDE_AN_AGENT = {"status": ("status", "--state", "{state}"), "reload": ("reload", "--state", "{state}")}
"""Verbs that ask the running agent."""


def test_every_verb_is_here() -> None:
    assert {words[0] for words in (*VERBS.values(), *BESIDE_AN_AGENT.values())} == set(ALL)


def run(folder: Path, home: Path, bundle: Path, verb: str) -> Audited:
    state = folder / "state"
    state.mkdir(exist_ok=True)
    if verb == "update":
        stick(folder, bundle)
    words = [word.format(bundle=bundle, state=state, folder=folder) for word in VERBS[verb]]
    return audited(folder, "eyas_device", *words, home=home)


def stick(folder: Path, bundle: Path) -> None:
    """A signed repository in a folder, and a device that follows it."""
    repository = make_repository(folder / "kit")
    repository.publish(bundle, channel="stable")
    shutil.copytree(repository.folder, folder / "repository")
    (folder / "root.json").write_bytes(repository.root())
    (folder / "update.toml").write_text(
        f'[device]\nstate = "{folder}/state"\n[update]\nmodel = "tiny-shapes"\nroot = "{folder}/root.json"\n'
    )


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_asks_nobody_and_leaves_nothing(verb: str, pristine_bundle: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    done = run(tmp_path, home, pristine_bundle, verb)
    # The doctor finds a machine without a service, and without systemd there cannot be one.
    assert done.code in (0, 1) or (verb == "service" and "systemd does not run here" in done.output), done.output
    assert done.lookups == []
    assert list(home.iterdir()) == []
    assert [path for path in done.written if not (_is_ours(path, tmp_path) or _is_nameless(path))] == []


def test_the_agent_and_those_who_ask_it_ask_nobody_else(pristine_bundle: Path, tmp_path: Path) -> None:
    home, state = tmp_path / "home", tmp_path / "state"
    home.mkdir()
    Slots(state).install(pristine_bundle)
    config = tmp_path / "device.toml"
    config.write_text(f'[device]\nstate = "{state}"\n[camera]\nsource = "fake:?live=1&fps=5&frames=100000"\n')
    audit = Audit(tmp_path, home)
    agent = audit.start("eyas_device", "run", "--config", config)
    try:
        wait_until(lambda: (state / "agent.json").exists() or agent.poll() is not None, 60)
        for words in BESIDE_AN_AGENT.values():
            done = audit.run("eyas_device", *(word.format(state=state) for word in words))
            assert done.code == 0, done.output
    finally:
        agent.terminate()
        agent.wait(60)
    lines = audit.lines()
    assert any(line.startswith("connect") for line in lines) and remote(lines) == []
    assert list(home.iterdir()) == []
    assert [path for path in written(lines) if not _is_ours(path, tmp_path)] == []


@pytest.mark.parametrize("home", ["/dev/null", "/nonexistent/home"])
def test_a_user_without_a_home_folder(home: str, pristine_bundle: Path, tmp_path: Path) -> None:
    done = run(tmp_path, Path(home), pristine_bundle, "check")
    assert done.code == 0, done.output
    assert "Traceback" not in done.output


def _is_nameless(path: Path) -> bool:
    """Whether it was a temporary file without a name, as TUF's client takes for each download, or its folder."""
    temporary = Path(tempfile.gettempdir())
    return path == temporary or (path.parent == temporary and not path.exists())


def _is_ours(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) or path.is_relative_to("/dev") or path.is_relative_to("/proc")
