"""What the tests of the fleet's host side share: messages, a plain device that sends them, brokers and processes."""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.telemetry.messages import Ack, Event, Window, decode, encode, topic
from tests.support.system_parts import require

OPEN = "allow_anonymous true"


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
    facts: dict[str, Any] = {"time": 1_700_000_000.0 + sequence, "model": "shapes 1.0.0", "artefact": "litert-int8"}
    return Window(device=device, spool=spool, sequence=sequence, **{**facts, "frames": sequence, **more})


def event(device: str, spool: str, sequence: int, **more: Any) -> Event:
    facts: dict[str, Any] = {
        "time": 1_700_000_000.0 + sequence,
        "label": "crack",
        "confidence": 0.5,
        "why": "uncertain",
    }
    return Event(device=device, spool=spool, sequence=sequence, **{**facts, **more})


class Sender:
    """A device as a plain paho client: sends what it is told to, hears its acknowledgements."""

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

    def acked(self, wanted: set[int], timeout: float = 30) -> set[int]:
        """Wait until at least these were acknowledged; all that were."""
        seen: set[int] = set()
        deadline = time.monotonic() + timeout
        while not wanted <= seen:
            ack = self.acks.get(timeout=max(0.01, deadline - time.monotonic()))
            assert (ack.device, ack.spool) == (self.device, self.spool)
            seen |= {n for first, last in ack.ranges for n in range(first, last + 1)}
        return seen

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


class Processes:
    """Processes of a test, ended with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._all: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, log: str = "log") -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        self._all.append(process)
        return process

    def broker(self, port: int, options: str = OPEN, *, name: str = "mosquitto") -> subprocess.Popen[bytes]:
        """A mosquitto that listens; its files stay in the folder, so that it can be started again."""
        config = self.folder / f"{name}.conf"
        config.write_text(f"listener {port} 127.0.0.1\n{options}\n")
        process = self.start(needs_mosquitto(), "-c", str(config), log=f"{name}.log")
        wait_until(lambda: listens(port) or process.poll() is not None, 15, "a listening broker")
        assert process.poll() is None, (self.folder / f"{name}.log").read_text()
        return process

    def collector(self, port: int, url: str, *, name: str = "a") -> subprocess.Popen[bytes]:
        """A collector in a process of its own; `name.jsonl` has its reports, each written at once: two may share it."""
        script = (
            "import os, sys, msgspec\n"
            "from eyas_host.fleet.collect.collector import collect\n"
            "from eyas_host.fleet.broker.client import Access\n"
            "tell = lambda report: os.write(1, msgspec.json.encode(report) + b'\\n')\n"
            "collect(sys.argv[2], Access(broker=sys.argv[1]), name=sys.argv[3], tell=tell, every_s=0.2)\n"
        )
        return self.start(sys.executable, "-c", script, f"127.0.0.1:{port}", url, name, log=f"{name}.jsonl")

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
