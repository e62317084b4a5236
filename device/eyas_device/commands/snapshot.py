"""`eyas-device snapshot`: write the camera's frame and the exact model input beside it, with the answer.

For the first hour on site: is the part in the image, in focus, lit? Is this what the model was trained on?
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eyas_device.commands import values

HELP = "write frames, the exact model input and the answers as files"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="the device's configuration")
    parser.add_argument("--bundle", metavar="B", help="the bundle that answers (default: the current slot)")
    parser.add_argument("--camera", metavar="SPEC", help="as for `run`")
    parser.add_argument("--out", type=Path, default=Path("snapshots"), metavar="DIR", help="default: snapshots")
    parser.add_argument("--frames", type=values.count, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--every", type=values.number, default=1.0, metavar="SECONDS", help="between two (default 1)")


def main(given: argparse.Namespace) -> int:
    """Write the snapshots; one line each, and at the end whether the camera sees what the model was trained on."""
    import time

    from eyas_device.agent.app import configured, open_model, settle
    from eyas_device.agent.ood import OodDetector
    from eyas_device.agent.snapshot import take
    from eyas_device.camera import open_camera
    from eyas_device.errors import CameraError, ImageError

    config = configured(given.config, camera={"source": given.camera}, model={"bundle": given.bundle})
    settle(config.model)
    written = 0
    with (
        open_model(config) as classifier,
        open_camera(config.camera.source, timeout_s=config.camera.timeout_s) as camera,
    ):
        detector = OodDetector(classifier.bundle)
        due = time.monotonic()
        while written < given.frames:
            frame = camera.capture()
            if frame is None:
                break
            if camera.live and time.monotonic() < due:
                continue  # a live camera is emptied, so that the next snapshot is fresh
            due = time.monotonic() + given.every
            try:
                snapshot = take(frame, classifier, given.out)
            except ImageError as error:
                print(f"skipped: {error}")
                continue
            detector.measure(frame.pixels(classifier.spec))
            written += 1
            mark = "?" * snapshot.uncertain
            print(f"{given.out / snapshot.frame}  {snapshot.label} {snapshot.confidence:.2f}{mark}", flush=True)
        if written == 0:
            raise CameraError(f"camera {config.camera.source}: it delivered nothing that could be written")
        judged = detector.judgement()
        if judged is not None:
            print(judged)
    return 0
