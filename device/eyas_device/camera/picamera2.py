"""Raspberry Pi cameras through libcamera, with the system's Picamera2."""

from __future__ import annotations

import importlib
import re
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.controls import Wanted, for_libcamera
from eyas_device.camera.spec import RATE, SIZE, parse_options, parse_rate, parse_size
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError, CameraSpecError

PRELOAD = ("picamera2",)
"""Imported before the process becomes another user."""
_USAGE = "picamera2:[NUMBER]?size=WIDTHxHEIGHT&fps=N"
_INSTALL = (
    "sudo apt install python3-picamera2, and a virtual environment created with the system's Python and "
    "--system-site-packages (it is not on PyPI for all systems)"
)


class Settings(msgspec.Struct, frozen=True):
    """Configuration of Picamera2."""

    number: int = 0
    size: tuple[int, int] = (1640, 1232)
    """Width and height, pixels."""
    fps: float | None = None
    controls: dict[str, float | str] = {}
    """Control -> value or `auto`."""


class Picamera2Camera(SubprocessCamera):
    """A camera on the CSI connector, read in a separate process."""

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S, controls: Wanted | None = None) -> Picamera2Camera:
        """Open `picamera2:?size=1640x1232&fps=10`; a number before the question mark selects one of several cameras.

        Raises `CameraSpecError` for a wrong specification, and `CameraError` without Picamera2 or if
        the camera does not start.
        """
        settings = msgspec.structs.replace(cls.parse(rest), controls=dict(controls or {}))
        return cls(f"{__name__}:Picamera2Reader", settings, shown=f"picamera2:{rest}", timeout_s=timeout_s)

    @staticmethod
    def parse(rest: str) -> Settings:
        """Number, size and rate of a specification. Raises `CameraSpecError` for a wrong one."""
        shown = f"picamera2:{rest}"
        number, _, query = rest.partition("?")
        if not re.fullmatch(r"\d{0,2}", number, re.ASCII):
            raise CameraSpecError(f"camera {shown}: {number!r} is not a camera number; allowed are {_USAGE}")
        values = parse_options(query, {"size": SIZE, "fps": RATE}, spec=shown, usage=_USAGE)
        return Settings(
            number=int(number or 0),
            size=parse_size(values["size"], spec=shown, usage=_USAGE) if "size" in values else Settings().size,
            fps=parse_rate(values["fps"], spec=shown, usage=_USAGE) if "fps" in values else None,
        )


class Picamera2Reader:
    """Picamera2 in its video configuration; its format RGB888 is BGR in memory."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Start the camera. Raises `CameraError` without Picamera2 or if it does not start."""
        requested = msgspec.convert(settings, Settings)
        try:
            library = importlib.import_module("picamera2")
        except ImportError as error:
            raise CameraError(f"Picamera2 cannot be imported ({error}); {_INSTALL}") from None
        cameras = library.Picamera2.global_camera_info()
        if requested.number >= len(cameras):
            raise CameraError(
                f"libcamera finds {len(cameras)} cameras, none with number {requested.number}; check the cable, and "
                "`rpicam-hello --list-cameras`"
            )
        self.note = ""
        self.problems: list[str] = []
        """Controls that could not be set."""
        self._request: Any = None
        self._camera: Any = None
        try:
            self._camera = library.Picamera2(requested.number)
            values: dict[str, Any] = {}
            if requested.controls:
                values, self.problems = for_libcamera(requested.controls, self._camera.camera_controls)
            if requested.fps is not None:
                values["FrameRate"] = requested.fps
            self._camera.configure(
                self._camera.create_video_configuration(
                    main={"size": requested.size, "format": "RGB888"},
                    controls=values,
                    queue=False,
                )
            )
            self._camera.start()
        except (RuntimeError, OSError, ValueError) as error:
            self.close()
            raise CameraError(f"libcamera cannot start it ({error}); does another program use it?") from None
        size = tuple(self._camera.camera_configuration()["main"]["size"])
        if size != requested.size:
            self.note = f"{size[0]}x{size[1]}, the nearest supported size"

    def grab(self) -> bool:
        """Wait for the next frame."""
        self._release()
        self._request = self._camera.capture_request()
        return True

    def retrieve(self, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """The grabbed frame in BGR."""
        return np.asarray(self._request.make_array("main"))

    def close(self) -> None:
        """Stop the camera."""
        self._release()
        if self._camera is not None:
            self._camera.close()

    def _release(self) -> None:
        if self._request is not None:
            self._request.release()
            self._request = None
