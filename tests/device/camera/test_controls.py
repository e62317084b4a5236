"""Controls of a camera, against stand-ins for a V4L2 driver's ioctl and for Picamera2: no such device is here."""

from __future__ import annotations

import errno
import logging
import struct
from pathlib import Path
from typing import Any

import pytest

import eyas_device.camera
from eyas_device.camera import open_camera, open_configured
from eyas_device.camera.controls import control_name, for_libcamera, set_v4l2
from eyas_device.config import CameraSection, read_config
from eyas_device.errors import ConfigError
from tests.device.camera.test_kinds import PICAMERA2
from tests.support.servers import taken

INTEGER, BOOLEAN, MENU, HEADING = 1, 2, 3, 6


class Driver:
    """A USB camera: id -> (title, type, minimum, maximum, flags). Written as the kernel's header lays it out."""

    controls: dict[int, tuple[str, int, int, int, int]] = {  # noqa: RUF012 - never written
        0x00980900: ("Brightness", INTEGER, -64, 64, 0),
        0x0098090C: ("White Balance, Automatic", BOOLEAN, 0, 1, 0),
        0x00980913: ("Gain", INTEGER, 0, 100, 0),
        0x0098091A: ("White Balance Temperature", INTEGER, 2800, 6500, 0),
        0x00980925: ("Sensor Temperature", INTEGER, 0, 100, 4),  # read only
        0x00980926: ("Old", INTEGER, 0, 1, 1),  # disabled
        0x009A0001: ("Camera Controls", HEADING, 0, 0, 0),
        0x009A0901: ("Auto Exposure", MENU, 0, 3, 0),
        0x009A0902: ("Exposure Time, Absolute", INTEGER, 3, 2047, 0),
    }

    def __init__(self) -> None:
        self.written: list[tuple[int, int]] = []
        self.stuck = False

    def __call__(self, device: int, request: int, data: bytearray) -> int:
        if request == 0xC0445624:
            assert len(data) == 68
            (asked,) = struct.unpack_from("=I", data, 0)
            number = next((number for number in sorted(self.controls) if number > asked & 0x7FFFFFFF), None)
            if not asked & 0x80000000 or number is None:
                raise OSError(errno.EINVAL, "no more")
            title, kind, low, high, flags = self.controls[number]
            struct.pack_into("=II", data, 0, number, kind)
            data[8:40] = title.encode().ljust(32, b"\0")
            struct.pack_into("=iiii", data, 40, low, high, 1, 0)
            struct.pack_into("=I", data, 56, flags)
            return 0
        assert request == 0xC008561C and len(data) == 8
        number, value = struct.unpack("=Ii", data)
        if self.stuck or (number == 0x009A0901 and value not in (1, 3)):
            raise OSError(errno.EBUSY if self.stuck else errno.EINVAL, "no")
        self.written.append((number, value))
        return 0


def set_on(driver: Driver, **wanted: float | str) -> list[str]:
    return set_v4l2("/dev/null", wanted, ioctl=driver)


def test_controls_are_set_by_short_names_and_by_those_of_v4l2_ctl() -> None:
    driver = Driver()
    assert set_on(driver, exposure=200, gain=12, brightness=-3.0, white_balance_temperature=4000) == []
    assert driver.written == [
        (0x009A0901, 1),  # manual, before the value
        (0x009A0902, 200),
        (0x00980913, 12),
        (0x00980900, -3),
        (0x0098091A, 4000),
    ]


def test_auto_switches_the_automatic_mode_on() -> None:
    driver = Driver()
    assert set_on(driver, exposure="auto", white_balance="auto") == []
    assert driver.written == [(0x009A0901, 3), (0x0098090C, 1)]


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("exposure", 90_000, "exposure = 90000: 3 to 2047 is allowed"),
        ("exposure", 2, "exposure = 2: 3 to 2047 is allowed"),
        ("brightness", "auto", "brightness = auto: this camera has no automatic mode of it; -64 to 64 is allowed"),
        ("focus", "auto", "focus = auto: this camera has no automatic mode of it; this camera has exposure, gain"),
        ("sensor_temperature", 5, "sensor_temperature = 5: it can only be read"),
        ("focus", 3, "focus: no such control; this camera has exposure, gain, white_balance, brightness"),
        ("old", 1, "old: no such control"),
        ("camera_controls", 1, "camera_controls: no such control"),
    ],
)
def test_what_cannot_be_set_is_named_with_what_is_allowed(name: str, value: Any, problem: str) -> None:
    driver = Driver()
    (found,) = set_on(driver, **{name: value})
    assert found.startswith(problem) and driver.written == []
    assert set_on(driver, **{name: value}, gain=7) == [found] and driver.written == [(0x00980913, 7)], "the rest is set"


def test_a_driver_that_refuses_is_quoted() -> None:
    driver = Driver()
    driver.stuck = True
    assert set_on(driver, gain=5) == ["gain = 5: refused by the driver (Device or resource busy); 0 to 100 is allowed"]
    assert set_v4l2("/nowhere", {"gain": 1}) == ["its controls cannot be set (No such file or directory)"]
    assert set_v4l2("/nowhere", {}) == []


@pytest.mark.parametrize(
    ("title", "name"),
    [
        (b"Exposure Time, Absolute\0x", "exposure_time_absolute"),
        (b"Focus, Automatic Continuous", "focus_automatic_continuous"),
    ],
)
def test_names_are_those_of_v4l2_ctl(title: bytes, name: str) -> None:
    assert control_name(title) == name


def test_libcamera_gets_its_own_names_and_kinds() -> None:
    known = {
        "ExposureTime": (14, 66666, None),
        "AeEnable": (False, True, True),
        "AnalogueGain": (1.0, 16.0, 1.0),
        "LensPosition": (0.0, 15.0, 1.0),
        "AfMode": (0, 2, 0),
        "NoiseReductionMode": (0, 4, 0),
        "HdrMode": ((0, 1), (2, 3), None),
    }
    values, problems = for_libcamera({"exposure": 5000.0, "focus": 2.5, "noise_reduction_mode": 2.0}, known)
    assert problems == []
    assert values == {
        "ExposureTime": 5000,
        "AeEnable": False,
        "LensPosition": 2.5,
        "AfMode": 0,
        "NoiseReductionMode": 2,
    }
    assert isinstance(values["ExposureTime"], int) and isinstance(values["NoiseReductionMode"], int)
    assert for_libcamera({"exposure": "auto", "focus": "auto"}, known)[0] == {
        "AeEnable": True,
        "ExposureTime": 0,
        "AfMode": 2,
    }
    _, problems = for_libcamera({"gain": 99.0, "iris": 1.0, "white_balance": "auto"}, known)
    assert [problem.partition(";")[0] for problem in problems] == [
        "gain = 99: 1.0 to 16.0 is allowed",
        "iris: no such control (Iris)",
        "white_balance = auto: this camera has no automatic mode of it",
    ]


def test_a_refused_control_is_logged_once_and_the_camera_delivers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "picamera2.py").write_text(PICAMERA2)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(eyas_device.camera, "_warned", set())
    section = CameraSection(source="picamera2:?size=64x48", controls={"gain": 2.0, "zoom_level": 3.0})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with open_configured(section) as camera:
                assert taken(camera).pixels().shape == (48, 64, 3)
        with open_camera("fake:", controls={"gain": 1.0}):
            pass
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("camera picamera2:?size=64x48: zoom_level: no such control (ZoomLevel); this camera has ")
    assert second == "camera fake:: fake cameras have no controls; those of v4l2 and picamera2 can be set"


def test_controls_are_read_from_the_configuration(tmp_path: Path) -> None:
    path = tmp_path / "device.toml"
    path.write_text('[camera]\nsource = "v4l2:0"\n[camera.controls]\nexposure = 200\nwhite_balance = "auto"\n')
    assert read_config(path).camera.controls == {"exposure": 200.0, "white_balance": "auto"}


@pytest.mark.parametrize("line", ['gain = "high"', "gain = [1]", "Gain = 3", "gain = nan", "gain = true"])
def test_an_impossible_control_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "device.toml"
    path.write_text(f"[camera.controls]\n{line}\n")
    with pytest.raises(ConfigError, match=r"\[camera\] controls"):
        read_config(path)
