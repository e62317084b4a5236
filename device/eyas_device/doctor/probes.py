"""What only trying tells: runtimes answer, the bundle answers as it should, the camera delivers, the broker lets in."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from eyas_device.doctor.finding import Context, Finding, green, grey, red, yellow
from eyas_device.doctor.system import service_is_active
from eyas_device.support.names import parse_broker
from eyas_device.support.processes import JobError

if TYPE_CHECKING:
    from paho.mqtt.client import Client
    from paho.mqtt.reasoncodes import ReasonCode

    from eyas_device.telemetry.mqtt_client import Connector

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "litert": ("ai-edge-litert",),
    "tflite": ("tflite-runtime", "tensorflow", "tensorflow-cpu", "tensorflow-aarch64"),
    "openvino": ("openvino",),
    "onnx": ("onnxruntime", "onnxruntime-gpu"),
    "onnx-cuda": ("onnxruntime-gpu",),
    "onnx-tensorrt": ("onnxruntime-gpu",),
}
"""Runtime -> the packages of which one has to be installed."""
_CAMERA_ERRORS = ("CameraError", "CameraLost", "CameraSpecError")
"""Names of errors whose message names the camera."""
_MODEL_S = 50.0
_FRAMES, _CAMERA_S, _OPEN_MOST_S = 30, 8.0, 15.0
_SLOW_FPS = 1.0
_VIEW_S = 4.0
_TCP_S, _CONNACK_S = 5.0, 10.0


def runtime(name: str) -> Callable[[Context], Finding]:
    """The check that one runtime, if it is installed, answers an image."""

    def check(context: Context) -> Finding:
        package = next((p for p in PACKAGES[name] if context.version(p) is not None), None)
        if package is None:
            return grey("not installed")
        shown, model = f"{package} {context.version(package)}", context.config.model
        arguments = {"name": name, "threads": model.threads, **_where(context)}
        try:
            done = context.job("runtime", arguments, _MODEL_S)
        except JobError as error:
            fix = f"reinstall {package}, or see the check `conflicts`"
            used = model.runtime in ("", name)
            return red(f"{shown}: {error}", fix) if used else yellow(f"{shown}, not used: {error}", fix)
        if not done["artefact"]:
            return green(f"{shown}, can be imported; there is no model for it to run")
        return green(f"{shown}, {done['artefact']}, {done['latency_ms']:.2f} ms an image")

    check.__name__ = name.replace("-", "_")
    return check


def golden(context: Context) -> Finding:
    """Whether the bundle answers here as it did on the workstation."""
    try:
        done = context.job("golden", {"threads": context.config.model.threads, **_where(context)}, _MODEL_S)
    except JobError as error:
        return red(str(error), "eyas-device install BUNDLE, with a bundle that `eyas-device check` accepts")
    if not done["bundle"]:
        text, fix = f"no good slot below {context.state}", "eyas-device install BUNDLE, or give --bundle"
        return grey(text, fix) if context.config_path is None else red(text, fix)
    checked = [row for row in done["checked"] if row["status"] != "not checked"]
    failed = [row for row in checked if row["status"] == "failed"]
    if failed:
        told = ", ".join(f"{row['artefact']} ({row['note']})" for row in failed)
        return red(f"{done['bundle']}: {told}", "do not use it here; pack it again on the workstation")
    worst = max(row["max_dp"] for row in checked)
    names = ", ".join(row["artefact"] for row in checked)
    return green(f"{done['bundle']}: {names}; a probability differs by {worst:.4f} at most")


def camera(context: Context) -> Finding:
    """Whether the camera opens and delivers images that show something."""
    wanted = context.config.camera
    if not wanted.source:
        return grey("no camera is configured", "give --camera, or set camera.source")
    timeout_s = min(wanted.timeout_s, _OPEN_MOST_S)
    arguments = {
        "spec": wanted.source,
        "timeout_s": timeout_s,
        "frames": _FRAMES,
        "seconds": _CAMERA_S,
        "black_level": wanted.black_level,
    }
    try:
        seen = context.job("camera", arguments, 2 * timeout_s + 2 * _CAMERA_S)
    except JobError as error:
        text = str(error) if error.kind in _CAMERA_ERRORS else f"camera {wanted.source}: {error}"
        if error.kind == "CameraSpecError":
            return red(text, "name the camera as `eyas-device run --help` shows")
        if service_is_active(context):
            fix = "the running service may hold it: systemctl stop eyas-device, then ask the doctor again"
            return yellow(text, fix)
        return red(text, "look at its cable, its address and who else uses it")
    rate = f"{seen['fps']:.1f} fps" if seen["live"] and seen["fps"] else "as fast as it is read"
    text = f"{wanted.source}: {seen['frames']} frames of {seen['width']} x {seen['height']}, {rate}"
    if seen["unreadable"]:
        return yellow(f"{text}, {seen['unreadable']} unreadable", "a bad cable or link; a lower resolution may help")
    if seen["black"]:
        return yellow(f"{text}, black", "look at lens cap, light and exposure")
    if seen["same"] and seen["live"] and wanted.frozen_s:
        return red(f"{text}, all the same byte for byte: frozen", "restart the camera; camera.frozen_s = 0 allows it")
    if seen["live"] and seen["fps"] is not None and seen["fps"] < _SLOW_FPS:
        return yellow(f"{text}: slow", "more light shortens the exposure; try a lower resolution")
    return green(text)


def view(context: Context) -> Finding:
    """Whether the camera sees what the model was trained on."""
    wanted = context.config.camera
    if not wanted.source:
        return grey("no camera is configured", "give --camera, or set camera.source")
    timeout_s = min(wanted.timeout_s, _OPEN_MOST_S)
    arguments = {"spec": wanted.source, "timeout_s": timeout_s, "seconds": _VIEW_S, **_where(context)}
    try:
        seen = context.job("view", arguments, 2 * timeout_s + 2 * _VIEW_S)
    except JobError as error:
        return grey(f"not judged: {error}", "see the checks `camera` and `golden`")
    if not seen["judged"]:
        return grey("not judged: no bundle with a reference, or too few images")
    if seen["ood"]:
        return yellow(seen["judged"], "eyas-device snapshot shows what the camera and the model see")
    return green(seen["judged"])


def broker(context: Context) -> Finding:
    """Whether the broker can be reached and lets this device in."""
    if not context.config.telemetry.broker:
        return grey("no broker is configured", "give --mqtt, or set telemetry.broker")
    host, port = parse_broker(context.config.telemetry.broker)
    where = f"{host}:{port}"
    try:
        socket.create_connection((host, port), timeout=_TCP_S).close()
    except socket.gaierror as error:
        return red(f"{where}: the name is not known ({error})", "look at the name and at the device's DNS")
    except ConnectionRefusedError:
        return red(f"{where}: nothing listens there", "start the broker; look at its port and listener address")
    except TimeoutError:
        return red(f"{where}: no answer within {_TCP_S:g} s", "a firewall or a wrong address: ask who runs the network")
    except OSError as error:
        return red(f"{where}: {error.strerror or error}", "look at the device's network: ip route")
    return _shake_hands(context, host, port)


def _shake_hands(context: Context, host: str, port: int) -> Finding:
    """Connect with MQTT 5, else 3.1.1, as a client of its own, so that the running service keeps its session."""
    from eyas_device.telemetry.mqtt_client import Connector, Session

    where = f"{host}:{port}"
    section = context.config.telemetry
    user = context.username or section.user or ("this certificate" if section.certificate else "anybody")
    session = Session(client_id=f"eyas-doctor-{uuid.uuid4().hex[:8]}", keepalive_s=int(_CONNACK_S))
    connector = Connector((host, port), session)
    reason = _connect(context, connector)
    if reason is not None and reason.is_failure and connector.switch_if_unsupported(reason):
        reason = _connect(context, connector)
        if reason is not None and not reason.is_failure:
            return yellow(f"{where}: lets {user} in with MQTT 3.1.1 only", "a broker with MQTT 5 tells why it refuses")
    if reason is None:
        return red(
            f"{where}: something listens but does not answer as an MQTT broker", "look at the port: TLS, HTTP, a proxy?"
        )
    if reason.is_failure:
        return red(
            f"{where}: the broker refused {'an unnamed client' if user == 'anybody' else user}: {reason}",
            "look at user, password and the broker's access list",
        )
    return green(f"{where}: lets {user} in; {_PROMISES[section.delivery]}")


_PROMISES = {
    "collector": "messages are kept here until a collector has stored them",
    "broker": "messages are kept here until the broker has them, which may then lose them (telemetry.delivery)",
}


def _connect(context: Context, connector: Connector) -> ReasonCode | None:
    """The reason code of the broker's CONNACK, None without one."""
    from eyas_device.telemetry.tls import Security

    client = connector.make_client()
    Security.configured(context.config.telemetry).apply(client)
    if context.username:
        client.username_pw_set(context.username, context.password or None)
    done = threading.Event()
    reasons: list[ReasonCode] = []

    def on_connect(client: Client, userdata: object, flags: object, reason: ReasonCode, properties: object) -> None:
        reasons.append(reason)
        done.set()

    client.on_connect = on_connect
    client.on_disconnect = client.on_connect_fail = lambda *_: done.set()
    connector.connect_async(client)
    client.loop_start()
    done.wait(_CONNACK_S)
    client.disconnect()
    client.loop_stop()
    return reasons[0] if reasons else None


def _where(context: Context) -> dict[str, str]:
    return {"bundle": context.config.model.bundle, "state": str(context.state)}
