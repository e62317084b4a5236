"""What the board does in the tests of its camera: reads Linux's test driver `vivid` with `eyas_device`, and breaks it.

`python camera_scenes.py SCENE` runs on the board, as root, with `eyas_device` importable, and prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from eyas_device.camera.v4l2 import V4L2Reader
from eyas_device.camera.v4l2_pixels import LAYOUTS
from eyas_device.errors import CameraError, EyasError
from eyas_device.telemetry.local import ask

NODE = Path("/dev/video0")
BY_PATH = "/dev/v4l/by-path/platform-vivid.0-video-index0"
_DRIVER = Path("/sys/bus/platform/drivers/vivid")
_ROOM = np.zeros(1 << 23, dtype=np.uint8)
_NOBODY = 65534
_WAIT_S = 180.0
"""How long the agent may take for anything where other programs use the processor; alone it takes seconds."""


def run(*words: str) -> str:
    """Run a program; an error if it fails."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def control(**values: int) -> None:
    """Set controls of the first camera."""
    for name, value in values.items():
        run(
            "v4l2-ctl",
            "--device",
            str(next(iter(sorted(Path("/dev").glob("video*"))))),
            "--set-ctrl",
            f"{name}={value}",
        )


def load(*options: str) -> None:
    """Load the driver again; with options in place of those of the board."""
    subprocess.run(["rmmod", "vivid"], check=False, capture_output=True)
    run("modprobe", "vivid", *options)
    run("udevadm", "settle")


def read(**settings: Any) -> dict[str, Any]:
    """One frame of a device: its size, the colour of each of eight vertical bars, and what was said; or the error."""
    try:
        reader = V4L2Reader({"source": str(NODE), **settings})
    except CameraError as error:
        return {"error": str(error)}
    try:
        reader.grab()
        image = reader.retrieve(_ROOM)
        assert not isinstance(image, bytes)
        height, width = image.shape[:2]
        bars = [image[19 * height // 20, (2 * bar + 1) * width // 16].tolist() for bar in range(8)]
        form = reader.format
        return {
            "size": [width, height],
            "bars": bars,
            "note": reader.note,
            "code": form.code,
            "encoding": form.encoding,
        }
    except CameraError as error:
        return {"error": str(error)}
    finally:
        reader.close()


def offered() -> list[str]:
    """The formats of the driver, as `format=` names them."""
    lines = run("v4l2-ctl", "--device", str(NODE), "--list-formats").splitlines()
    return [line.split("'")[1].strip().replace(" -BE", "-BE").lower() for line in lines if "'" in line]


def formats() -> dict[str, Any]:
    """Every format of the driver, as a webcam with one plane and with several, and as an HDMI input."""
    found: dict[str, Any] = {}
    for kind, options in (
        ("webcam", ["multiplanar=1"]),
        ("planes", ["multiplanar=2"]),
        ("hdmi", ["num_inputs=1", "input_types=0x3"]),
    ):
        load(*options)
        chosen = (
            [code for code in offered() if code.upper() in LAYOUTS]
            if kind == "webcam"
            else ("yuyv", "nv12", "yv12", "rgb3")
        )
        found[kind] = {code: read(format=code) for code in chosen}
    load()
    for space, name in ((1, "709"), (4, "2020"), (6, "240")):
        for span in (1, 2):
            control(colorspace=space, quantization=span)
            found[f"{name}, quantization {span}"] = {code: read(format=code) for code in ("yuyv", "yv12", "rgb3")}
    load()
    found["requests"] = {
        "size": read(size=[1300, 700]),
        "rate": read(size=[1280, 720], fps=60),
        "both": read(size=[320, 180], fps=12.5),
        "plain": read(),
    }
    return found


def inputs() -> dict[str, Any]:
    """An HDMI and an analogue input whose signal comes, goes and changes while it is read."""
    found: dict[str, Any] = {}
    for kind, options, mode in (
        ("hdmi", ["num_inputs=1", "input_types=0x3"], "dv_timings_signal_mode"),
        ("tv", ["num_inputs=1", "input_types=0x1"], "standard_signal_mode"),
    ):
        load(*options)
        found[kind] = {"signal": read(), "while it streams": "", "modes": []}
        reader = V4L2Reader({"source": str(NODE)})
        reader.grab()
        control(**{mode: 1})
        try:
            for _ in range(20):
                reader.grab()
        except CameraError as error:
            found[kind]["while it streams"] = str(error)
        reader.close()
        for value in (1, 2, 3) if kind == "hdmi" else (1,):
            control(**{mode: value})
            found[kind]["modes"].append(read())
        control(**{mode: 0})
        found[kind]["again"] = read()
    load()
    return found


def nodes() -> dict[str, Any]:
    """Nodes that are no camera, that may not be opened, that another program reads; two cameras."""
    found: dict[str, Any] = {}
    load("node_types=0x100")
    found["output"] = read()
    load("node_types=0x20001")
    found["metadata"] = read(source="/dev/video1")
    load("n_devs=2", "node_types=0x1,0x1", "input_types=0x0,0x0")
    run("v4l2-ctl", "--device", "/dev/video1", "--set-ctrl", "test_pattern=8")
    first, second = V4L2Reader({"source": "/dev/video0"}), read(source="/dev/video1")
    first.grab()
    found["busy"], found["second"] = read(), second
    first.close()
    load()
    NODE.chmod(stat.S_IRUSR | stat.S_IWUSR)
    os.seteuid(_NOBODY)
    found["closed"] = read()
    os.seteuid(0)
    (_DRIVER / "unbind").write_text("vivid.0")
    run("udevadm", "settle")
    found["absent"] = read()
    with NODE.open("rb") if NODE.exists() else contextlib.nullcontext():
        (_DRIVER / "bind").write_text("vivid.0")
    run("udevadm", "settle")
    load()
    found["other number"] = read(source="/dev/video7")
    return found


class Agent:
    """`eyas-device run` on a camera, with its predictions, log and state."""

    def __init__(self, folder: Path, bundle: str, settings: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        config = folder / "device.toml"
        config.write_text(f'[device]\nstate = "{folder}"\n[model]\nbundle = "{bundle}"\n[camera]\n{settings}')
        command = [sys.executable, "-m", "eyas_device", "run", "--config", str(config), "--json", "--fps", "10"]
        self._folder, self._frames, self.log = folder, 0, ""
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for reads in (self._count, self._keep):
            threading.Thread(target=reads, daemon=True).start()

    def delivers(self) -> float:
        """Wait for three more predictions; returns how long that took, seconds."""
        begun, wanted = time.monotonic(), self._frames + 3
        self._until(lambda: self._frames >= wanted, "no predictions")
        return time.monotonic() - begun

    def state(self, *wanted: str, reason: str = "") -> str:
        """Wait until the status has one of these camera states, with a reason that contains `reason`."""
        last = ""

        def reached() -> bool:
            nonlocal last
            try:
                camera = ask(self._folder, timeout_s=10).camera
            except EyasError as error:  # it is starting
                last = str(error)
                return False
            last = f"{camera.state}: {camera.reason}"
            return camera.state in wanted and reason in camera.reason

        try:
            self._until(reached, f"the camera is not {' or '.join(wanted)}")
        except AssertionError as error:
            raise AssertionError(f"{error}, but {last}") from None
        return last

    def stop(self) -> int:
        """End it in order."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(60)

    def _until(self, reached: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + _WAIT_S
        while not reached():
            assert self._process.poll() is None, f"the agent ended: {self.log}"
            assert time.monotonic() < deadline, f"{problem} within {_WAIT_S:g} s; {self.log}"
            time.sleep(0.1)

    def _count(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            json.loads(line)
            self._frames += 1

    def _keep(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.log += line


@contextlib.contextmanager
def agent(folder: Path, bundle: str, settings: str) -> Iterator[Agent]:
    """An agent that ends with the block."""
    running = Agent(folder, bundle, settings)
    try:
        yield running
    finally:
        running.stop()


def faults(bundle: str) -> dict[str, Any]:
    """One agent through everything that befalls a camera; seconds until it delivers again after each."""
    load()
    settings = f'source = "v4l2:{BY_PATH}?fps=10"\ntimeout_s = 2.0\nfrozen_s = 3.0\n'
    settings += "[camera.controls]\nbrightness = 120\ngain = 90\nexposure = 7\nhue = 500\n"
    states: dict[str, str] = {}
    back: dict[str, float] = {}
    with agent(Path("/run/eyas-test"), bundle, settings) as running:
        states["start"] = running.state("delivering")
        running.delivers()
        shown = run("v4l2-ctl", "--device", str(NODE), "--get-ctrl", "brightness,gain,gain_automatic").split()
        controls = {name.rstrip(":"): int(value) for name, value in zip(shown[::2], shown[1::2], strict=True)}

        def scene(name: str, *wanted: str, reason: str = "", end: Callable[[], None] | None = None) -> None:
            print(f"{time.monotonic():.1f} {name}", file=sys.stderr, flush=True)  # shown if the scene fails
            if wanted:
                states[name] = running.state(*wanted, reason=reason)
            if end is not None:
                end()
            back[name] = running.delivers()

        control(wrap_timestamp=1, wrap_sequence_number=1)
        scene("wrapped time stamps")
        control(osd_text_mode=2, test_pattern=5)
        scene("dark", "black", end=lambda: control(osd_text_mode=0, test_pattern=0))
        control(osd_text_mode=2)
        scene("frozen", "frozen", reason="the same image for 3 s", end=lambda: control(osd_text_mode=0))
        control(percentage_of_dropped_buffers=100)
        scene("silent", "lost", reason="no frame came", end=lambda: control(percentage_of_dropped_buffers=0))
        control(inject_fatal_streaming_error=1)
        scene("stream error", "lost", reason="its driver reports an error (Input/output error)")
        control(disconnect=1)
        scene("disconnected", "lost", reason="is the camera plugged in?")

        held = NODE.open("rb")  # an open node keeps its number
        (_DRIVER / "unbind").write_text("vivid.0")
        states["unplugged"] = running.state("lost", reason="does not exist")
        (_DRIVER / "bind").write_text("vivid.0")
        run("udevadm", "settle")
        number = Path(BY_PATH).readlink().name
        back["plugged in as another node"] = running.delivers()
        held.close()
        (_DRIVER / "unbind").write_text("vivid.0")
        running.state("lost", reason="does not exist")
        load("num_inputs=1", "input_types=0x3")
        control(dv_timings=4, dv_timings_signal_mode=4)  # an emulated processor is slow at 1280x720 with 60 frames/s
        scene("another size", "resized", reason="720x576 pixels, 640x480 at first")
        control(dv_timings_signal_mode=1)
        scene("no signal", "lost", reason="no signal at its input HDMI", end=lambda: control(dv_timings_signal_mode=4))
    log = running.log
    load()
    return {"states": states, "back_s": back, "node": number, "controls": controls, "log": log}


def verbs(bundle: str) -> dict[str, Any]:
    """The doctor and a snapshot on the camera."""
    load()
    found: dict[str, Any] = {}
    for name, words in (
        ("doctor", ["doctor", "--bundle", bundle, "--camera", "v4l2:0?size=320x180"]),
        (
            "snapshot",
            ["snapshot", "--bundle", bundle, "--camera", "v4l2:0?size=320x180", "--out", "/run/eyas-test/shot"],
        ),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "eyas_device", *words], check=False, capture_output=True, text=True
        )
        found[name] = {"code": done.returncode, "out": done.stdout, "err": done.stderr}
    return found


SCENES: dict[str, Callable[..., dict[str, Any]]] = {
    "formats": formats,
    "inputs": inputs,
    "nodes": nodes,
    "faults": faults,
    "verbs": verbs,
}

if __name__ == "__main__":
    print(json.dumps(SCENES[sys.argv[1]](*sys.argv[2:])))
