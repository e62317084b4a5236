"""The command line starts fast, teaches every verb, and sends nothing home."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from eyas_device import __version__
from eyas_host.cli.app import HELP, NAMES
from eyas_host.stages.chain import STAGES
from tests.support.inside import eyas

EYAS = Path(sys.executable).with_name("eyas")


def page_of(name: str) -> str:
    return f"{name.replace(' ', '-')}.md"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_every_verb_once() -> None:
    shown = subprocess.run([EYAS, "--help"], capture_output=True, text=True, check=True).stdout
    assert len(NAMES) > len(STAGES) and len(set(NAMES)) == len(NAMES)
    assert {stage.name for stage in STAGES} < set(NAMES)
    assert all(f" {name.split()[0]} " in shown for name in NAMES)
    assert __version__ in subprocess.run([EYAS, "--version"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_has_a_page_with_an_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = eyas(tmp_path, *name.split(), "--help")
    assert done.code == 0, done.err
    example = re.search(rf"^eyas {name}\b.*$", (HELP / page_of(name)).read_text(), re.MULTILINE)
    assert example is not None and example[0] in done.out
    options = set(re.findall(r"--[a-z-]+", "".join(re.findall(rf"^eyas {name}\b.*$", done.out, re.MULTILINE))))
    assert all(f"{option} " in done.out.partition(example[0])[0] for option in options - {"--help"})


def test_every_page_belongs_to_a_verb() -> None:
    assert {page.name for page in HELP.iterdir()} == {page_of(name) for name in NAMES}


def test_no_framework_is_imported_for_help() -> None:
    heavy = "{'torch', 'timm', 'nncf', 'openvino', 'cv2', 'sklearn'}"
    code = "import sys, eyas_host.cli.app as app; app.app(['tune', '--help'], standalone_mode=False)\n"
    assert python(f"{code}print(sorted({heavy} & set(sys.modules)))").splitlines()[-1] == "[]"


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
