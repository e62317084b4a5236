"""Law 1: code points from the host to the device only, and a device needs no training framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import eyas_device

ROOT = Path(eyas_device.__file__).parent
BLOCKED = ("torch", "torchvision", "timm", "nncf", "tensorflow", "eyas_host")

_IMPORT_ALL = f"""
import importlib, pkgutil, sys
for name in {BLOCKED!r}:
    sys.modules[name] = None  # importing it now raises ImportError
import eyas_device
names = [m.name for m in pkgutil.walk_packages(eyas_device.__path__, "eyas_device.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
print(*names)
"""


def test_every_module_imports_without_the_host() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT_ALL], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    files = {".".join(("eyas_device", *path.relative_to(ROOT).with_suffix("").parts)) for path in ROOT.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in files} - {"eyas_device", "eyas_device.__main__"}
    assert {"eyas_device.camera.folder", "eyas_device.runtimes.litert", "eyas_device.cli"} <= modules
    assert found == modules


def test_no_source_names_a_blocked_module() -> None:
    sources = list(ROOT.rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in BLOCKED, f"{path}:{node.lineno} imports {name}"
