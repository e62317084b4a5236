"""Checks that try things out: runtimes, golden check, camera, view, broker."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from eyas_device.doctor.finding import Context, Finding, green, grey, red, yellow
from eyas_device.doctor.system import service_is_active
from eyas_device.support.processes import JobError
from eyas_device.telemetry.local import ask
from eyas_device.updates.records import read_agent

if TYPE_CHECKING:
    from eyas_device.config import CameraSection

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "litert": ("ai-edge-litert",),
    "tflite": ("tflite-runtime", "tensorflow", "tensorflow-cpu", "tensorflow-aarch64"),
    "openvino": ("openvino",),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "onnx-cuda": ("onnxruntime-gpu",),
    "onnx-tensorrt": ("onnxruntime-gpu",),
}
"""Runtime -> packages, one of which must be installed."""
_CAMERA_ERRORS = ("CameraError", "CameraLost", "CameraSpecError")
"""Names of errors whose message names the camera."""
_MODEL_S = 50.0
_FRAMES, _CAMERA_S, _MAX_OPEN_S = 30, 8.0, 15.0
_SLOW_FPS = 1.0
_VIEW_S = 4.0
_TCP_S = 5.0


def runtime(name: str) -> Callable[[Context], Finding]:
    """Create the check that one runtime, if installed, can run an image."""

    def check(context: Context) -> Finding:
        package = next((p for p in PACKAGES[name] if context.version(p) is not None), None)
        if package is None:
            return grey("not installed")
        label, model = f"{package} {context.version(package)}", context.config.model
        arguments = {"name": name, "threads": model.threads, **_bundle_arguments(context)}
        try:
            result = context.job("runtime", arguments, _MODEL_S)
        except JobError as error:
            fix = f"reinstall {package}, or see the check `conflicts`"
            in_use = model.runtime in ("", name)
            return red(f"{label}: {error}", fix) if in_use else yellow(f"{label}, not used: {error}", fix)
        if not result["artefact"]:
            return green(f"{label}, can be imported; the bundle has no model for it")
        return green(f"{label}, {result['artefact']}, {result['latency_ms']:.2f} ms per image")

    check.__name__ = name.replace("-", "_")
    return check


def golden(context: Context) -> Finding:
    """Check that the bundle is good here: the judgement of `install` and of the agent."""
    settings = msgspec.to_builtins(context.config.model)
    try:
        result = context.job("golden", {"settings": settings, **_bundle_arguments(context)}, _MODEL_S)
    except JobError as error:
        return red(str(error), "eyas-device install BUNDLE, with a bundle that passes `eyas-device check`")
    if not result["bundle"]:
        text, fix = f"no good slot below {context.state}", "eyas-device install BUNDLE, or use --bundle"
        return grey(text, fix) if context.config_path is None else red(text, fix)
    text = f"{result['bundle']}: {result['good']}"
    return yellow(f"{text}; {result['notice']}", "pack it again") if result["notice"] else green(text)


def camera(context: Context) -> Finding:
    """Check that the camera opens and delivers usable images."""
    settings = context.config.camera
    if not settings.source:
        return grey("no camera is configured", "use --camera, or set camera.source")
    timeout_s = min(settings.timeout_s, _MAX_OPEN_S)
    arguments = {"settings": _camera_settings(settings), "frames": _FRAMES, "seconds": _CAMERA_S}
    try:
        result = context.job("camera", arguments, 2 * timeout_s + 2 * _CAMERA_S)
    except JobError as error:
        text = str(error) if error.kind in _CAMERA_ERRORS else f"camera {settings.source}: {error}"
        if error.kind == "CameraSpecError":
            return red(text, "name the camera as `eyas-device run --help` shows")
        if (agent := read_agent(context.state)) is not None:
            camera = ask(context.state).camera
            text = f"{camera.source}: {camera.state or 'in use'}, held by the agent (process {agent.pid})"
            return (
                green(text)
                if camera.state in ("", "delivering")
                else yellow(f"{text}: {camera.reason}", "check its cable and address")
            )
        if service_is_active(context):
            fix = "the running service may use it: systemctl stop eyas-device, then run the doctor again"
            return yellow(text, fix)
        return red(text, "check its cable, its address and whether another program uses it")
    rate = f"{result['fps']:.1f} fps" if result["live"] and result["fps"] else "as fast as it is read"
    text = f"{settings.source}: {result['frames']} frames of {result['width']} x {result['height']}, {rate}"
    if result["unreadable"]:
        return yellow(f"{text}, {result['unreadable']} unreadable", "a bad cable or link; a lower resolution may help")
    if result["problems"]:
        return yellow(f"{text}; {'; '.join(result['problems'])}", "correct [camera] controls")
    if result["black"]:
        return yellow(f"{text}, black", "check lens cap, light and exposure")
    if result["same"] and result["live"] and settings.frozen_s:
        return red(f"{text}, all identical: frozen", "restart the camera; camera.frozen_s = 0 allows it")
    if result["live"] and result["fps"] is not None and result["fps"] < _SLOW_FPS:
        return yellow(f"{text}: slow", "more light shortens the exposure; or try a lower resolution")
    return green(text)


def _camera_settings(settings: CameraSection) -> dict[str, Any]:
    """Arguments of a job that opens the camera: its settings, with a bounded time-out."""
    return dict(msgspec.to_builtins(replace(settings, timeout_s=min(settings.timeout_s, _MAX_OPEN_S))))


def view(context: Context) -> Finding:
    """Check that the camera's images are in distribution."""
    settings = context.config.camera
    if not settings.source:
        return grey("no camera is configured", "use --camera, or set camera.source")
    timeout_s = min(settings.timeout_s, _MAX_OPEN_S)
    arguments = {"settings": _camera_settings(settings), "seconds": _VIEW_S, **_bundle_arguments(context)}
    try:
        result = context.job("view", arguments, 2 * timeout_s + 2 * _VIEW_S)
    except JobError as error:
        return grey(f"not judged: {error}", "see the checks `camera` and `golden`")
    if not result["judgement"]:
        return grey("not judged: no bundle with a reference, or too few images")
    if result["ood"]:
        return yellow(result["judgement"], "eyas-device snapshot shows what the camera and the model see")
    return green(result["judgement"])


def broker(context: Context) -> Finding:
    """Check that the broker can be reached and accepts this device."""
    if not context.config.telemetry.broker:
        return grey("no broker is configured", "use --broker, or set telemetry.broker")
    address = context.config.telemetry.address
    host, port = address.host, address.port
    try:
        socket.create_connection((host, port), timeout=_TCP_S).close()
    except OSError as error:
        from eyas_device.telemetry.diagnosis import unreachable

        known = unreachable((host, port), error)
        text, fix = (known.problem, known.fix) if known else (error.strerror or str(error), "check the network")
        return red(f"{address}: {text}", fix)
    from eyas_device.doctor.mqtt import examine

    return examine(context.config, address)


def _bundle_arguments(context: Context) -> dict[str, str]:
    return {"bundle": context.config.model.bundle, "state": str(context.state)}
