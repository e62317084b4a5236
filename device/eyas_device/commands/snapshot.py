"""`eyas-device snapshot`: write frames, the exact model input and the predictions as files.

For the first hour on site: is the object in the image, in focus, lit? Does it look like the training images?
"""

from __future__ import annotations

import argparse
from pathlib import Path

from eyas_device.commands import values

_MAX_BROKEN = 100
"""Unusable frames in a row after which the command ends."""
HELP = "write frames, the exact model input and the predictions as files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("--config", type=values.path, metavar="FILE", help="the device's configuration")
    parser.add_argument("--bundle", metavar="B", help="the bundle to run (default: the current slot)")
    parser.add_argument("--camera", metavar="SPEC", help="as for `run`")
    parser.add_argument("--out", type=values.path, default=Path("snapshots"), metavar="DIR", help="default: snapshots")
    parser.add_argument("--frames", type=values.positive_int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument(
        "--every",
        type=values.seconds,
        default=1.0,
        metavar="SECONDS",
        help="time between two (default 1; 0: every frame)",
    )


def main(args: argparse.Namespace) -> int:
    """Write the snapshots, one line each, and at the end whether the images are in distribution."""
    import time

    from eyas_device.agent.app import limit_cpu, load_config
    from eyas_device.agent.ood import OodDetector
    from eyas_device.agent.snapshot import take
    from eyas_device.camera import open_configured
    from eyas_device.errors import CameraError, ImageError
    from eyas_device.support.logs import show
    from eyas_device.updates.activate import open_model

    config = load_config(args.config, camera={"source": args.camera}, model={"bundle": args.bundle})
    limit_cpu(config.model)
    written = 0
    with (
        open_model(config) as model,
        open_configured(config.camera) as camera,
    ):
        classifier = model.classifier
        detector = OodDetector(classifier.bundle)
        due = time.monotonic()
        broken = 0
        while written < args.frames and broken < _MAX_BROKEN:
            try:
                frame = camera.capture()
                if frame is None:
                    break
                if camera.live and time.monotonic() < due:
                    continue  # drain a live camera, so that the next snapshot is fresh
                snapshot = take(frame, classifier, args.out)
            except ImageError as error:
                broken += camera.live  # a folder has an end
                show(f"skipped: {error}")
                continue
            broken, due = 0, time.monotonic() + args.every
            detector.measure(frame.pixels(classifier.spec))
            written += 1
            mark = "?" * snapshot.uncertain
            show(f"{args.out / snapshot.frame}  {snapshot.label} {snapshot.confidence:.2f}{mark}")
        if written == 0:
            raise CameraError(f"camera {config.camera.source}: no usable frame was delivered")
        if broken == _MAX_BROKEN:
            raise CameraError(f"camera {config.camera.source}: {broken} unusable frames in a row; {written} written")
        judgement = detector.judgement()
        if judgement is not None:
            show(str(judgement))
    return 0
