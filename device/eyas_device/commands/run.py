"""`eyas-device run`: answer the frames of a camera."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from eyas_device.commands import values
from eyas_device.errors import CameraError
from eyas_device.names import host_name

HELP = "answer the frames of a camera"


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's command line."""
    parser.add_argument("--bundle", type=Path, required=True, metavar="B")
    parser.add_argument(
        "--camera", required=True, metavar="SPEC", help="folder:PATH, video:PATH or fake:[?frames=20&seed=1]"
    )
    parser.add_argument("--runtime", help="litert, openvino or onnx (default: the first that is installed)")
    parser.add_argument("--artefact", metavar="NAME", help="e.g. litert-int8 (default: what the bundle says)")
    parser.add_argument("--threads", type=values.count, default=1, help="inference threads (default 1)")
    parser.add_argument("--frames", type=values.count, metavar="N", help="stop after N answers")
    parser.add_argument("--fps", type=values.number, help="at most this many frames a second")
    parser.add_argument("--loop", action="store_true", help="start again when the source ends")
    parser.add_argument(
        "--accuracy", action="store_true", help="compare answers with the names of the pictures' folders"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object an answer on standard output")
    parser.add_argument(
        "--mqtt", type=values.broker, metavar="HOST[:PORT]", help="send status and windows to this broker"
    )
    parser.add_argument("--site", type=values.name, default="default", help="second level of the topic")
    parser.add_argument(
        "--device-id", type=values.name, default=host_name(), help="third level (default: the host's name)"
    )
    parser.add_argument(
        "--window", type=values.window, default=10.0, metavar="SECONDS", help="length of a window (default 10)"
    )


def main(given: argparse.Namespace) -> int:
    """Run the loop until the source ends or a signal stops it; print the figures."""
    from eyas_device.camera import open_camera
    from eyas_device.console import JsonLines, Scorer, StatusLine
    from eyas_device.link import Link
    from eyas_device.pipeline import Listener, Stop, run
    from eyas_device.predict import Classifier
    from eyas_device.tally import Accuracy, Tally

    if given.accuracy and not given.camera.startswith("folder:"):
        raise CameraError(f"camera {given.camera}: --accuracy needs folder:PATH with a folder for each label")
    _settle_opencv(given.threads)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        camera = stack.enter_context(open_camera(given.camera, loop=given.loop))
        classifier = stack.enter_context(
            Classifier.open(given.bundle, given.runtime, given.artefact, threads=given.threads)
        )
        manifest, runtime = classifier.bundle.manifest, classifier.runtime
        people = sys.stderr if given.json else sys.stdout
        model = f"{manifest.name} {manifest.version}: {classifier.artefact.name} on {runtime.name} {runtime.version}"
        print(model, file=people, flush=True)
        listeners: list[Listener] = []
        link = None
        if given.mqtt:
            host, port = given.mqtt
            link = Link(
                host,
                port,
                site=given.site,
                device=given.device_id,
                manifest=manifest,
                artefact=classifier.artefact,
                window_s=given.window,
            )
            listeners.append(stack.enter_context(link))
        accuracy = Accuracy(manifest.labels) if given.accuracy else None
        if accuracy is not None:
            listeners.append(Scorer(accuracy))
        if given.json:
            listeners.append(JsonLines())
        status = StatusLine(people, Tally(), link)
        try:
            run(classifier, camera, [*listeners, status], frames=given.frames, fps=given.fps, stop=stop)
        finally:
            status.summary(accuracy)
    return 0


def _settle_opencv(threads: int) -> None:
    """Keep OpenCV to the threads that were asked for, and to errors that are raised rather than printed."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read at import; the function for it differs between 4 and 5
    import cv2

    cv2.setNumThreads(threads)
