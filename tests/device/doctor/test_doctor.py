"""The doctor: real models, cameras and brokers; what this machine cannot have (1970, a full disk) is put before it."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from paho.mqtt.client import CallbackAPIVersion, Client

from eyas_device import doctor
from eyas_device.cli import main as eyas_device
from eyas_device.commands import doctor as verb
from eyas_device.config import INSTANCES, Config, ModelSection
from eyas_device.doctor import CHECKS, CheckResult, Context, Finding, check_name, examine, probes, software, system
from eyas_device.doctor.finding import green
from eyas_device.errors import BundleError, LinkError
from eyas_device.runtimes import RUNTIMES
from eyas_device.support.processes import JobError, run_job
from eyas_device.telemetry.messages import Status, encode
from eyas_device.updates.slots import Slots
from tests.support.brokers import Broker

NOW = datetime(2026, 12, 24, 12, tzinfo=timezone.utc).timestamp()


def context(
    state: Path | None = None,
    *,
    bundle: Path | str = "",
    camera: str = "",
    broker: str = "",
    telemetry: dict[str, Any] | None = None,
    **more: Any,
) -> Context:
    config = Config()
    config = replace(
        config,
        device=replace(config.device, state=str(state or "/nowhere/eyas")),
        model=replace(config.model, bundle=str(bundle)),
        camera=replace(config.camera, source=camera, timeout_s=2.0),
        telemetry=replace(config.telemetry, broker=broker, **(telemetry or {})),
    )
    return Context(config=config, **more)


def file(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def disk_of(*, free_mb: float = 1e5, inodes: int = 10**6, free_inodes: int = 10**6) -> Callable[[Path], Any]:
    return lambda path: SimpleNamespace(
        f_bavail=int(free_mb * 1000), f_frsize=1000, f_files=inodes, f_favail=free_inodes
    )


def versions(**installed: str) -> Callable[[str], str | None]:
    return {name.replace("_", "-"): version for name, version in installed.items()}.get


# --- the whole -------------------------------------------------------------------------------------------------------


def test_every_check_has_a_name_and_every_runtime_a_check() -> None:
    titles = [check_name(check) for check in CHECKS]
    assert len(titles) == len(set(titles)) > 20
    assert {name.replace("-", " ") for name in RUNTIMES} <= set(titles)
    assert set(probes.PACKAGES) == set(RUNTIMES)


def test_a_check_that_crashes_or_hangs_is_red_and_stops_no_other() -> None:
    hanging = threading.Event()

    def crashes(context: Context) -> Finding:
        raise ZeroDivisionError("nothing left")

    def raises(context: Context) -> Finding:
        raise BundleError("bundle b: damaged; copy it again")

    def hangs(context: Context) -> Finding:
        hanging.wait(60)
        return green("late")

    def fine(context: Context) -> Finding:
        return green("fine")

    rows = list(examine(context(), (crashes, raises, hangs, fine), limit_s=0.3))
    hanging.set()
    assert [row.status for row in rows] == ["red", "red", "red", "green"]
    assert "ZeroDivisionError: nothing left" in rows[0].finding
    assert rows[1].finding == "bundle b: damaged; copy it again"
    assert "no result within 0.3 s" in rows[2].finding


def test_findings_are_one_line_without_control_characters_and_passwords() -> None:
    def shows_secrets(context: Context) -> Finding:
        return green("rtsp://user:secret@10.0.0.9/s\n\x1b[2Jhttp://me:p%40ss@host/ end" + "x" * 1000)

    (row,) = examine(context(), (shows_secrets,))
    assert row.finding.startswith("rtsp://***@10.0.0.9/s ?[2Jhttp://***@host/ end")
    assert row.finding.isprintable() and len(row.finding) == 400


def run_verb(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.main(parser.parse_args([str(argument) for argument in arguments]))


def test_the_verb_with_everything_real(
    pristine_bundle: Path, tmp_path: Path, broker: Broker, capsys: pytest.CaptureFixture[str]
) -> None:
    file(
        tmp_path / "device.toml", f'[device]\nstate = "{tmp_path}"\n[camera]\nsource = "fake:?live=1&frames=9&fps=20"\n'
    )
    given = ("--config", tmp_path / "device.toml", "--bundle", pristine_bundle, "--broker", f"127.0.0.1:{broker.port}")
    code = run_verb(*given, "--json")
    report = json.loads(capsys.readouterr().out)
    rows = {row["check"]: row for row in report["findings"]}
    assert list(rows) == [check_name(check) for check in CHECKS]
    for name in ("configuration", "libraries", "litert", "openvino", "onnx", "golden", "camera", "broker", "disk"):
        assert rows[name]["status"] == "green", rows[name]
    assert "litert-int8" in rows["litert"]["finding"] and "ms per image" in rows["litert"]["finding"]
    assert "9 frames of 640 x 480" in rows["camera"]["finding"]
    assert "tiny-shapes 1.2.3" in rows["golden"]["finding"]
    reds = [row for row in rows.values() if row["status"] == "red"]
    assert code == (1 if reds else 0)
    assert report["worst"] == (
        "red" if reds else "yellow" if any(r["status"] == "yellow" for r in rows.values()) else "green"
    )


def test_the_table_and_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda context: examine(context, (system.memory, software.configuration)))
    file(tmp_path / "bad.toml", "[loop]\nduty = 2\n[camra]\n")
    assert run_verb("--config", tmp_path / "bad.toml") == 1
    memory, configuration, fix, summary = capsys.readouterr().out.splitlines()
    assert memory.startswith("green   memory  ")
    assert configuration.startswith("red     configuration  ")
    assert "[loop] duty = 2" in configuration and "[camra]: unknown section" in configuration, "all errors in one line"
    assert fix.index("-> ") == configuration.index(str(tmp_path)), "the fix stands below the finding"
    assert summary == "1 green, 0 yellow, 1 red, 0 not checked"
    assert "\x1b" not in memory, "no colours outside of a terminal"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    row = CheckResult("memory", "red", "none", "buy", 0.0)
    verb.print_result(row, 8)
    assert capsys.readouterr().out.startswith("\x1b[31mred   \x1b[0m  memory    none\n")
    monkeypatch.setenv("NO_COLOR", "1")
    verb.print_result(row, 8)
    assert "\x1b" not in capsys.readouterr().out


def test_an_unreadable_password_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"none: the password cannot be read"):
        run_verb("--password-file", tmp_path / "none")


def test_the_parent_needs_neither_numpy_nor_opencv() -> None:
    code = "import sys, eyas_device.doctor; print([m for m in ('cv2', 'numpy', 'paho') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- jobs in a process of their own ----------------------------------------------------------------------------------


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
        return parent == os.getpid() and b"doctor.work" in (process / "cmdline").read_bytes()
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


# --- software --------------------------------------------------------------------------------------------------------


def test_this_machine_is_supported() -> None:
    for check in (software.operating_system, software.userland, software.c_library, software.python):
        assert check(context()).status == "green", check(context())


def test_the_name_of_the_system_is_read_from_os_release(tmp_path: Path) -> None:
    file(tmp_path / "etc/os-release", 'NAME=x\nPRETTY_NAME="Raspberry Pi OS 13"\n')
    uname = SimpleNamespace(sysname="Linux", release="6.12.0-rpi", machine="aarch64")
    finding = software.operating_system(context(root=tmp_path, uname=lambda: uname))
    assert finding == green("Raspberry Pi OS 13, Linux 6.12.0-rpi")
    assert (
        software.operating_system(context(uname=lambda: SimpleNamespace(sysname="Darwin", release="1"))).status == "red"
    )


def test_32_bit_and_strange_processors_are_red(monkeypatch: pytest.MonkeyPatch) -> None:
    assert software.userland(context(uname=lambda: SimpleNamespace(machine="riscv64"))).status == "red"
    monkeypatch.setattr(software.struct, "calcsize", lambda kind: 4)
    finding = software.userland(context(uname=lambda: SimpleNamespace(machine="aarch64")))
    assert (finding.status, finding.text) == ("red", "32-bit Python, kernel for aarch64")


@pytest.mark.parametrize(("libc", "status"), [("glibc 2.27", "red"), ("glibc 2.28", "green"), ("", "red")])
def test_c_library(monkeypatch: pytest.MonkeyPatch, libc: str, status: str) -> None:
    monkeypatch.setattr(software.os, "confstr", lambda name: libc)
    assert software.c_library(context()).status == status


@pytest.mark.parametrize(("version", "status"), [((3, 9), "yellow"), ((3, 10), "green"), ((3, 15), "yellow")])
def test_python(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], status: str) -> None:
    monkeypatch.setattr(software.sys, "version_info", (*version, 0, "final", 0))
    assert software.python(context()).status == status


@pytest.mark.parametrize(
    ("installed", "status", "message"),
    [
        ({"numpy": "2.4.6", "opencv_python_headless": "5.0.0.93"}, "green", "no known conflicts"),
        (
            {"numpy": "1.26.4", "opencv_python_headless": "4.11.0.86", "tflite_runtime": "2.14.0"},
            "green",
            "no known conflicts",
        ),
        (
            {"numpy": "2.0.0", "tflite_runtime": "2.14.0"},
            "red",
            "tflite-runtime 2.14.0 cannot be imported with numpy 2",
        ),
        ({"numpy": "1.26.4", "opencv_python_headless": "5.0.0.93"}, "red", "does not work with numpy 1.26.4"),
        ({"numpy": "2.1.0", "opencv_python": "4.9.0.80"}, "red", "opencv-python 4.9.0.80 does not work with numpy 2"),
        (
            {"numpy": "2.1.0", "opencv_python": "4.12.0.88", "opencv_python_headless": "4.12.0.88"},
            "yellow",
            "opencv-python and opencv-python-headless overwrite",
        ),
        ({"numpy": "2.1.0", "onnxruntime": "1.20", "onnxruntime_gpu": "1.20"}, "yellow", "overwrite each other"),
        ({"numpy": "2.1.0", "onnxruntime": "1.18.1"}, "red", "onnxruntime 1.18.1 does not work with numpy 2.1.0"),
        ({}, "green", "no known conflicts"),
    ],
)
def test_conflicts(installed: dict[str, str], status: str, message: str) -> None:
    finding = software.conflicts(context(version=versions(**installed)))
    assert (finding.status, message in finding.text) == (status, True), finding
    assert bool(finding.fix) == (status != "green")


@pytest.mark.parametrize(("machine", "status"), [("aarch64", "yellow"), ("x86_64", "green")])
def test_opencv_5_resizes_differently_on_aarch64(machine: str, status: str) -> None:
    installed = versions(numpy="2.4.6", opencv_python_headless="5.0.0.93")
    finding = software.conflicts(context(version=installed, uname=lambda: SimpleNamespace(machine=machine)))
    assert finding.status == status, finding
    assert ("resizes images" in finding.text) == (machine == "aarch64")


def test_the_worst_of_several_conflicts_counts_and_all_are_listed() -> None:
    installed = versions(numpy="2.0", tflite_runtime="2.14.0", opencv_python="5.0", opencv_contrib_python="5.0")
    finding = software.conflicts(context(version=installed))
    assert finding.status == "red"
    assert "tflite-runtime" in finding.text and "overwrite" in finding.text


def test_an_import_that_fails_is_red() -> None:
    def job(name: str, arguments: object, timeout_s: float) -> Any:
        raise JobError("numpy.core.multiarray failed to import", "ImportError")

    finding = software.libraries(context(job=job))
    assert finding.status == "red" and "multiarray failed" in finding.text


# --- probes -------------------------------------------------------------------------------------------------------


def test_a_runtime_without_a_bundle_is_imported(tmp_path: Path) -> None:
    finding = probes.runtime("litert")(context(tmp_path))
    assert finding.status == "green" and "can be imported" in finding.text


def test_a_runtime_that_is_not_installed_is_not_checked() -> None:
    assert probes.runtime("tflite")(context(version=versions())).status == "grey"


def test_a_runtime_that_is_installed_and_broken_is_red_unless_another_is_used() -> None:
    settings = context(version=versions(tflite_runtime="2.14.0"))
    finding = probes.runtime("tflite")(settings)  # the real job: tflite-runtime is not there to be imported
    assert finding.status == "red" and "tflite-runtime 2.14.0: runtime tflite cannot be used" in finding.text
    used = replace(settings.config, model=replace(settings.config.model, runtime="litert"))
    other = Context(config=used, version=settings.version)
    assert probes.runtime("tflite")(other).status == "yellow"


def test_golden_names_the_artefacts_that_fail(bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    edit_manifest(confidence={"temperature": 30.0})  # and packed so, but for the probabilities
    finding = probes.golden(context(bundle=bundle_root))
    assert finding.status == "red" and "litert-int8 failed the golden check: a probability differs" in finding.text


def test_golden_of_a_damaged_bundle(bundle_root: Path) -> None:
    (bundle_root / "onnx-fp32.onnx").write_bytes(b"altered")
    finding = probes.golden(context(bundle=bundle_root))
    assert finding.status == "red" and "differs from what the manifest records" in finding.text


def test_golden_reads_the_current_slot(pristine_bundle: Path, tmp_path: Path) -> None:
    nothing = probes.golden(context(tmp_path))
    assert nothing.status == "grey" and "no good slot" in nothing.text
    assert probes.golden(context(tmp_path, config_path=tmp_path)).status == "red", "a device that is set up needs one"
    slot = Slots(tmp_path).install(pristine_bundle, check=lambda root: None)
    finding = probes.golden(context(tmp_path))
    assert finding.status == "green" and str(slot) in finding.text


@pytest.mark.parametrize(
    ("spec", "status", "message"),
    [
        ("", "grey", "no camera is configured"),
        ("fake:?frames=5&size=320x240", "green", "5 frames of 320 x 240, as fast as it is read"),
        ("fake:?live=1&fps=20&frames=12", "green", " fps"),
        ("fake:?frames=6&junk=1,2", "yellow", "2 unreadable"),
        ("fake:?frames=6&junk=0", "yellow", "1 unreadable"),
        ("fake:?frames=2&junk=0,1", "red", "delivered no readable frame (2 unreadable)"),
        ("fake:?frames=6&black=0-5", "yellow", "black"),
        ("fake:?frames=6&black=1-5", "green", "6 frames"),
        ("fake:?live=1&frames=6&fps=50&frozen=0-5", "red", "frozen"),
        ("fake:?frames=0", "red", "delivered no readable frame"),
        ("fake:?lost=0", "red", "lost at frame 0"),
        ("fake:?hang=0&live=1", "red", "camera fake"),
        ("nonsense", "red", "unknown kind"),
        ("video:/nowhere.mp4", "red", "no such file"),
    ],
)
def test_camera(spec: str, status: str, message: str) -> None:
    finding = probes.camera(context(camera=spec, run=lambda command, timeout_s: None))
    assert (finding.status, message in finding.text) == (status, True), finding


def test_a_wrong_specification_is_not_blamed_on_the_service() -> None:
    finding = probes.camera(context(camera="nonsense", run=lambda command, timeout_s: ""))
    assert finding.status == "red" and "run --help" in finding.fix


def test_a_camera_that_the_running_service_may_use_is_yellow() -> None:
    finding = probes.camera(context(camera="fake:?lost=0", run=lambda command, timeout_s: ""))
    assert finding.status == "yellow" and "stop eyas-device" in finding.fix


# --- the broker ------------------------------------------------------------------------------------------------------


def at(port: int, **more: Any) -> Finding:
    return probes.broker(context(broker=f"127.0.0.1:{port}", **more))


def test_a_broker_that_accepts_anybody(broker: Broker) -> None:
    kept = "messages are kept here until a collector has stored them"
    assert at(broker.port) == green(f"127.0.0.1:{broker.port}: accepts anybody; {kept}")


def test_a_wrong_password_differs_from_a_missing_broker(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    tool = shutil.which("mosquitto_passwd")
    assert tool is not None
    subprocess.run([tool, "-b", "-c", tmp_path / "passwords", "camera", "right"], check=True, capture_output=True)
    options = f"user root\nallow_anonymous false\npassword_file {tmp_path / 'passwords'}"
    guarded = make_broker(options=options).start()
    files = {}
    for word in ("right", "wrong"):
        files[word] = tmp_path / word
        files[word].write_text(f"{word}\n")
        files[word].chmod(0o600)
    login = {word: {"user": "camera", "password_file": str(path)} for word, path in files.items()}
    right = at(guarded.port, telemetry=login["right"])
    wrong = at(guarded.port, telemetry=login["wrong"])
    nobody = at(guarded.port)
    guarded.stop()
    gone = at(guarded.port, telemetry=login["right"])
    assert right.status == "yellow" and "accepts camera, but without TLS" in right.text
    assert wrong.status == "red" and "the user camera with this password is not accepted (Not authorized)" in wrong.text
    assert nobody.status == "red" and "nobody is accepted without a login" in nobody.text
    assert gone.status == "red" and "nothing listens on port" in gone.text
    assert "right" not in wrong.text + right.text


def test_a_broker_with_the_older_protocol_only() -> None:
    clients = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                clients.append(client)
                if hello := client.recv(4096):
                    is_mqtt5 = hello[hello.index(b"MQTT") + 4] == 5
                    client.sendall(b"\x20\x03\x00\x84\x00" if is_mqtt5 else b"\x20\x02\x00\x00")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        finding = at(server.getsockname()[1])
    for client in clients:
        client.close()
    assert finding.status == "yellow" and "3.1.1 only" in finding.text


def test_commands_without_tls_are_a_warning(broker: Broker) -> None:
    finding = at(broker.port, telemetry={"commands": ("pause", "snapshot"), "insecure": True})
    assert finding.status == "yellow" and "without TLS the network can read or send commands" in finding.text


@pytest.mark.parametrize("noticed", [False, True])
def test_another_machine_of_this_name(broker: Broker, noticed: bool) -> None:
    faults = ("another machine (0123456789ab) uses the name default/cam-1; give each another",) if noticed else ()
    other = Status(device="cam-1", machine="0123456789ab", state="online", time=NOW, faults=faults)
    client = Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.publish("eyas/default/cam-1/status", encode(other), qos=1, retain=True).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()
    checked = context(broker=f"127.0.0.1:{broker.port}")
    config = replace(checked.config, device=replace(checked.config.device, name="cam-1"))
    finding = probes.broker(dataclasses.replace(checked, config=config))
    assert finding.status == "yellow" and "another machine (0123456789ab)" in finding.text
    config = replace(checked.config, device=replace(checked.config.device, name="cam-2"))
    assert probes.broker(dataclasses.replace(checked, config=config)).status == "green"


def test_no_broker_is_not_checked() -> None:
    assert probes.broker(context()).status == "grey"


# --- the machine -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("now", [0.0, 86400.0, 4.0e9, 1e20])
def test_an_impossible_clock(now: float) -> None:
    finding = system.clock(context(now=lambda: now))
    assert finding.status == "red" and "impossible" in finding.text


def test_a_clock_before_the_installation_and_an_unsynchronised_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed_at = Path(system.__file__).stat().st_mtime
    monkeypatch.setattr(system, "is_kernel_clock_synchronised", lambda: False)
    before = system.clock(context(now=lambda: installed_at - 3 * 86400, root=tmp_path))
    assert before.status == "yellow" and "before the agent was installed" in before.text
    assert "not synchronised" in system.clock(context(now=lambda: installed_at + 60, root=tmp_path)).text
    file(tmp_path / "run/systemd/timesync/synchronized", "")
    assert system.clock(context(now=lambda: installed_at + 60, root=tmp_path)).status == "green"


@pytest.mark.parametrize(
    ("kernel", "timedatectl", "status"),
    [
        (-1, None, "grey"),
        (-1, "yes\n", "green"),
        (-1, "no\n", "yellow"),
        (5, None, "yellow"),
        (5, "yes\n", "green"),
        (0, None, "green"),
    ],
)
def test_a_clock_inside_of_the_services_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: int, timedatectl: str | None, status: str
) -> None:
    """Where adjtimex is forbidden, systemd's bus knows; where nobody may say, it is no warning for ever."""
    monkeypatch.setattr(system, "_ask_kernel", lambda: (kernel, 0))
    now = Path(system.__file__).stat().st_mtime + 60
    asked: list[object] = []

    def run(command: Any, timeout_s: float) -> str | None:
        asked.append(command[0])
        return timedatectl

    assert system.clock(context(now=lambda: now, root=tmp_path, run=run)).status == status
    assert asked == ([] if kernel == 0 else ["timedatectl"])


@pytest.mark.parametrize(
    ("state", "status", "synchronised"),
    [(0, 0, True), (0, 0x2001, True), (0, 0x41, False), (5, 0, False), (-1, 0, False)],
)
def test_the_kernel_tells_whether_the_clock_is_synchronised(
    state: int, status: int, synchronised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        @staticmethod
        def adjtimex(timex: Any) -> int:
            (ctypes.c_int * 11).from_buffer(timex._obj)[10] = status  # `status` of struct timex on 64 bits
            return state

    monkeypatch.setattr(system.ctypes, "CDLL", lambda name: Library)  # type: ignore[attr-defined]
    assert system.is_kernel_clock_synchronised() is synchronised


@pytest.mark.parametrize(("free", "status"), [(99, "red"), (400, "yellow"), (501, "green")])
def test_free_space_on_the_disk(tmp_path: Path, free: float, status: str) -> None:
    assert system.disk(context(tmp_path, statvfs=disk_of(free_mb=free))).status == status
    assert system.disk(context(tmp_path / "not/yet", statvfs=disk_of(free_mb=free))).status == status
    assert not list(tmp_path.iterdir()), "the doctor leaves nothing behind"


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(30, "red", "Read-only file system"), (13, "yellow", "not writable for this user")],
)
def test_a_disk_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: str, message: str
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(system.tempfile, "TemporaryFile", refuse)
    finding = system.disk(context(tmp_path))
    assert (finding.status, message in finding.text) == (status, True), finding


@pytest.mark.parametrize(
    ("inodes", "free", "status"),
    [(10**6, 10**5, "green"), (10**6, 40_000, "yellow"), (10**6, 999, "red"), (0, 0, "green")],
)
def test_inodes(tmp_path: Path, inodes: int, free: int, status: str) -> None:
    assert system.inodes(context(tmp_path, statvfs=disk_of(inodes=inodes, free_inodes=free))).status == status


@pytest.mark.parametrize(
    ("zones", "bits", "status", "message"),
    [
        ([], None, "grey", "no sensor"),
        (["48300"], "0\n", "green", "48 °C"),
        (["48300", "79000"], None, "yellow", "79 °C"),
        (["86000"], None, "red", "86 °C"),
        (["51000"], "50005", "red", "now under-voltage, throttled"),
        (["51000"], "50000", "yellow", "since boot under-voltage, throttled"),
        (["nonsense", "-9999999"], "zz", "grey", "no sensor"),
        ([], "20002", "red", "now frequency capped"),
    ],
)
def test_temperature(tmp_path: Path, zones: list[str], bits: str | None, status: str, message: str) -> None:
    for number, reading in enumerate(zones):
        file(tmp_path / f"sys/class/thermal/thermal_zone{number}/temp", f"{reading}\n")
    if bits is not None:
        file(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", bits)
    finding = system.temperature(context(root=tmp_path))
    assert (finding.status, message in finding.text) == (status, True), finding
    assert "power supply" in finding.fix or "under-voltage" not in finding.text


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("some avg10=0.00 avg60=3.10 avg300=0.00 total=1\n", "green"),
        ("some avg10=0.00 avg60=71.00 avg300=0.00 total=1\n", "yellow"),
        ("nonsense", "grey"),
        ("", "grey"),
        ("some avg60=x", "grey"),
    ],
)
def test_pressure(tmp_path: Path, text: str, status: str) -> None:
    file(tmp_path / "proc/pressure/cpu", text)
    assert system.processor(context(root=tmp_path)).status == status


def test_a_container_has_its_own_cores_and_memory(tmp_path: Path) -> None:
    file(tmp_path / "proc/pressure/cpu", "some avg10=0.00 avg60=3.10 avg300=0.00 total=1\n")
    file(tmp_path / "proc/meminfo", "MemAvailable:  900000 kB\n")
    file(tmp_path / "proc/self/cgroup", "0::/\n")
    file(tmp_path / "sys/fs/cgroup/cpu.max", "50000 100000\n")
    file(tmp_path / "sys/fs/cgroup/memory.max", "40000000\n")
    config = Config(model=ModelSection(threads=4))
    assert system.processor(context(root=tmp_path)) == green("1 usable cores, pressure 3 % of the last minute")
    assert system.processor(Context(config=config, root=tmp_path)).fix == "[model] threads = 1"
    assert system.memory(context(root=tmp_path)).text == "40 MB available"


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("MemTotal: 1 kB\nMemAvailable:  900000 kB\n", "green"),
        ("MemAvailable: 150000 kB\n", "yellow"),
        ("MemAvailable: 9000 kB\n", "red"),
        ("MemAvailable: much kB\n", "grey"),
        ("", "grey"),
    ],
)
def test_memory(tmp_path: Path, text: str, status: str) -> None:
    file(tmp_path / "proc/meminfo", text)
    assert system.memory(context(root=tmp_path)).status == status


@pytest.mark.parametrize(("limit", "status"), [(100, "yellow"), (1024, "green"), (-1, "green")])
def test_descriptors(monkeypatch: pytest.MonkeyPatch, limit: int, status: str) -> None:
    monkeypatch.setattr(system.resource, "getrlimit", lambda kind: (limit, limit))
    assert system.descriptors(context()).status == status


@pytest.mark.parametrize(
    ("load", "active", "enabled", "status", "message"),
    [
        ("loaded", "active", "enabled", "green", "active (running), enabled"),
        ("loaded", "active", "disabled", "yellow", "will not start at boot"),
        ("loaded", "activating", "enabled", "yellow", "no frame has been classified yet"),
        ("loaded", "failed", "enabled", "red", "failed"),
        ("not-found", "inactive", "", "red", "not installed"),
    ],
)
def test_service(tmp_path: Path, load: str, active: str, enabled: str, status: str, message: str) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout_s: float) -> str:
        asked.append(command)
        return f"LoadState={load}\nActiveState={active}\nSubState=running\nUnitFileState={enabled}\nNRestarts=2\n"

    finding = system.service(context(Path("/var/lib/eyas"), root=tmp_path, run=run, config_path=tmp_path))
    assert (finding.status, message in finding.text) == (status, True), finding
    assert asked[0][:3] == ["systemctl", "show", "eyas-device.service"]


def test_the_service_of_one_camera_among_several(tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    asked: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout_s: float) -> str:
        asked.append(command)
        return "LoadState=not-found\n"

    finding = system.service(context(root=tmp_path, run=run, config_path=INSTANCES / "line-7.toml"))
    assert asked[0][2] == "eyas-device@line-7.service" and "eyas-device@line-7.service is not installed" in finding.text
    assert Path(finding.fix.split()[1]).is_file(), "the file to copy"


@pytest.mark.parametrize(
    ("state", "paths", "status"),
    [
        ("/var/lib/eyas", "", "green"),
        ("/var/lib/eyas/devices/line-7", "", "green"),
        ("/data/eyas", "", "red"),
        ("/var/lib/eyas-2", "", "red"),
        ("/data/eyas", "/data", "green"),
        ("/data/eyas", "/srv -/data/eyas", "green"),
        ("/data/eyas", "/data/eyas/slots", "red"),
    ],
)
def test_the_service_may_write_to_the_state_folder(state: str, paths: str, status: str, tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    unit = f"LoadState=loaded\nActiveState=active\nUnitFileState=enabled\nReadWritePaths={paths}\n"
    finding = system.service(context(Path(state), root=tmp_path, run=lambda command, timeout_s: unit))
    assert finding.status == status, finding
    assert status == "green" or f"ReadWritePaths={state}" in finding.fix


def test_service_without_systemd_or_with_one_that_does_not_answer(tmp_path: Path) -> None:
    assert system.service(context(root=tmp_path)).status == "grey"
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert system.service(context(root=tmp_path, run=lambda command, timeout_s: None)).status == "yellow"


def test_the_verb_is_known_and_help_is_light() -> None:
    heavy = (
        "import sys, eyas_device.commands.doctor; print([m for m in ('cv2', 'numpy', 'msgspec') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", heavy], text=True).strip() == "[]"


def test_json_rows_can_be_read_back() -> None:
    (row,) = examine(context(), (system.descriptors,))
    assert msgspec.json.decode(msgspec.json.encode(row), type=CheckResult) == row
    assert callable(eyas_device)


def test_view_reports_whether_the_images_are_in_distribution(
    pristine_bundle: Path, image_folder: Path, tmp_path: Path
) -> None:
    same = probes.view(context(bundle=pristine_bundle, camera=f"folder:{image_folder}"))
    assert (same.status, same.text.split(":")[0]) == ("green", "in distribution")
    strange = probes.view(context(bundle=pristine_bundle, camera="fake:?frames=20"))
    assert strange.status == "yellow" and "does not see what the model was trained on" in strange.text
    assert "snapshot" in strange.fix


@pytest.mark.parametrize(
    ("camera", "message"),
    [("", "no camera"), ("fake:?frames=2", "too few"), ("fake:?lost=0", "not judged: camera fake")],
)
def test_view_that_cannot_be_judged_is_grey(camera: str, message: str, pristine_bundle: Path) -> None:
    finding = probes.view(context(bundle=pristine_bundle, camera=camera))
    assert finding.status == "grey" and message in finding.text
