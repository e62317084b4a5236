"""RTSP network cameras, decoded by OpenCV's FFmpeg."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import cast
from urllib.parse import urlsplit

import cv2

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.opencv import OpenCVReader, Settings
from eyas_device.camera.spec import parse_address
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError
from eyas_device.support.redact import redact

_PORT = 554
_REACH_S = 1.0
# TCP, because UDP loses packets silently; only the protocols of RTSP, because the server chooses what it points to.
_FFMPEG = "rtsp_transport;tcp|protocol_whitelist;tcp,udp,rtp,rtsp"


class RtspCamera(SubprocessCamera):
    """An RTSP stream, read in a separate process."""

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> RtspCamera:
        """Open `rtsp://[USER:PASSWORD@]HOST[:PORT]/PATH`.

        Raises `CameraSpecError` for a wrong address, and `CameraError` if no stream is served there now.
        """
        url = f"rtsp:{rest}"
        parse_address(url, ("rtsp",), kind="rtsp")
        return cls(
            f"{__name__}:RtspReader",
            Settings(source=url, timeout_s=timeout_s),
            shown=redact(url),
            timeout_s=timeout_s,
            environment={"OPENCV_FFMPEG_CAPTURE_OPTIONS": _FFMPEG},
        )


class RtspReader(OpenCVReader):
    """OpenCV's FFmpeg backend."""

    backend = cv2.CAP_FFMPEG

    def properties(self) -> Sequence[int]:
        # Only at construction: without these timeouts a dead server blocks for 30 s.
        timeout_ms = round(1000 * self.settings.timeout_s)
        return (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms)

    def open_error(self) -> CameraError:  # OpenCV does not pass on FFmpeg's reason
        parts = urlsplit(self.settings.source)
        try:
            socket.create_connection((cast(str, parts.hostname), parts.port or _PORT), timeout=_REACH_S).close()
        except TimeoutError:
            return CameraError("the host does not respond; is the camera on, and on this network?")
        except OSError as error:
            return CameraError(f"cannot be reached ({error.strerror}); is the camera on, and the port right?")
        return CameraError(
            f"the host responds, but no stream arrived within {self.settings.timeout_s:g} s; "
            "check path, user and password, and that the codec is H.264, H.265 or MJPEG"
        )
