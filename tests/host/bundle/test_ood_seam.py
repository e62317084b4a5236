"""From a camera whose images become dark to the status that the broker retains: agent, loop, reporter and mosquitto."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import msgspec
import pytest

from eyas_device.agent.app import Agent, load_config
from eyas_device.agent.loop import FramePrediction, Listener
from eyas_device.bundle import REFERENCE
from eyas_device.preprocess import Pixels
from eyas_device.telemetry.messages import Status
from eyas_host.bundle.reference import fit_reference, write_reference
from eyas_host.evaluation.changes import light
from eyas_host.fleet.watch.fleet_state import DeviceState
from tests.device.agent.test_reporter import Inbox, inbox
from tests.device.conftest import broker, make_broker  # noqa: F401 - fixtures
from tests.support import tiny
from tests.support.brokers import Broker
from tests.support.bundles import entry
from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures


def image(number: int) -> Pixels:
    return tiny.draw_shape(tiny.LABELS[number % 3], 20_000 + number)


class Scene:
    """An MJPEG camera over HTTP; `dark` takes nine tenths of its light."""

    def __init__(self) -> None:
        self.dark, self._number = False, 0
        scene = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=x")
                self.end_headers()
                try:
                    while True:
                        data = scene.next()
                        self.wfile.write(b"--x\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
                        self.wfile.write(data + b"\r\n")
                        time.sleep(0.01)
                except OSError:
                    return

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.spec = f"mjpeg:http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def next(self) -> bytes:
        self._number += 1
        pixels = image(self._number)
        return bytes(cv2.imencode(".jpg", light(pixels, 0.1) if self.dark else pixels)[1].tobytes())

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


@pytest.fixture
def referenced(bundle_root: Path, edit_manifest: Callable[..., None]) -> Path:  # noqa: F811 - the fixtures
    """The tiny bundle with the reference that packing writes."""
    train, validation = ([image(offset + n) for n in range(150)] for offset in (30_000, 40_002))
    labels = [tiny.LABELS[n % 3] for n in range(150)]
    reference = fit_reference(train, validation, tiny.SPEC, groups=((labels,), (labels,)))
    write_reference(reference, bundle_root / REFERENCE)
    edit_manifest(reference=msgspec.to_builtins(entry(bundle_root / REFERENCE)))
    return bundle_root


def agent_for(spec: str, bundle: Path, state: Path, port: int) -> Agent:
    config = load_config(
        None,
        device={"name": "cam", "site": "s", "state": str(state)},
        camera={"source": spec},
        model={"bundle": str(bundle)},
        telemetry={"broker": f"127.0.0.1:{port}", "window_s": 600.0},
    )
    return Agent(config)


def next_status(box: Inbox, true: Callable[[Status], object]) -> Status:
    while True:
        status: Status = box.next("status", 20)[2]
        if true(status):
            return status


def test_a_live_camera_that_becomes_dark(
    scene: Scene,
    referenced: Path,
    tmp_path: Path,
    broker: Broker,  # noqa: F811 - the fixture
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Within thirty measured frames the retained status says so, without any other event; and takes it back."""
    caplog.set_level(logging.INFO)
    measured: list[int] = []
    seen: list[Status] = []
    with inbox(broker.port) as box, agent_for(scene.spec, referenced, tmp_path, broker.port) as agent:
        agent.monitor.ood.interval_s = 0.02
        agent.monitor.ood.on_descriptor.append(lambda _: measured.append(1))

        def watch() -> None:
            try:
                seen.append(next_status(box, lambda status: status.ood is False))
                before = len(measured)
                scene.dark = True
                seen.append(next_status(box, lambda status: status.ood))
                measured.append(0)
                counts.append(len(measured) - before)
                scene.dark = False
                seen.append(next_status(box, lambda status: status.ood is False))
            finally:
                agent.loop.stop()

        counts: list[int] = []
        watcher = threading.Thread(target=watch)
        watcher.start()
        agent.run()
        watcher.join()
    assert [status.ood for status in seen] == [False, True, False]
    assert seen[1].camera == "delivering" and seen[1].ood_reason.startswith("darker than ")
    assert seen[1].ood_reason.endswith("% of the training images")
    assert (seen[0].ood_reason, seen[2].ood_reason) == ("", "")
    assert counts[0] <= 60, "frames that were in flight when it became dark, and thirty"
    assert DeviceState(site="s", device="cam", status=seen[1]).condition(0.0) == "ood", "`eyas watch` does not show it"
    lines = [record for record in caplog.records if "distribution" in record.getMessage()]
    assert [record.levelname for record in lines] == ["WARNING", "INFO"], "a line for each change, not for each frame"
    assert "darker than " in lines[0].getMessage()


def test_a_folder_is_judged_by_its_frames(
    referenced: Path,
    tmp_path: Path,
    broker: Broker,  # noqa: F811 - the fixture
) -> None:
    """Every frame of a folder counts, however fast it is read: twelve good images, then thirty dark ones."""
    (folder := tmp_path / "images").mkdir()
    for number in range(42):
        pixels = image(number)
        cv2.imwrite(str(folder / f"{number:03d}.png"), light(pixels, 0.1) if number >= 12 else pixels)

    class Turn(Listener):
        def on_prediction(self, predicted: FramePrediction) -> None:
            judgement = agent.monitor.ood.judgement()
            assert judgement is not None
            judged.append(judgement.ood)

    judged: list[bool] = []
    with inbox(broker.port) as box, agent_for(f"folder:{folder}", referenced, tmp_path, broker.port) as agent:
        agent.loop.listeners.append(Turn())
        agent.run()
        final = agent.monitor.health()
    assert final.ood and final.ood_reason.startswith("darker than") and final.ood_images == 30
    assert judged[:12] == [False] * 12 and judged[-1]
    assert next_status(box, lambda status: status.state == "offline").ood_reason == final.ood_reason
