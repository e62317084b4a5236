"""The command line starts fast and keeps to itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from eyas_device import __version__
from eyas_host.cli.app import STAGES, app

EYAS = Path(sys.executable).with_name("eyas")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_names_every_verb() -> None:
    done = subprocess.run([EYAS, "--help"], capture_output=True, text=True, check=True)
    for verb in (*STAGES, "new"):
        assert f" {verb} " in done.stdout
    told = subprocess.run([EYAS, "distill", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--from" in told and "--only" in told and "--set" in told
    assert __version__ in subprocess.run([EYAS, "--version"], capture_output=True, text=True, check=True).stdout


def test_no_verb_hides_another() -> None:
    names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    assert len(names) > len(STAGES) and len(set(names)) == len(names)


def test_no_framework_is_imported_for_help() -> None:
    heavy = "{'torch', 'timm', 'nncf', 'openvino', 'cv2', 'sklearn'}"
    assert python(f"import sys, eyas_host.cli.app; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_no_usage_statistics_leave_the_machine() -> None:
    code = (
        "from eyas_host.support.quiet import quiet_libraries; quiet_libraries()\n"
        "import nncf.telemetry.wrapper as nncf_side\n"
        "from openvino.tools.ovc import telemetry_utils as ov_side\n"
        "print(type(nncf_side.telemetry).__name__, ov_side.tm.__name__)"
    )
    nncf_side, openvino_side = python(code).split()
    assert nncf_side == "MagicMock"
    assert openvino_side.endswith("telemetry_stub")
