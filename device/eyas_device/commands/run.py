"""`eyas-device run`: classify the frames of a camera.

With --config and a live camera this is the service: without a good model it goes on, says why, and tries again; else
that is an error.

Signals: SIGTERM and SIGINT finish the current frame and exit with 0; SIGHUP reads the configuration again and loads the
model that is in the current slot (or in --bundle) now, if it passes its golden check; SIGUSR1 pauses, SIGUSR2 resumes.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from eyas_device.commands import values
from eyas_device.commands.broker import add_broker_arguments, broker_values, identity_values
from eyas_device.errors import CameraSpecError, ConfigError
from eyas_device.support.names import LOG_LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from eyas_device.agent.loop import Listener
    from eyas_device.config import Config

HELP = "classify the frames of a camera"
_CAMERAS = """v4l2:0[?size=1280x720&fps=30], rtsp://HOST/PATH, rtsps://HOST/PATH, mjpeg:http://HOST/PATH, picamera2:,
gst:PIPELINE, video:PATH, folder:PATH or fake:[?frames=20&seed=1]"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    add = parser.add_argument
    add("--config", type=values.path, metavar="FILE", help="the device's configuration; other options override it")
    add("--bundle", metavar="B", help="the bundle to run (default: the current slot)")
    add("--camera", metavar="SPEC", help=_CAMERAS)
    add(
        "--runtime",
        help="litert, tflite, openvino, onnx, ... (default: the saved selection, else the first that works here)",
    )
    add("--artefact", metavar="NAME", help="e.g. litert-int8 (default: the one that the bundle prefers)")
    add("--threads", type=values.positive_int, help="inference threads (default 1)")
    add("--affinity", type=values.cores, metavar="CORES", help="processor cores to use, e.g. 2,3 (default: all)")
    add("--frames", type=values.positive_int, metavar="N", help="stop after N predictions")
    add("--fps", type=values.positive_number, help="maximum frames per second")
    add("--duty", type=values.fraction, metavar="FRACTION", help="maximum fraction of the time spent working, e.g. 0.5")
    add(
        "--give-up-s",
        type=values.positive_number,
        metavar="SECONDS",
        help="exit with 3 after this time without a frame",
    )
    add("--loop", action="store_true", help="start again when the source ends")
    add("--accuracy", action="store_true", help="compare predictions with the names of the images' folders")
    add("--json", action="store_true", help="one JSON object per prediction on standard output")
    add("--log-level", choices=LOG_LEVELS, help="what is logged on standard error (default: $EYAS_LOG, else info)")
    add_broker_arguments(parser, purpose="send status and windows to this broker")
    add("--window-s", type=values.window_s, metavar="SECONDS", help="length of a window (default 10)")


def main(args: argparse.Namespace) -> int:
    """Run the loop until the source ends or a signal stops it; print a summary."""
    from eyas_device.agent.accuracy import Accuracy
    from eyas_device.agent.app import Agent
    from eyas_device.agent.output import JsonLines, LiveLine, Scorer, Summary
    from eyas_device.camera import is_live
    from eyas_device.support import logs

    config = _config(args)
    if args.accuracy and not config.camera.source.startswith("folder:"):
        raise CameraSpecError(f"camera {config.camera.source}: --accuracy needs folder:PATH with one folder per label")
    log = logs.set_up(logs.choose_level(args.log_level, config.device.log_level))
    score: Accuracy | None = None
    summary = Summary()
    live_line = LiveLine.fits(sys.stderr) and not (args.json and sys.stdout.isatty())

    def listeners(agent: Agent) -> Iterator[Listener]:
        nonlocal score
        yield summary
        if args.accuracy and agent.loop.classifier is not None:
            root = config.camera.source.removeprefix("folder:")
            score = Accuracy(agent.loop.classifier.bundle.manifest.labels, root)
            yield Scorer(score)
        if args.json:
            yield JsonLines(on_closed=agent.loop.stop)
        if live_line:
            yield LiveLine(sys.stderr, agent.monitor.recent, log, link=lambda: agent.monitor.link)

    service = args.config is not None and is_live(config.camera.source)
    reread = (lambda: _config(args)) if service else None
    try:
        agent = Agent(config, listeners=listeners, loop=args.loop, service=reread, config_path=args.config, log=log)
    except CameraSpecError as error:
        if service and args.camera is None:
            raise ConfigError(f"{args.config}: [camera] source: {error}") from None
        raise
    with agent:
        summary.begin()
        try:
            agent.run(frames=args.frames)
        finally:
            agent.close()
            log.close()
            stream = sys.stderr if args.json else sys.stdout
            sys.stderr.write(log.start_of_line)
            for line in (*summary.lines(score), *agent.monitor.last_words()):
                logs.show(line, stream)
    return 0


def _config(args: argparse.Namespace) -> Config:
    from eyas_device.agent.app import load_config

    return load_config(
        args.config,
        device=identity_values(args),
        camera={"source": args.camera, "give_up_s": args.give_up_s},
        model={
            "bundle": args.bundle,
            "runtime": args.runtime,
            "artefact": args.artefact,
            "threads": args.threads,
            "affinity": args.affinity,
        },
        loop={"fps": args.fps, "duty": args.duty},
        telemetry={**broker_values(args), "window_s": args.window_s},
    )
