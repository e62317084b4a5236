"""Bring Eyas to a board by its own command, from wheels that are downloaded once and kept beside the image."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST
from tests.support.bundles import edit, entry, record_settings
from tests.support.paths import ROOT

from .machine import Board, cache

FLASH_S = 900
"""How long a first flash may take where other programs use the processor."""
_CONSTRAINTS = ROOT / "constraints/device-numpy1.txt"
_PYTHON = "3.11"


def wheel_folder() -> Path:
    """The dependencies of `eyas-device` as wheels for the board; the wheel of `eyas-device` is built by each flash."""
    project = msgspec.toml.decode((ROOT / "device/pyproject.toml").read_bytes())["project"]
    needs = [need for need in project["dependencies"] if "!= 'aarch64'" not in need]
    needs = [need.split(";")[0].strip() for need in needs if "python_version" not in need]
    digest = hashlib.sha256("\n".join([_CONSTRAINTS.read_text(), *needs]).encode()).hexdigest()[:16]
    folder = cache() / f"wheels-{digest}"
    if folder.is_dir():
        return folder
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    platforms = [word for minor in range(36, 16, -1) for word in ("--platform", f"manylinux_2_{minor}_aarch64")]
    platforms += ["--platform", "manylinux2014_aarch64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", "--python-version", _PYTHON, "--implementation", "cp", *platforms]
    command += ["--constraint", str(_CONSTRAINTS), "--dest", str(part), *needs]
    try:
        subprocess.run(command, check=True, timeout=600)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def make_two_bundles(bundle: Path, folder: Path, ballast_mb: int = 4) -> tuple[Path, Path]:
    """Two copies of a bundle with versions of their own and a model file as large as a real one's."""
    made = []
    for version in ("1.0.0", "2.0.0"):
        copy = Path(shutil.copytree(bundle, folder / version))
        model = copy / "litert-fp32.tflite"
        with model.open("ab") as stream:  # behind the end of the flatbuffer, where nobody reads
            stream.write(random.Random(version).randbytes(ballast_mb << 20))
        manifest = msgspec.json.decode((copy / MANIFEST).read_bytes())
        for artefact in manifest["artefacts"]:
            artefact["files"] = [
                msgspec.to_builtins(entry(model)) if file["path"] == model.name else file for file in artefact["files"]
            ]
        edit(copy, version=version, artefacts=manifest["artefacts"])
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


def login_options(board: Board) -> list[str]:
    """What `eyas flash` and its siblings need to log in on a board."""
    return [word for option in board.ssh_options for word in ("--ssh-option", option)]


def flash(board: Board, bundle: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`eyas flash` without a package index; more options come as `words`."""
    options = ["--bundle", str(bundle), "--offline", "--wheel-dir", str(wheel_folder()), *login_options(board)]
    return eyas("flash", board.address, *options, *words, check=check)
