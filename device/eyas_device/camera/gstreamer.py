"""GStreamer pipelines, e.g. with a Jetson's `nvarguscamerasrc`, if OpenCV was built with GStreamer."""

from __future__ import annotations

import cv2

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.opencv import OpenCVReader, Settings
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError, CameraSpecError
from eyas_device.support.redact import redact

_EXAMPLE = "gst:v4l2src ! videoconvert ! video/x-raw,format=BGR ! appsink"


class GStreamerCamera(SubprocessCamera):
    """A pipeline that ends in an appsink, run in a separate process."""

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> GStreamerCamera:
        """Open `gst:PIPELINE`, which delivers BGR or JPEG (`image/jpeg`, kept undecoded) to `appsink`.

        Raises `CameraSpecError` if the pipeline has no appsink, and `CameraError` if this OpenCV has no GStreamer or
        the pipeline does not start.
        """
        cls.parse(rest)
        shown = f"gst:{redact(rest)}"
        if not has_gstreamer():
            raise CameraError(
                f"camera {shown}: this OpenCV ({cv2.__version__}) has no GStreamer (no wheel from PyPI has). "
                "Use the system's: sudo apt install python3-opencv, and a virtual environment created with "
                "--system-site-packages and without opencv-python-headless"
            )
        return cls(
            f"{__name__}:GStreamerReader",
            Settings(source=keep_newest(rest), timeout_s=timeout_s),
            shown=shown,
            timeout_s=timeout_s,
        )

    @staticmethod
    def parse(rest: str) -> None:
        """Raise `CameraSpecError` unless a pipeline ends in an appsink."""
        elements = [element.split() for element in rest.split("!")]
        if len(elements) < 2 or not elements[-1] or elements[-1][0] != "appsink" or "\0" in rest:
            raise CameraSpecError(
                f"camera gst:{redact(rest)}: a pipeline that ends in appsink is needed, e.g. {_EXAMPLE}"
            )


class GStreamerReader(OpenCVReader):
    """OpenCV's GStreamer backend."""

    backend = cv2.CAP_GSTREAMER

    def open_error(self) -> CameraError:  # OpenCV does not pass on GStreamer's reason
        return CameraError("the pipeline does not start; `GST_DEBUG=2 gst-launch-1.0 PIPELINE` says why")


def has_gstreamer() -> bool:
    """Whether this OpenCV can run pipelines."""
    return bool(cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER))


def keep_newest(pipeline: str) -> str:
    """Let the appsink keep only the newest frame, unless the pipeline sets these properties itself."""
    head, mark, sink = pipeline.rpartition("!")
    properties = [
        f"{name}={value}" for name, value in (("drop", "true"), ("max-buffers", "1")) if f"{name}=" not in sink
    ]
    return " ".join([head + mark + sink.rstrip(), *properties])
