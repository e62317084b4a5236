"""A camera's credentials stay on the device: each kind of camera fails, in the real agent with a real broker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from eyas_device.cli import main
from eyas_device.config import read_config
from eyas_device.doctor import Context, examine, probes, software
from eyas_device.updates.slots import Slots
from tests.device.agent.test_app import Service, serve  # noqa: F401 - fixture
from tests.device.agent.test_reporter import inbox
from tests.support.brokers import Broker

SECRET = "S3cret-9z"
LIVE = {
    "mjpeg": f"mjpeg:http://admin:{SECRET}@127.0.0.1:9/stream",
    "mjpeg query": f"mjpeg:http://127.0.0.1:9/video.cgi?usr=admin&pwd={SECRET}",
    "rtsp": f"rtsp://127.0.0.1:9/user=admin_password={SECRET}_channel=1_stream=0.sdp",
    "gst": f"gst:rtspsrc location=rtsp://admin:{SECRET}@127.0.0.1:9/live user-pw={SECRET} ! decodebin ! appsink",
}
WRONG = {
    "unknown kind": f"http://admin:{SECRET}@camera/stream",
    "mjpeg": f"mjpeg:ftp://admin:{SECRET}@camera/stream",
    "rtsp": f"rtsp://admin:12 {SECRET}@camera/live",
    "gst": f"gst:rtspsrc location=rtsp://camera user-id=admin user-pw='x {SECRET}' ! fakesink",
    "v4l2": f"v4l2:0?password={SECRET}",
    "picamera2": f"picamera2:0?pwd={SECRET}",
    "folder": f"folder:/nowhere/token={SECRET}/images",
    "video": f"video:rtsp://admin:{SECRET}@camera/live",
    "fake": f"fake:?key={SECRET}",
}


@pytest.fixture
def config(tmp_path: Path, pristine_bundle: Path, broker: Broker) -> Callable[[str], Path]:
    """Write a configuration with a camera, for a device with a good model."""
    Slots(tmp_path / "state").install(pristine_bundle)

    def write(spec: str) -> Path:
        path = tmp_path / "device.toml"
        path.write_text(
            f'[device]\nstate = "{tmp_path / "state"}"\nname = "d"\n[camera]\nsource = {json.dumps(spec)}\n'
            f'timeout_s = 1\n[telemetry]\nbroker = "127.0.0.1:{broker.port}"\n'
        )
        return path

    return write


@pytest.mark.parametrize("kind", LIVE)
def test_a_failing_camera_shows_no_credentials(
    kind: str,
    config: Callable[[str], Path],
    serve: Callable[..., Service],  # noqa: F811 - fixture
    broker: Broker,
) -> None:
    path = config(LIVE[kind])
    with inbox(broker.port) as messages:
        service = serve("--config", path)
        service.wait_for("camera lost")
        status = None
        while status is None or status.camera != "lost":
            status = messages.next("status")[2]
    assert service.end() == 0
    assert status.reason and SECRET not in status.reason and "admin" not in status.reason
    assert "127.0.0.1:9" in status.reason, "the address itself stays"
    output = "\n".join(service.lines)
    assert SECRET not in output and "admin" not in output


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_specification_shows_no_credentials(
    kind: str, config: Callable[[str], Path], pristine_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["run", "--config", str(config(WRONG[kind])), "--bundle", str(pristine_bundle)]) != 0
    except SystemExit as end:
        assert end.code
    shown = "".join(capsys.readouterr())
    assert "camera" in shown and SECRET not in shown and "Traceback" not in shown


@pytest.mark.parametrize("spec", [LIVE["mjpeg query"], LIVE["gst"], WRONG["v4l2"], WRONG["video"]])
def test_the_doctor_shows_no_credentials(spec: str, config: Callable[[str], Path]) -> None:
    context = Context(config=read_config(config(spec)))
    checks = [software.configuration, probes.camera, probes.broker]
    results = {result.check: result for result in examine(context, checks)}
    assert results["camera"].status == "red" and "camera" in results["camera"].finding
    assert SECRET not in str(results) and "admin" not in str(results)
