"""Wheels to install on a device: eyas-device, and for an offline device its dependencies."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from eyas_device.bundle import sha256
from eyas_host.fleet.connect.preflight import DeviceFacts
from eyas_host.fleet.connect.ssh import FleetError
from eyas_host.support.files import cache_folder

_BUILD_S = 300
_FETCH_S = 1200
_KEPT_WHEELS = 5


def project_root() -> Path:
    """Find the source tree that this package was imported from. Raises `FleetError` if it was installed without one."""
    root = Path(__file__).resolve().parents[4]
    if not (root / "pyproject.toml").is_file() or not (root / "constraints").is_dir():
        raise FleetError(f"{root}: not the source tree of eyas; flash from a clone of the repository")
    return root


def build_wheel(folder: Path, wheel_dir: Path | None = None) -> Path:
    """Return the wheel of eyas-device in `wheel_dir`, or that of the source tree, copied or built into `folder`.

    A built one is kept in the user's cache, named by the sources that it was built from.
    """
    ready = sorted(wheel_dir.glob("eyas_device-*.whl")) if wheel_dir is not None else []
    if len(ready) > 1:
        raise FleetError(f"{wheel_dir}: {len(ready)} wheels of eyas-device; keep one")
    if ready:
        return ready[0]
    kept = cache_folder("eyas-wheels") / _sources_digest()
    if (built := next(kept.glob("eyas_device-*.whl"), None)) is not None:
        return Path(shutil.copy(built, folder))
    wheel = _build(folder)
    _keep(wheel, kept)
    return wheel


def _sources_digest() -> str:
    """Hex sha256 of everything that the wheel is built from."""
    project = project_root() / "device"
    digest = hashlib.sha256()
    for path in sorted(path for path in project.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(f"{path.relative_to(project)} {sha256(path)}\n".encode())
    return digest.hexdigest()[:32]


def _keep(wheel: Path, kept: Path) -> None:
    """Keep a built wheel and the newest others; a cache that cannot be written costs the next flash a second."""
    with suppress(OSError):
        kept.mkdir(parents=True, exist_ok=True)
        temporary = kept / f".{os.getpid()}"
        shutil.copy(wheel, temporary)
        temporary.replace(kept / wheel.name)
        folders = sorted(kept.parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in folders[_KEPT_WHEELS:]:
            shutil.rmtree(old, ignore_errors=True)


def _build(folder: Path) -> Path:
    uv = _uv()
    tail = ["--out-dir", str(folder), str(project_root() / "device")]
    # hatchling builds reproducible wheels: their hash identifies the environment
    if uv is not None:
        _run([uv, "build", "--wheel", "--quiet", *tail], _BUILD_S, "the wheel of eyas-device cannot be built")
    else:
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        pip += ["--wheel-dir", *tail[1:]]
        _run(pip, _BUILD_S, "the wheel of eyas-device cannot be built")
    return next(folder.glob("eyas_device-*.whl"))


def constraints(facts: DeviceFacts) -> Path:
    """Return the constraints file (tested versions) for a device."""
    path = project_root() / "constraints" / f"{facts.profile}.txt"
    if not path.is_file():
        raise FleetError(f"{path}: no such constraints file; update the source tree")
    return path


def fetch(
    folder: Path, wheel: Path, facts: DeviceFacts, extras: Sequence[str] = (), wheel_dir: Path | None = None
) -> None:
    """Collect in `folder` the dependencies of `wheel` and its extras for the device's Python, machine and glibc.

    They are downloaded, or with `wheel_dir` taken from there alone.
    """
    source = [] if wheel_dir is None else ["--no-index", "--find-links", str(wheel_dir.resolve())]
    major, minor = facts.python_numbers[:2]
    brackets = f"[{','.join(extras)}]" if extras else ""
    requirements: Sequence[str] = [f"{wheel}{brackets}", "--constraint", str(constraints(facts))]
    if (uv := _uv()) is not None:
        # pip evaluates `python_version < "3.11"` for the Python that runs it, uv for the named one
        pinned = folder / "pinned.txt"
        (folder / "requirements.txt").write_text(
            f"eyas-device{brackets} @ {wheel.resolve().as_uri()}\n", encoding="utf-8"
        )
        command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
        command += ["--python-version", f"{major}.{minor}"]
        command += ["--python-platform", f"{facts.machine}-manylinux_2_28", "--constraint", str(constraints(facts))]
        command += ["--output-file", str(pinned), *source, str(folder / "requirements.txt")]
        _run(command, _FETCH_S, "the device's dependencies cannot be resolved")
        lines = pinned.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if not line.startswith(("eyas-device ", "eyas-device["))]
        pinned.write_text("\n".join(lines) + "\n", encoding="utf-8")
        requirements = ["--no-deps", "--requirement", str(pinned)]
    newest = int(re.sub(r"\D", "", facts.glibc.rpartition(".")[2]) or 28)
    tags = [f"manylinux_2_{number}_{facts.machine}" for number in range(newest, 16, -1)]
    platforms = [
        word
        for tag in [*tags, f"manylinux2014_{facts.machine}", f"linux_{facts.machine}"]
        for word in ("--platform", tag)
    ]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary=:all:", "--python-version", f"{major}.{minor}", "--implementation", "cp", *platforms]
    failure = "the device's wheels cannot be downloaded" if wheel_dir is None else f"{wheel_dir}: a wheel is missing"
    _run([*command, *source, "--dest", str(folder), *requirements], _FETCH_S, failure)
    for temporary in ("pinned.txt", "requirements.txt"):
        (folder / temporary).unlink(missing_ok=True)


def environment_name(wheel: Path, facts: DeviceFacts, wheel_dir: Path | None, extras: Sequence[str] = ()) -> str:
    """Name an environment `venv-<digest>` after its wheel with its extras, constraints, Python and kind."""
    digest = hashlib.sha256()
    others = sorted(path.name for path in wheel_dir.glob("*.whl")) if wheel_dir is not None else []
    parts = (
        sha256(wheel),
        sha256(constraints(facts)),
        facts.python,
        facts.python_version,
        facts.picamera2,
        *others,
        *sorted(extras),
    )
    digest.update("\n".join(parts).encode())
    return f"venv-{digest.hexdigest()[:12]}"


def _uv() -> str | None:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.is_file() else shutil.which("uv")


def _run(command: Sequence[str], timeout_s: float, failure: str) -> None:
    environment = {"UV_CACHE_DIR": str(cache_folder("uv")), **os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise FleetError(f"{failure}: not finished within {timeout_s:g} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.lower().startswith(("error", "cause: "))] or lines or ["no output"]
        raise FleetError(f"{failure}: {errors[-1].removeprefix('cause: ')}")
