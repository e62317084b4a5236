"""Bring Eyas to a board by its own command, from wheels that are downloaded once and kept beside the image."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST
from eyas_device.updates import unpack
from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.connect.wheels import build_wheel, constraints, fetch
from tests.support.bundles import edit, entry, record_settings
from tests.support.paths import ROOT

from .machine import Board, Computer, cache

DEVICE = "board"
"""The name that `device_toml` gives it."""
FLASH_S = 900
"""How long a first flash may take where other programs use the processor."""
_BOARD = DeviceFacts(machine="aarch64", glibc="glibc 2.36", python_version="3.11.2")
_ARTEFACT = "litert-int8"
_PARTS, _PACKAGES = "/root/wheels", "/usr/local/lib/python3.11/dist-packages"
"""On a board: where wheels go for a moment, and where its own Python looks for packages."""


def wheel_folder(facts: DeviceFacts = _BOARD) -> Path:
    """The dependencies of `eyas-device` as wheels for the board; the wheel of `eyas-device` is built by each flash."""
    recipe = (ROOT / "device/pyproject.toml").read_bytes() + constraints(facts).read_bytes()
    recipe += b"" if facts is _BOARD else msgspec.json.encode(facts)
    folder = cache() / f"wheels-{hashlib.sha256(recipe).hexdigest()[:16]}"
    if not folder.is_dir():
        cache().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache(), prefix="wheels-", suffix=".part") as part:
            (place := Path(part, "wheels")).mkdir()
            fetch(place, build_wheel(Path(part)), facts)
            for own in place.glob("eyas_device-*.whl"):
                own.unlink()
            with suppress(FileExistsError):  # another process was faster
                place.rename(folder)
    return folder


def freeze_wheels(folder: Path, facts: DeviceFacts = _BOARD) -> None:
    """Put all wheels into a folder, that of `eyas-device` as it is now: all flashes from it are of one environment."""
    shutil.copytree(wheel_folder(facts), folder, dirs_exist_ok=True)
    build_wheel(folder)


def frozen_wheels(folder: Path) -> Path:
    """The folder that an earlier run has filled so, or this one does."""
    if not folder.is_dir():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        freeze_wheels(part)
        part.rename(folder)
    return folder


def add_packages(board: Board, wheels: Path) -> None:
    """Unpack all wheels but that of `eyas-device` where the board's own Python finds them, compiled."""
    board.put(Path(unpack.__file__), f"{_PARTS}/unpack.py")
    for wheel in wheels.glob("*.whl"):
        if not wheel.name.startswith("eyas_device-"):
            board.put(wheel, f"{_PARTS}/{wheel.name}")
    board.run(f"mkdir -p {_PACKAGES} && python3 {_PARTS}/unpack.py {_PARTS}/*.whl && rm -r {_PARTS}", timeout=FLASH_S)
    board.run("python3 -c 'import cv2, msgspec, paho.mqtt.client, ai_edge_litert.interpreter'", timeout=FLASH_S)


def crashing_wheels(wheels: Path, folder: Path) -> Path:
    """The same wheels, with an agent that dies of a segmentation fault when it opens its model."""
    crash = """
import os, signal
ModelSwitch.open_first = lambda *_, **__: os.kill(os.getpid(), signal.SIGSEGV)
"""
    shutil.copytree(wheels, folder, ignore=shutil.ignore_patterns("eyas_device-*"))
    [own] = wheels.glob("eyas_device-*.whl")
    with zipfile.ZipFile(own) as sound, zipfile.ZipFile(folder / own.name, "w", zipfile.ZIP_DEFLATED) as crashing:
        for item in sound.infolist():
            more = crash.encode() if item.filename == "eyas_device/agent/active.py" else b""
            crashing.writestr(item, sound.read(item) + more)
    return folder


def make_two_bundles(bundle: Path, folder: Path, ballast_mb: int = 4) -> tuple[Path, Path]:
    """Two versions of LiteRT's int8 model alone, which a flash sends whole; its file has a real one's size."""
    made = []
    for version in ("1.0.0", "2.0.0"):
        copy = Path(shutil.copytree(bundle, folder / version))
        manifest = msgspec.json.decode((copy / MANIFEST).read_bytes())
        kept = [artefact for artefact in manifest["artefacts"] if artefact["name"] == _ARTEFACT]
        for artefact in manifest["artefacts"]:
            for file in artefact["files"] if artefact not in kept else ():
                (copy / file["path"]).unlink()
        model = copy / kept[0]["files"][0]["path"]
        with model.open("ab") as stream:  # behind the end of the flatbuffer, where nobody reads
            stream.write(random.Random(version).randbytes(ballast_mb << 20))
        kept[0]["files"] = [msgspec.to_builtins(entry(model))]
        evidence = {_ARTEFACT: manifest["evidence"][_ARTEFACT]}
        edit(copy, version=version, artefacts=kept, use={"litert": _ARTEFACT}, reasons={}, evidence=evidence)
        record_settings(copy)
        made.append(copy)
    return made[0], made[1]


def eyas(*words: str, timeout: float = FLASH_S, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the workstation's command line."""
    done = subprocess.run(
        [sys.executable, "-m", "eyas_host", *words], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert not check or done.returncode == 0, f"eyas {words}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done


def login_options(board: Computer) -> list[str]:
    """What `eyas flash` and its siblings need to log in on a board."""
    return [word for option in board.ssh_options for word in ("--ssh-option", option)]


def device_toml(folder: Path, broker_port: int = 1, extra: str = "", *, board: type[Computer] = Board) -> Path:
    """A configuration with the board's camera and a broker on this machine, without TLS; nobody listens on port 1."""
    config = folder / "device.toml"
    config.write_text(
        f'[device]\nname = "{DEVICE}"\n[camera]\nsource = "{board.small_camera}"\n[loop]\nfps = 4.0\n'
        f'[telemetry]\nbroker = "{board.host}:{broker_port}"\n{extra}'
    )
    return config


def flash_words(board: Computer, bundle: Path, wheels: Path | None = None, user: str = "root") -> list[str]:
    """`eyas flash` without a package index, from `wheels` or from those of `wheel_folder`."""
    words = ["flash", f"{user}@127.0.0.1:{board.port}", "--bundle", str(bundle), "--offline"]
    return [*words, "--wheel-dir", str(wheels or wheel_folder()), *login_options(board)]


def flash(
    board: Computer, bundle: Path, *words: str, wheels: Path | None = None, user: str = "root", check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run `eyas flash`; more options come as `words`."""
    return eyas(*flash_words(board, bundle, wheels, user), *words, check=check)


def steps(done: subprocess.CompletedProcess[str]) -> str:
    """What took how long in a flash, as it said."""
    found = re.findall(r"^\S+: (.+) \((\d+\.\d) s\)$", done.stderr, re.MULTILINE)
    return ", ".join(f"{name} {seconds}" for name, seconds in found)
