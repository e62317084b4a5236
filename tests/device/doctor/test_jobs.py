"""Jobs of the doctor in a process of their own: hanging, crashing and noisy ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eyas_device.support.processes import JobError, run_job
from tests.support.doctor_parts import file


def test_a_job_that_hangs_is_killed(bundle_root: Path) -> None:
    (bundle_root / "manifest.json").unlink()
    os.mkfifo(bundle_root / "manifest.json")  # reading it waits for ever
    started = time.monotonic()
    with pytest.raises(JobError, match="no result within 2 s") as caught:
        run_job("eyas_device.doctor.jobs", "golden", {"bundle": str(bundle_root), "state": "", "settings": {}}, 2.0)
    assert caught.value.kind == "timeout"
    assert time.monotonic() - started < 20
    assert not [path for path in Path("/proc").glob("[0-9]*") if is_job_of_ours(path)]


def is_job_of_ours(process: Path) -> bool:
    try:
        parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        return parent == os.getpid() and b"doctor.jobs" in (process / "cmdline").read_bytes()
    except OSError:  # it ended meanwhile
        return False


def test_what_a_library_prints_does_not_spoil_the_result() -> None:
    code = (
        "import os; from eyas_device.doctor import jobs\n"
        "def noisy(): print('a banner'); os.write(1, b'{}'); return 7\n"
        "jobs.JOBS['noisy'] = noisy; jobs.main(['noisy', '30'])"
    )
    done = subprocess.run([sys.executable, "-c", code], input="{}", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {"result": 7}
    assert "a banner" in done.stderr


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("kill -ILL $$", "killed", "SIGILL"),
        ("echo dreadful >&2; exit 7", "crash", "code 7: dreadful"),
        ("exit 0", "crash", "no error output"),
    ],
)
def test_a_job_that_crashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: str, message: str
) -> None:
    file(tmp_path / "python", f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(JobError, match=message) as caught:
        run_job("eyas_device.doctor.jobs", "libraries", {}, 20.0)
    assert caught.value.kind == kind


def test_a_job_imports_what_the_doctor_imports_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file(tmp_path / "numpy.py", "raise SystemError('taken from the current folder')")
    monkeypatch.chdir(tmp_path)
    assert run_job("eyas_device.doctor.jobs", "libraries", {}, 60.0)["numpy"][0].isdigit()
