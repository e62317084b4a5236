"""The check of the broker with real ones; tests/host/fleet/test_diagnosis.py has every mistake."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from paho.mqtt.client import CallbackAPIVersion, Client

from eyas_device.doctor import Finding, probes
from eyas_device.doctor.finding import green
from eyas_device.telemetry.messages import Status, encode
from tests.support.brokers import Broker
from tests.support.doctor_parts import NOW, context


def at(port: int, **more: Any) -> Finding:
    return probes.broker(context(broker=f"127.0.0.1:{port}", **more))


def test_a_broker_that_accepts_anybody(broker: Broker) -> None:
    kept = "messages are kept here until a collector has stored them"
    assert at(broker.port) == green(f"127.0.0.1:{broker.port}: accepts anybody; {kept}")


def test_a_wrong_password_differs_from_a_missing_broker(make_broker: Callable[..., Broker], tmp_path: Path) -> None:
    tool = shutil.which("mosquitto_passwd")
    assert tool is not None
    subprocess.run([tool, "-b", "-c", tmp_path / "passwords", "camera", "right"], check=True, capture_output=True)
    options = f"user root\nallow_anonymous false\npassword_file {tmp_path / 'passwords'}"
    guarded = make_broker(options=options).start()
    files = {}
    for word in ("right", "wrong"):
        files[word] = tmp_path / word
        files[word].write_text(f"{word}\n")
        files[word].chmod(0o600)
    login = {word: {"user": "camera", "password_file": str(path)} for word, path in files.items()}
    right = at(guarded.port, telemetry=login["right"])
    wrong = at(guarded.port, telemetry=login["wrong"])
    nobody = at(guarded.port)
    guarded.stop()
    gone = at(guarded.port, telemetry=login["right"])
    assert right.status == "yellow" and "accepts camera, but without TLS" in right.text
    assert wrong.status == "red" and "the user camera with this password is not accepted (Not authorized)" in wrong.text
    assert nobody.status == "red" and "nobody is accepted without a login" in nobody.text
    assert gone.status == "red" and "nothing listens on port" in gone.text
    assert "right" not in wrong.text + right.text


def test_a_broker_with_the_older_protocol_only() -> None:
    clients = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                client, _ = server.accept()
                clients.append(client)
                if hello := client.recv(4096):
                    is_mqtt5 = hello[hello.index(b"MQTT") + 4] == 5
                    client.sendall(b"\x20\x03\x00\x84\x00" if is_mqtt5 else b"\x20\x02\x00\x00")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        finding = at(server.getsockname()[1])
    for client in clients:
        client.close()
    assert finding.status == "yellow" and "3.1.1 only" in finding.text


def test_commands_without_tls_are_a_warning(broker: Broker) -> None:
    finding = at(broker.port, telemetry={"commands": ("pause", "snapshot"), "insecure": True})
    assert finding.status == "yellow" and "without TLS the network can read or send commands" in finding.text


@pytest.mark.parametrize("noticed", [False, True])
def test_another_machine_of_this_name(broker: Broker, noticed: bool) -> None:
    faults = ("another machine (0123456789ab) uses the name default/cam-1; give each another",) if noticed else ()
    other = Status(device="cam-1", machine="0123456789ab", state="online", time=NOW, faults=faults)
    client = Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.publish("eyas/default/cam-1/status", encode(other), qos=1, retain=True).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()
    checked = context(broker=f"127.0.0.1:{broker.port}")
    config = replace(checked.config, device=replace(checked.config.device, name="cam-1"))
    finding = probes.broker(dataclasses.replace(checked, config=config))
    assert finding.status == "yellow" and "another machine (0123456789ab)" in finding.text
    config = replace(checked.config, device=replace(checked.config.device, name="cam-2"))
    assert probes.broker(dataclasses.replace(checked, config=config)).status == "green"


def test_no_broker_is_not_checked() -> None:
    assert probes.broker(context()).status == "grey"
