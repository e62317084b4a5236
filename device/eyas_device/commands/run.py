"""`eyas-device run`: answer the frames of a camera.

Signals: SIGTERM and SIGINT finish the frame in hand and end with 0; SIGHUP takes the model that is in the current slot
(or in --bundle) now, if it passes its golden check; SIGUSR1 pauses, SIGUSR2 resumes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.errors import CameraSpecError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eyas_device.agent.accuracy import Accuracy
    from eyas_device.agent.loop import Listener
    from eyas_device.config import Config
    from eyas_device.predict import Classifier

HELP = "answer the frames of a camera"
_CAMERAS = """v4l2:0[?size=1280x720&fps=30], rtsp://HOST/PATH, mjpeg:http://HOST/PATH, picamera2:, gst:PIPELINE,
video:PATH, folder:PATH or fake:[?frames=20&seed=1]"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="the device's configuration; what is given here overrides it")
    add("--bundle", metavar="B", help="the bundle that answers (default: the current slot)")
    add("--camera", metavar="SPEC", help=_CAMERAS)
    add(
        "--runtime",
        help="litert, tflite, openvino, onnx, ... (default: the remembered choice, or what is there)",
    )
    add("--artefact", metavar="NAME", help="e.g. litert-int8 (default: what the bundle says)")
    add("--threads", type=values.count, help="inference threads (default 1)")
    add("--affinity", type=values.cores, metavar="CORES", help="processor cores to keep to, e.g. 2,3 (default: all)")
    add("--frames", type=values.count, metavar="N", help="stop after N answers")
    add("--fps", type=values.number, help="at most this many frames a second")
    add("--duty", type=values.share, metavar="PART", help="largest part of the time spent working, e.g. 0.5")
    add("--give-up", type=values.number, metavar="SECONDS", help="end with 3 after so long without a frame")
    add("--loop", action="store_true", help="start again when the source ends")
    add("--accuracy", action="store_true", help="compare answers with the names of the images' folders")
    add("--json", action="store_true", help="one JSON object an answer on standard output")
    add("--mqtt", type=values.broker, metavar="HOST[:PORT]", help="send status and windows to this broker")
    add("--site", type=values.name, help="second level of the topic (default: default)")
    add("--device-id", type=values.name, metavar="NAME", help="third level (default: the host's name)")
    add("--window", type=values.window, metavar="SECONDS", help="length of a window (default 10)")


def main(given: argparse.Namespace) -> int:
    """Run the loop until the source ends or a signal stops it; print the figures."""
    from eyas_device.agent.accuracy import Accuracy
    from eyas_device.agent.app import Agent
    from eyas_device.agent.output import JsonLines, Scorer

    config = _config(given)
    if given.accuracy and not config.camera.source.startswith("folder:"):
        raise CameraSpecError(
            f"camera {config.camera.source}: --accuracy needs folder:PATH with a folder for each label"
        )
    score: Accuracy | None = None

    def listeners(classifier: Classifier) -> Sequence[Listener]:
        nonlocal score
        score = Accuracy(classifier.bundle.manifest.labels) if given.accuracy else None
        return [*([Scorer(score)] if score else []), *([JsonLines()] if given.json else [])]

    people = sys.stderr if given.json else sys.stdout
    with Agent(config, people, listeners=listeners, loop=given.loop) as agent:
        try:
            agent.run(frames=given.frames)
        finally:
            agent.close()
            agent.status.summary(score)
    return 0


def _config(given: argparse.Namespace) -> Config:
    from eyas_device.agent.app import configured

    return configured(
        given.config,
        device={"site": given.site, "name": given.device_id},
        camera={"source": given.camera, "give_up_s": given.give_up},
        model={
            "bundle": given.bundle,
            "runtime": given.runtime,
            "artefact": given.artefact,
            "threads": given.threads,
            "affinity": given.affinity,
        },
        loop={"fps": given.fps, "duty": given.duty},
        telemetry={"broker": given.mqtt and "{}:{}".format(*given.mqtt), "window_s": given.window},
    )
