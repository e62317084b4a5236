"""The camera side of Eyas: capture, infer, report. Imports without any training framework.

The public names load at first use, so `import eyas_device` itself is quick.

>>> from eyas_device import Classifier, open_camera
>>> with Classifier.open("runs/shapes/bundle") as classifier, open_camera("fake:?frames=2") as camera:
...     while (frame := camera.capture()) is not None:
...         prediction = classifier.predict(frame.pixels())
>>> prediction.label in classifier.bundle.manifest.labels
True
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "BundleError",
    "CameraError",
    "CameraLost",
    "CameraRefused",
    "CameraSpecError",
    "CheckFailed",
    "Classifier",
    "ConfigError",
    "EyasError",
    "ImageError",
    "LinkError",
    "RuntimeUnavailable",
    "__version__",
    "open_camera",
    "prepare",
]

if TYPE_CHECKING:
    from eyas_device.bundle import Bundle
    from eyas_device.camera import open_camera
    from eyas_device.errors import (
        BundleError,
        CameraError,
        CameraLost,
        CameraRefused,
        CameraSpecError,
        CheckFailed,
        ConfigError,
        EyasError,
        ImageError,
        LinkError,
        RuntimeUnavailable,
    )
    from eyas_device.predict import Classifier
    from eyas_device.preprocess import prepare
else:
    from eyas_device.support.lazy import lazy_attributes

    __getattr__, __dir__ = lazy_attributes(
        __name__,
        dict.fromkeys(__all__, "eyas_device.errors")
        | {
            "Bundle": "eyas_device.bundle",
            "Classifier": "eyas_device.predict",
            "open_camera": "eyas_device.camera",
            "prepare": "eyas_device.preprocess",
        },
    )
