"""RTSP network cameras, decoded by OpenCV's FFmpeg."""

from __future__ import annotations

import contextlib
import re
import ssl
import time
from collections.abc import Sequence
from typing import cast
from urllib.parse import SplitResult, urlsplit

import cv2

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.net import connect, connect_problem
from eyas_device.camera.opencv import OpenCVReader, Settings
from eyas_device.camera.spec import parse_address
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError, CameraRefused
from eyas_device.support.redact import redact

_PORTS = {"rtsp": 554, "rtsps": 322}
_ASK_S = 1.5
# TCP, because UDP loses packets silently; only the protocols of RTSP, because the server chooses what it points to.
# The rate of frames is not estimated before the first one is returned: that takes more than a second.
_FFMPEG = {
    "rtsp": "rtsp_transport;tcp|fpsprobesize;0|protocol_whitelist;tcp,udp,rtp,rtsp",
    "rtsps": "rtsp_transport;tcp|fpsprobesize;0|protocol_whitelist;tcp,rtp,rtsp,tls",
}


class RtspCamera(SubprocessCamera):
    """An RTSP stream, read in a separate process."""

    scheme = "rtsp"

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> RtspCamera:
        """Open `rtsp://[USER:PASSWORD@]HOST[:PORT]/PATH`.

        Raises `CameraSpecError` for a wrong address, `CameraRefused` for a refused login, and `CameraError` if no
        stream is served there now.
        """
        url = f"{cls.scheme}:{rest}"
        parts = cls.parse(rest)
        # The most common failure is checked here: starting a process on each attempt would cost much more.
        try:
            connect(cast(str, parts.hostname), parts.port or _PORTS[cls.scheme], time.monotonic() + timeout_s).close()
        except OSError as error:
            raise CameraError(f"camera {redact(url)}: {connect_problem(error)}") from None
        return cls(
            f"{__name__}:RtspReader",
            Settings(source=url, timeout_s=timeout_s),
            shown=redact(url),
            timeout_s=timeout_s,
            environment={"OPENCV_FFMPEG_CAPTURE_OPTIONS": _FFMPEG[cls.scheme]},
        )

    @classmethod
    def parse(cls, rest: str) -> SplitResult:
        """Address of a specification. Raises `CameraSpecError` for a wrong one."""
        return parse_address(f"{cls.scheme}:{rest}", (cls.scheme,), kind=cls.scheme)


class RtspsCamera(RtspCamera):
    """An RTSP stream over TLS, `rtsps://`: encrypted, but FFmpeg does not check the camera's certificate."""

    scheme = "rtsps"


class RtspReader(OpenCVReader):
    """OpenCV's FFmpeg backend."""

    backend = cv2.CAP_FFMPEG

    def properties(self) -> Sequence[int]:
        # Only at construction: without these timeouts a dead server blocks for 30 s.
        timeout_ms = round(1000 * self.settings.timeout_s)
        return (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms)

    def open_error(self) -> CameraError:  # OpenCV does not pass on FFmpeg's reason
        try:
            status = ask_status(self.settings.source)
        except OSError as error:
            return CameraError(connect_problem(error))
        parts = urlsplit(self.settings.source)
        if status in (401, 403):
            if parts.username is None:
                return CameraRefused(f"refused ({status}); it needs a login: USER:PASSWORD@ before the host")
            return CameraRefused(
                f"asks for a login ({status}) and no stream arrived; check user and password, with special characters "
                "written as %XX (it is seldom tried again, because cameras lock users out)"
            )
        if status not in (None, 200):
            return CameraError(f"answers {status}; is the path right?")
        return CameraError(
            f"the host responds, but no stream arrived within {self.settings.timeout_s:g} s; "
            "check path, user and password, and that the codec is H.264, H.265 or MJPEG"
        )


def ask_status(url: str) -> int | None:
    """Status with which a camera answers DESCRIBE without a login; None if it answers nothing that can be read.

    Raises `OSError` if it cannot be reached. Source: RFC 2326, 10.2.
    """
    parts = urlsplit(url)
    host, port = cast(str, parts.hostname), parts.port or _PORTS[parts.scheme]
    deadline = time.monotonic() + _ASK_S
    with contextlib.ExitStack() as stack:
        wire = stack.enter_context(connect(host, port, deadline))
        try:
            wire.settimeout(_ASK_S)
            if parts.scheme == "rtsps":
                context = ssl.create_default_context()
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing secret is sent
                wire = stack.enter_context(context.wrap_socket(wire, server_hostname=host))
            bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            wire.sendall(f"DESCRIBE {bare} RTSP/1.0\r\nCSeq: 1\r\nAccept: application/sdp\r\n\r\n".encode())
            answer = re.match(rb"RTSP/1\.\d (\d{3})", wire.recv(4096))
        except (TimeoutError, OSError):
            return None
    return int(answer[1]) if answer else None
