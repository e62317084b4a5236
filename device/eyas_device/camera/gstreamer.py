"""Whatever a GStreamer pipeline delivers, e.g. a Jetson's `nvarguscamerasrc`, where OpenCV was built with it."""

from __future__ import annotations

import cv2

from eyas_device.camera import TIMEOUT_S
from eyas_device.camera.opencv import OpenCVReader, Settings
from eyas_device.camera.subprocess import SubprocessCamera
from eyas_device.errors import CameraError, CameraSpecError

_EXAMPLE = "gst:v4l2src ! videoconvert ! video/x-raw,format=BGR ! appsink"


class GStreamerCamera(SubprocessCamera):
    """A pipeline that ends in an appsink, run in a process of its own."""

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> GStreamerCamera:
        """`gst:PIPELINE`; the pipeline delivers BGR or JPEG (`image/jpeg`, which stays undecoded) to `appsink`.

        Raises `CameraSpecError` if the pipeline has no appsink or this OpenCV has no GStreamer, and `CameraError` if
        the pipeline does not start.
        """
        elements = [element.split() for element in rest.split("!")]
        if len(elements) < 2 or not elements[-1] or elements[-1][0] != "appsink" or "\0" in rest:
            raise CameraSpecError(f"camera gst:{rest}: a pipeline that ends in appsink is needed, e.g. {_EXAMPLE}")
        if not has_gstreamer():
            raise CameraSpecError(
                f"camera gst:{rest}: this OpenCV ({cv2.__version__}) has no GStreamer, as no wheel from PyPI has. "
                "Use the system's: sudo apt install python3-opencv, and a virtual environment made with "
                "--system-site-packages and without opencv-python-headless"
            )
        return cls(
            f"{__name__}:GStreamerReader",
            Settings(source=_newest_only(rest), timeout_s=timeout_s),
            shown=f"gst:{rest}",
            timeout_s=timeout_s,
        )


class GStreamerReader(OpenCVReader):
    """OpenCV's GStreamer backend."""

    backend = cv2.CAP_GSTREAMER

    def explain(self) -> CameraError:
        """GStreamer's reason does not come through OpenCV: say how to see it."""
        return CameraError("the pipeline does not start; `GST_DEBUG=2 gst-launch-1.0 PIPELINE` says why")


def has_gstreamer() -> bool:
    """Whether this OpenCV can run pipelines."""
    return bool(cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER))


def _newest_only(pipeline: str) -> str:
    """Have the appsink keep the newest frame only, unless the pipeline says otherwise."""
    head, mark, sink = pipeline.rpartition("!")
    added = [f"{name}={value}" for name, value in (("drop", "true"), ("max-buffers", "1")) if f"{name}=" not in sink]
    return " ".join([head + mark + sink.rstrip(), *added])
