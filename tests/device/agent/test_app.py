"""The agent as a service runs it: slots, golden check, remembered choice, hot swap, a camera that goes and comes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from eyas_device.bundle import GOLDEN, MANIFEST, sha256
from eyas_device.config import STATE
from eyas_device.errors import EXIT_CONFIG
from eyas_device.runtimes.selection import SavedSelection, library_versions, write_selection
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.updates.slots import Slots
from tests.support.brokers import free_port
from tests.support.bundles import entry
from tests.support.servers import StreamServer

LIVE = "fake:?live=1&fps=40&frames=1000000&size=64x48"


class Service:
    """`eyas-device run` in a process of its own; its lines on standard output as they come."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "eyas_device", "run", "--log-level", "debug", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_for(self, text: str, *, since: int = 0, timeout: float = 30) -> int:
        """The number of the first line, from `since`, that holds `text`."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for number, line in enumerate(list(self.lines)):
                if number >= since and text in line:
                    return number
            time.sleep(0.02)
        raise AssertionError(f"{text!r} was not printed: {self.lines}")

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(20)
        self._reader.join(5)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    started: list[Service] = []

    def start(*arguments: object) -> Service:
        started.append(Service(*arguments))
        return started[-1]

    yield start
    for service in started:
        service.process.kill()
        service.process.wait(10)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def config(state: Path, tmp_path: Path) -> Path:
    path = tmp_path / "device.toml"
    path.write_text(f'[device]\nstate = "{state}"\n[camera]\nsource = "{LIVE}"\n')
    return path


def versioned(source: Path, target: Path, version: str, *, wrong: bool = False) -> Path:
    """A copy of a bundle with another version; a `wrong` one fails its golden check."""
    shutil.copytree(source, target)
    manifest = msgspec.json.decode((target / MANIFEST).read_bytes())
    if wrong:
        with np.load(target / GOLDEN) as data:
            packed = [name for name in data.files if not name.startswith(("label.", "uncertain.", "settings"))]
            arrays = {name: 1 - data[name] if name.startswith("p.") else data[name] for name in packed}
        np.savez(target / GOLDEN, **arrays)
        manifest["golden"] = msgspec.to_builtins(entry(target / GOLDEN))
    (target / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"version": version}))
    return target


def test_a_new_model_between_two_frames(
    serve: Callable[..., Service], config: Path, state: Path, pristine_bundle: Path, tmp_path: Path
) -> None:
    slots = Slots(state)
    slots.install(pristine_bundle)
    service = serve("--config", config)
    service.wait_for("tiny-shapes 1.2.3: litert-int8")
    service.wait_for("frames ")
    slots.install(versioned(pristine_bundle, tmp_path / "next", "2.0.0"))
    service.process.send_signal(signal.SIGHUP)
    swapped = service.wait_for("tiny-shapes 2.0.0: litert-int8")
    service.wait_for("frames ", since=swapped)
    assert service.end() == 0
    assert "unreadable" not in " ".join(service.lines)


def test_a_model_that_answers_otherwise_does_not_replace_one_that_is_right(
    serve: Callable[..., Service], config: Path, pristine_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(pristine_bundle, path)
    service = serve("--config", config, "--bundle", path)
    service.wait_for("frames ")
    shutil.rmtree(path)
    versioned(pristine_bundle, path, "2.0.0", wrong=True)
    service.process.send_signal(signal.SIGHUP)
    printed = service.wait_for("the model stays as it is")
    assert "failed the golden check" in service.lines[printed]
    service.wait_for("frames ", since=printed)
    assert service.end() == 0


def test_a_wrong_model_does_not_start(serve: Callable[..., Service], pristine_bundle: Path, tmp_path: Path) -> None:
    wrong = versioned(pristine_bundle, tmp_path / "wrong", "2.0.0", wrong=True)
    service = serve("--bundle", wrong, "--camera", "fake:")
    assert service.process.wait(30) == 1
    service.wait_for("failed the golden check: a probability differs")


def test_a_spoilt_current_slot_gives_way_to_the_other(
    serve: Callable[..., Service], config: Path, state: Path, pristine_bundle: Path, tmp_path: Path
) -> None:
    slots = Slots(state)
    slots.install(pristine_bundle)
    current = slots.install(versioned(pristine_bundle, tmp_path / "next", "2.0.0"))
    model = current / "litert-int8.tflite"
    model.write_bytes(model.read_bytes()[:-1] + b"\x00")
    service = serve("--config", config, "--frames", "5")
    assert service.process.wait(30) == 0
    service.wait_for("tiny-shapes 1.2.3")


def test_a_service_without_a_model_waits_for_one(
    serve: Callable[..., Service], config: Path, state: Path, pristine_bundle: Path
) -> None:
    service = serve("--config", config)
    service.wait_for("no model runs: ")
    service.wait_for("no good slot yet; fill one with `eyas-device install BUNDLE`")
    service.wait_for("camera delivering")
    Slots(state).install(pristine_bundle, check=lambda root: None)
    service.process.send_signal(signal.SIGHUP)
    service.wait_for("tiny-shapes 1.2.3: litert-int8")
    service.wait_for("frames ")
    assert service.end() == 0


def test_no_good_slot_for_a_try(serve: Callable[..., Service], config: Path) -> None:
    service = serve("--config", config, "--camera", "fake:")
    assert service.process.wait(30) == 2
    service.wait_for("no good slot yet; fill one with `eyas-device install BUNDLE`")


def test_the_remembered_choice_is_used_and_can_be_overruled(
    serve: Callable[..., Service], config: Path, state: Path, pristine_bundle: Path
) -> None:
    choice = SavedSelection(
        name="tiny-shapes",
        version="1.2.3",
        manifest_sha256=sha256(pristine_bundle / MANIFEST),
        runtime="onnx",
        artefact="onnx-fp32",
        threads=1,
        latency_ms=0.1,
        versions=library_versions(),
    )
    write_selection(state, choice)
    service = serve("--config", config, "--bundle", pristine_bundle, "--frames", "3")
    assert service.process.wait(30) == 0
    service.wait_for("onnx-fp32 on onnx")
    service = serve(
        "--log-level", "debug", "--config", config, "--bundle", pristine_bundle, "--frames", "3", "--runtime", "litert"
    )
    assert service.process.wait(30) == 0
    service.wait_for("litert-int8 on litert")


def test_too_slow_a_model_does_not_go_live(serve: Callable[..., Service], config: Path, pristine_bundle: Path) -> None:
    config.write_text(config.read_text() + "[model]\nmax_latency_ms = 0.000001\n")
    service = serve("--config", config, "--bundle", pristine_bundle, "--camera", "fake:")
    assert service.process.wait(30) == 1
    service.wait_for("ms are allowed (model.max_latency_ms)")


def test_a_camera_that_never_comes_ends_with_3(serve: Callable[..., Service], pristine_bundle: Path) -> None:
    service = serve(
        "--bundle", pristine_bundle, "--camera", f"mjpeg:http://127.0.0.1:{free_port()}/", "--give-up-s", "0.5"
    )
    assert service.process.wait(30) == 3
    service.wait_for("no frame for")


def test_a_stream_that_is_killed_and_comes_back(serve: Callable[..., Service], pristine_bundle: Path) -> None:
    server = StreamServer()
    server.start()
    try:
        service = serve("--bundle", pristine_bundle, "--camera", server.spec("normal"))
        delivering = service.wait_for("camera delivering")
        service.wait_for("frames ", since=delivering)
        server.kill()
        lost = service.wait_for("camera lost", since=delivering)
        server.start()
        back = service.wait_for("camera delivering", since=lost, timeout=60)
        service.wait_for("frames ", since=back)
        assert service.end() == 0
    finally:
        server.kill()


@pytest.mark.parametrize("affinity", ["0", None])
def test_the_process_keeps_to_its_cores(affinity: str | None, pristine_bundle: Path) -> None:
    options = ["--affinity", affinity] if affinity else []
    script = "import os, sys; from eyas_device.cli import main; main(sys.argv[1:])\n"
    script += "print(sorted(os.sched_getaffinity(0)))"
    command = [sys.executable, "-c", script, "run", "--bundle", str(pristine_bundle), "--camera", "fake:", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    wanted = [0] if affinity else sorted(os.sched_getaffinity(0))
    assert json.loads(done.stdout.splitlines()[-1]) == wanted


def test_cores_that_are_not_there(serve: Callable[..., Service], pristine_bundle: Path) -> None:
    service = serve("--bundle", pristine_bundle, "--camera", "fake:", "--affinity", "900")
    assert service.process.wait(30) == EXIT_CONFIG
    service.wait_for("model.affinity [900]")


def test_messages_wait_on_disk_and_survive_a_kill(
    serve: Callable[..., Service], config: Path, state: Path, pristine_bundle: Path
) -> None:
    config.write_text(config.read_text() + f'[telemetry]\nbroker = "127.0.0.1:{free_port()}"\nwindow_s = 0.2\n')
    service = serve("--config", config, "--bundle", pristine_bundle)
    service.wait_for("frames ")
    service.process.kill()
    service.process.wait(10)
    with Spool(state / "spool", device="x") as spool:
        kept = spool.pending("window", limit=100)
        assert len(kept) >= 3, "a killed process lost its windows"


def test_messages_that_wait_in_memory_only_are_reported(
    serve: Callable[..., Service], pristine_bundle: Path, tmp_path: Path
) -> None:
    if Path(STATE).exists():
        pytest.skip(f"{STATE} is there: this machine is set up as a device")
    service = serve("--bundle", pristine_bundle, "--camera", LIVE, "--broker", f"127.0.0.1:{free_port()}")
    service.wait_for("messages wait in memory only")
    assert service.end() == 0
    assert not Path(STATE).exists()
