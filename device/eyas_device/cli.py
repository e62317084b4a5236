"""`eyas-device`: the camera's command line."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from eyas_device import __version__
from eyas_device.errors import EXIT_USER_ERROR, CameraError, EyasError

EXIT_CHECK_FAILED = 1

_EXAMPLES = """examples:
  eyas-device check runs/solar-cells/bundle
  eyas-device run --bundle runs/solar-cells/bundle --camera folder:pictures --accuracy
  eyas-device run --bundle b --camera video:line.mp4 --fps 5 --mqtt broker.local --site hall-2
  eyas-device run --bundle b --camera fake: --json | jq .label

exit codes: 0 done, 1 a golden picture was answered wrong, 2 a mistake in the command, the bundle or the camera
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb and return the exit code; a mistake of the user is one line on standard error and code 2."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.verb(arguments)
        sys.stdout.flush()
    except EyasError as error:
        print(f"eyas-device: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eyas-device",
        description="Run a verified model bundle on a camera.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"eyas-device {__version__}")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    info = verbs.add_parser("info", help="say what is in a bundle")
    info.add_argument("bundle", type=Path, metavar="BUNDLE")
    info.set_defaults(verb=_info)

    check = verbs.add_parser("check", help="verify a bundle's hashes and answer its golden pictures")
    check.add_argument("bundle", type=Path, metavar="BUNDLE")
    check.add_argument("--runtime", help="only this one: litert, openvino or onnx (default: all that are installed)")
    check.add_argument("--threads", type=_count, default=1, help="inference threads (default 1)")
    check.add_argument("--json", action="store_true", help="one JSON object an artefact")
    check.set_defaults(verb=_check)

    run = verbs.add_parser("run", help="answer the frames of a camera")
    run.add_argument("--bundle", type=Path, required=True, metavar="B")
    run.add_argument(
        "--camera", required=True, metavar="SPEC", help="folder:PATH, video:PATH or fake:[?frames=20&seed=1]"
    )
    run.add_argument("--runtime", help="litert, openvino or onnx (default: the first that is installed)")
    run.add_argument("--artefact", metavar="NAME", help="e.g. litert-int8 (default: what the bundle says)")
    run.add_argument("--threads", type=_count, default=1, help="inference threads (default 1)")
    run.add_argument("--frames", type=_count, metavar="N", help="stop after N answers")
    run.add_argument("--fps", type=_rate, help="at most this many frames a second")
    run.add_argument("--loop", action="store_true", help="start again when the source ends")
    run.add_argument("--accuracy", action="store_true", help="compare answers with the names of the pictures' folders")
    run.add_argument("--json", action="store_true", help="one JSON object an answer on standard output")
    run.add_argument("--mqtt", type=_broker, metavar="HOST[:PORT]", help="send status and windows to this broker")
    run.add_argument("--site", type=_level, default="default", help="second level of the topic (default: default)")
    run.add_argument("--device-id", type=_level, default=_host_name(), help="third level (default: the host's name)")
    run.add_argument("--window", type=_window, default=10.0, metavar="SECONDS", help="length of a window (default 10)")
    run.set_defaults(verb=_run)
    return parser


def _info(arguments: argparse.Namespace) -> int:
    from eyas_device.bundle import Bundle

    manifest = Bundle.open(arguments.bundle).manifest
    size = manifest.preprocessing.size
    print(f"{manifest.name} {manifest.version}: {', '.join(manifest.labels)}; {size} x {size} px")
    confidence = manifest.confidence
    print(f"  confidence: temperature {confidence.temperature:.3f}, unsure below {confidence.threshold}")
    for artefact in manifest.artefacts:
        used = " (used)" if artefact.name in manifest.use.values() else ""
        print(f"  {artefact.name:14} {sum(f.size_bytes for f in artefact.files) / 1e6:6.2f} MB{used}")
        facts = manifest.evidence.get(artefact.name, {})
        if facts:
            print(" " * 17 + ", ".join(f"{name} {_figure(value)}" for name, value in facts.items()))
    for runtime, reason in manifest.reasons.items():
        print(f"  {runtime}: {reason}")
    for notice in manifest.notices:
        print(notice)
    return 0


def _figure(value: float | str | None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check(arguments: argparse.Namespace) -> int:
    import msgspec

    from eyas_device.bundle import Bundle
    from eyas_device.check import check

    bundle = Bundle.open(arguments.bundle)
    results = check(bundle, runtime=arguments.runtime, threads=arguments.threads)
    for result in results:
        if arguments.json:
            print(msgspec.json.encode(result).decode())
            continue
        word = result.status.upper() if result.status == "failed" else result.status
        line = f"{result.artefact:14} {word}"
        if result.max_dp is not None:
            line += (
                f": agreement {result.agreement:.2f}, max |dp| {result.max_dp:.4f} "
                f"(allowed {bundle.manifest.golden_tolerance:g}), {result.latency_ms:.2f} ms"
            )
        print(f"{line}: {result.note}" if result.note else line)
    return EXIT_CHECK_FAILED if any(result.status == "failed" for result in results) else 0


def _run(arguments: argparse.Namespace) -> int:
    from eyas_device.camera import open_camera
    from eyas_device.console import JsonLines, Scorer, StatusLine
    from eyas_device.link import Link
    from eyas_device.pipeline import Listener, Stop, run
    from eyas_device.predict import Classifier
    from eyas_device.tally import Accuracy, Tally

    if arguments.accuracy and not arguments.camera.startswith("folder:"):
        raise CameraError(f"camera {arguments.camera}: --accuracy needs folder:PATH with a folder for each label")
    _settle_opencv(arguments.threads)
    with ExitStack() as stack:
        stop = stack.enter_context(Stop())
        camera = stack.enter_context(open_camera(arguments.camera, loop=arguments.loop))
        classifier = stack.enter_context(
            Classifier.open(arguments.bundle, arguments.runtime, arguments.artefact, threads=arguments.threads)
        )
        manifest, runtime = classifier.bundle.manifest, classifier.runtime
        people = sys.stderr if arguments.json else sys.stdout
        model = f"{manifest.name} {manifest.version}: {classifier.artefact.name} on {runtime.name} {runtime.version}"
        print(model, file=people, flush=True)
        listeners: list[Listener] = []
        link = None
        if arguments.mqtt:
            host, port = arguments.mqtt
            link = Link(
                host,
                port,
                site=arguments.site,
                device=arguments.device_id,
                manifest=manifest,
                artefact=classifier.artefact,
                window_s=arguments.window,
            )
            listeners.append(stack.enter_context(link))
        accuracy = Accuracy(manifest.labels) if arguments.accuracy else None
        if accuracy is not None:
            listeners.append(Scorer(accuracy))
        if arguments.json:
            listeners.append(JsonLines())
        status = StatusLine(people, Tally(), link)
        try:
            run(classifier, camera, [*listeners, status], frames=arguments.frames, fps=arguments.fps, stop=stop)
        finally:
            status.summary(accuracy)
    return 0


def _settle_opencv(threads: int) -> None:
    """Keep OpenCV to the threads that were asked for, and to errors that are raised rather than printed."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # read at import; the function for it differs between 4 and 5
    import cv2

    cv2.setNumThreads(threads)


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number above 0 is needed")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is needed")
    return value


def _window(text: str) -> float:
    value = _rate(text)
    if value < 0.1:
        raise argparse.ArgumentTypeError(f"{text!r}: 0.1 s or more is needed")
    return value


def _level(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: letters, digits, '.', '_' and '-' are allowed, 64 at most")
    return text


def _broker(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, "1883"
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r}: HOST or HOST:PORT is needed")
    return host, int(port)


def _host_name() -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "device"
