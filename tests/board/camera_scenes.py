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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from eyas_device.camera.v4l2 import V4L2Reader
from eyas_device.camera.v4l2_pixels import LAYOUTS
from eyas_device.errors import CameraError, EyasError
from eyas_device.telemetry.local import ask

NODE = Path("/dev/video0")
_BY_PATH = Path("/dev/v4l/by-path/platform-vivid.0-video-index0")
"""Follows the camera; the driver's second one would take the same name."""
_SECOND = Path("/dev/video1")
_DRIVER = Path("/sys/bus/platform/drivers/vivid")
_ROOM = np.zeros(1 << 23, dtype=np.uint8)
_NOBODY = 65534
_VGA, _PAL = 0, 4
"""Timings of the driver's HDMI input: 640x480, 720x576. An emulated processor is slow at its default, 1280x720 with 60
frames/s."""
_FEW = "?size=320x180&fps=12.5"
"""What a webcam is asked for where neither matters: images that cost little."""
_WAIT_S = 180.0
"""How long the agent may take for anything where other programs use the processor; alone it takes seconds."""


def run(*words: str) -> str:
    """Run a program; an error if it fails."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def control(node: Path = NODE, /, **values: int) -> None:
    """Set controls of a camera."""
    for name, value in values.items():
        run("v4l2-ctl", "--device", str(node), "--set-ctrl", f"{name}={value}")


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
        command = [sys.executable, "-m", "eyas_device", "run", "--config", str(config), "--json", "--fps", "4"]
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


class Watched:
    """An agent on one of the driver's cameras, and what became of it in each scene."""

    def __init__(self, node: Path, bundle: str, settings: str = "", *, asks: str = "") -> None:
        self.node = node
        self.states: dict[str, str] = {}
        self.back_s: dict[str, float] = {}
        """Until it delivered again, seconds."""
        settings = f'source = "v4l2:{self.node}{asks}"\ntimeout_s = 2.0\nfrozen_s = 3.0\n{settings}'
        self.agent = Agent(Path(f"/run/eyas-test/{node.name}"), bundle, settings)

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.agent.stop()

    def starts(self) -> None:
        """Wait for its first predictions."""
        self.states[f"start of {self.node.name}"] = self.agent.state("delivering")
        self.agent.delivers()

    def scene(self, name: str, *wanted: str, reason: str = "", **then: int) -> None:
        """Wait for a camera state, set its controls, and wait for predictions."""
        print(f"{time.monotonic():.1f} {name}", file=sys.stderr, flush=True)  # shown if the scene fails
        if wanted:
            self.states[name] = self.agent.state(*wanted, reason=reason)
        self.control(**then)
        self.back_s[name] = self.agent.delivers()

    def control(self, **values: int) -> None:
        """Set its controls."""
        control(self.node, **values)


def disturbed(camera: Watched) -> None:
    """What a camera sees, or how its driver works, is not as it should be."""
    camera.starts()
    camera.control(wrap_timestamp=1, wrap_sequence_number=1)
    camera.scene("wrapped time stamps")
    camera.control(osd_text_mode=2, test_pattern=5)
    camera.scene("dark", "black", osd_text_mode=0, test_pattern=0)
    camera.control(osd_text_mode=2)
    camera.scene("frozen", "frozen", reason="the same image for 3 s", osd_text_mode=0)
    camera.control(percentage_of_dropped_buffers=100)
    camera.scene("silent", "lost", reason="no frame came", percentage_of_dropped_buffers=0)
    camera.control(inject_fatal_streaming_error=1)
    camera.scene("stream error", "lost", reason="its driver reports an error (Input/output error)")


def another_signal(camera: Watched) -> None:
    """A bad plug, and a signal that changes its size and goes."""
    camera.starts()
    camera.control(disconnect=1)
    camera.scene("disconnected", "lost", reason="is the camera plugged in?")
    camera.control(dv_timings=_PAL)
    camera.scene("another size", "resized", reason="720x576 pixels, 640x480 at first")
    camera.control(dv_timings_signal_mode=1)
    camera.scene("no signal", "lost", reason="no signal at its input HDMI", dv_timings_signal_mode=4)


def replugged(camera: Watched) -> list[str]:
    """The camera is unplugged, and plugged in again while a program still has its node; names of the nodes."""
    camera.starts()
    before = camera.node.readlink().name
    with camera.node.open("rb"):  # an open node keeps its number
        (_DRIVER / "unbind").write_text("vivid.0")
        camera.states["unplugged"] = camera.agent.state("lost", reason="does not exist")
        (_DRIVER / "bind").write_text("vivid.0")
        run("udevadm", "settle")
        after = camera.node.readlink().name
        camera.scene("plugged in as another node")
    return [before, after]


def faults(bundle: str) -> dict[str, Any]:
    """Everything that befalls a camera, much of it on two of them side by side: most of it is waiting."""
    load("n_devs=2", "node_types=0x1,0x1", "num_inputs=1,1", "input_types=0x0,0x3")
    # the signal has 60 frames/s: most of them are dropped before an emulated processor draws them
    control(_SECOND, dv_timings=_VGA, dv_timings_signal_mode=4, percentage_of_dropped_buffers=80)
    settings = "[camera.controls]\nbrightness = 120\ngain = 90\nexposure = 7\nhue = 500\n"
    with (
        Watched(NODE, bundle, settings, asks=_FEW) as webcam,
        Watched(_SECOND, bundle) as hdmi,
        ThreadPoolExecutor(2) as pool,
    ):
        for played in [pool.submit(disturbed, webcam), pool.submit(another_signal, hdmi)]:
            played.result()
        shown = run("v4l2-ctl", "--device", str(webcam.node), "--get-ctrl", "brightness,gain,gain_automatic").split()
    load()
    with Watched(_BY_PATH, bundle, asks=_FEW) as plugged:
        nodes = replugged(plugged)
    load()
    cameras = (webcam, hdmi, plugged)
    return {
        "states": {name: state for camera in cameras for name, state in camera.states.items()},
        "back_s": {name: seconds for camera in cameras for name, seconds in camera.back_s.items()},
        "log": "".join(camera.agent.log for camera in cameras),
        "controls": {name.rstrip(":"): int(value) for name, value in zip(shown[::2], shown[1::2], strict=True)},
        "nodes": nodes,
    }


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
