"""Shared by the fleet's tests: messages, a plain MQTT client as a device, brokers and processes."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.telemetry.messages import Ack, Event, Window, decode, encode, topic
from tests.support.system_parts import require

OPEN = "allow_anonymous true"


@pytest.fixture(scope="module")
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter: root's broker runs as another one, to which pytest's own are closed."""
    with tempfile.TemporaryDirectory(prefix="eyas-broker-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def needs_mosquitto() -> str:
    """The broker's path; without one the test is skipped, or fails in continuous integration."""
    return require("mosquitto")[0]


def wait_until(true: Callable[[], object], timeout: float = 30, what: str = "it") -> None:
    deadline = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.02)


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def window(device: str, spool: str, sequence: int, **more: Any) -> Window:
    fields: dict[str, Any] = {"time": 1_700_000_000.0 + sequence, "model": "shapes 1.0.0", "artefact": "litert-int8"}
    return Window(device=device, spool=spool, sequence=sequence, **{**fields, "frames": sequence, **more})


def event(device: str, spool: str, sequence: int, **more: Any) -> Event:
    fields: dict[str, Any] = {
        "time": 1_700_000_000.0 + sequence,
        "label": "crack",
        "confidence": 0.5,
        "why": "uncertain",
    }
    return Event(device=device, spool=spool, sequence=sequence, **{**fields, **more})


class Sender:
    """A device as a plain paho client: sends messages and receives acknowledgements."""

    def __init__(self, port: int, device: str = "cam-1", site: str = "s", spool: str | None = None) -> None:
        self.device, self.site, self.spool = device, site, spool or str(uuid.uuid4())
        self.acks: queue.Queue[Ack] = queue.Queue()
        subscribed: queue.Queue[object] = queue.Queue()
        self.client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self.client.on_message = lambda c, u, m: self.acks.put(decode(m.payload, Ack))
        self.client.on_connect = lambda c, *_: c.subscribe(topic(site, device, "ack"), qos=1)
        self.client.on_subscribe = lambda *_: subscribed.put(None)
        self.client.connect("127.0.0.1", port)
        self.client.loop_start()
        subscribed.get(timeout=15)

    def send(self, payload: Any, kind: str = "window") -> None:
        data = payload if isinstance(payload, bytes) else encode(payload)
        self.client.publish(topic(self.site, self.device, kind), data, qos=1)

    def windows(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            self.send(window(self.device, self.spool, number))

    def acked(self, expected: set[int], timeout: float = 30) -> set[int]:
        """Wait until at least `expected` are acknowledged, and return all that were."""
        acked: set[int] = set()
        deadline = time.monotonic() + timeout
        while not expected <= acked:
            ack = self.acks.get(timeout=max(0.01, deadline - time.monotonic()))
            assert (ack.device, ack.spool) == (self.device, self.spool)
            acked |= {n for first, last in ack.ranges for n in range(first, last + 1)}
        return acked

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Processes:
    """Processes that end with the test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, log: str = "log") -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        self._all.append(process)
        return process

    def broker(self, port: int, options: str = OPEN, *, name: str = "mosquitto") -> subprocess.Popen[bytes]:
        """A listening mosquitto; its files stay in the folder, so that it can be restarted."""
        config = self.folder / f"{name}.conf"
        config.write_text(f"listener {port} 127.0.0.1\n{options}\n")
        process = self.start(needs_mosquitto(), "-c", str(config), log=f"{name}.log")
        wait_until(lambda: listens(port) or process.poll() is not None, 15, "a listening broker")
        assert process.poll() is None, (self.folder / f"{name}.log").read_text()
        return process

    def collector(self, port: int, url: str, *, name: str = "a") -> subprocess.Popen[bytes]:
        """A collector in its own process, which writes its reports to `name.jsonl`; two may share the file."""
        script = (
            "import os, sys, msgspec\n"
            "from eyas_host.fleet.collect.collector import collect\n"
            "from eyas_host.fleet.collect.settings import CollectorSettings\n"
            "from eyas_host.fleet.broker.client import BrokerAccess\n"
            "write = lambda report: os.write(1, msgspec.json.encode(report) + b'\\n')\n"
            "settings = CollectorSettings(name=sys.argv[3], report_s=0.2)\n"
            "collect(sys.argv[2], BrokerAccess(broker=sys.argv[1]), settings, write)\n"
        )
        return self.start(sys.executable, "-c", script, f"127.0.0.1:{port}", url, name, log=f"{name}.jsonl")

    def eyas(self, *arguments: str) -> subprocess.Popen[bytes]:
        """The command line, whose output goes to `eyas.log`."""
        return self.start(sys.executable, "-m", "eyas_host", *arguments, log="eyas.log")

    def reports(self, name: str = "a") -> list[dict[str, Any]]:
        path = self.folder / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def connected(self, name: str = "a") -> None:
        wait_until(lambda: any(r["state"] == "connected" for r in self.reports(name)), 30, "a connected collector")

    def close(self) -> None:
        for process in self._all:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(15)
