"""Every line that says how to install Eyas works today, and is written in one place of each half."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from eyas_device.support import packages
from eyas_host.support import extras
from tests.support.package_index import index  # noqa: F401 - fixture
from tests.support.paths import ROOT
from tests.support.wheels import build

_LINE = re.compile(r"pip install[^\n`#]*\beyas\b[^\n`#]*|pip install[^\n`#]*eyas[-_]device[^\n`#]*")
_OF_CODE = {"device/eyas_device/support/packages.py", "host/eyas_host/support/extras.py"}
"""The two modules that may hold one."""
_TEXT = (".md", ".toml", ".txt", ".py", ".sh", ".service", ".cfg", ".yml", "Makefile")


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name.endswith(_TEXT)]


def test_code_has_no_line_of_its_own() -> None:
    found = {}
    for name in tracked():
        if name.endswith(".py") and name.startswith(("device/", "host/", "benchmarks/")):
            lines = _LINE.findall((ROOT / name).read_text(encoding="utf-8"))
            if lines and name not in _OF_CODE:
                found[name] = lines
    assert found == {}


def test_the_documentation_names_what_is_there_today() -> None:
    """A wheel that lies there, a folder of the checkout, or an extra for an environment that has Eyas."""
    seen = 0
    for name in tracked():
        if name.endswith(".py") or name == "CHANGELOG.md":
            continue
        for line in _LINE.findall((ROOT / name).read_text(encoding="utf-8")):
            seen += 1
            words = [word.strip("'\".,()") for word in line.split() if "eyas" in word or word.startswith((".", "'."))]
            plain = [word for word in words if re.fullmatch(r"eyas(-device)?", word)]
            assert not plain, f"{name}: {line}"
            assert packages.WHEEL in line or "./device" in line or re.search(r"eyas(-device)?\[", line), (
                f"{name}: {line}"
            )
    assert seen > 5


@pytest.mark.parametrize("name", ["docs/device.md", "docs/boards.md", "device/README.md"])
def test_the_documentation_has_the_line_of_the_code(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert packages.WHEEL in text
    assert name == "docs/device.md" or "uv build --wheel --out-dir dist device" in text
    assert packages.BUILD == "uv build --wheel --out-dir dist device"


def test_the_host_line_is_the_documentation_s() -> None:
    assert extras.NEW.format(extra="fleet") in (ROOT / "docs/fleet.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("index")
def test_the_lines_work_in_a_new_environment(tmp_path: Path) -> None:
    """The wheel beside the reader, and then the line that a hint of that environment names."""
    build(ROOT / "device", tmp_path)
    venv.create(tmp_path / "eyas", with_pip=True)
    python = tmp_path / "eyas/bin/python"

    def run(line: str) -> str:
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def program(code: str) -> str:
        return run(shlex.join([str(python), "-I", "-c", code])).strip()

    run(f"eyas/bin/{packages.NEW} --quiet --disable-pip-version-check")
    assert "eyas-device 0." in run("eyas/bin/eyas-device --version")
    assert "eyas_host" not in program("import eyas_device.agent.app, sys; print(sorted(sys.modules))")
    hint = program("from eyas_device.support.packages import install_line; print(install_line('gpio'))")
    assert hint == f"{python} -m pip install 'eyas-device[gpio]'"
    run(f"{hint} --quiet --disable-pip-version-check")
    program("import gpiozero")
    folder = Path(program("import eyas_device; print(eyas_device.__path__[0])"))
    assert not folder.is_relative_to(ROOT)
    for name in ("device.example.toml", "eyas-device.service", "eyas-device@.service", "70-eyas-camera.rules"):
        assert (folder / name).is_file()
    refused = subprocess.run([python.with_name("eyas-device"), "service", "install"], capture_output=True, check=False)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


def test_a_program_without_pip_names_the_system_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise packages.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "distribution", missing)
    line = packages.install_line("onnx")
    assert line == f"python3 -m pip --python {sys.prefix} install 'eyas-device[onnx]'"
