"""The service on a board: what systemd and its agent say of it, and what it sends."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import paho.mqtt.client as mqtt

from eyas_device.telemetry.local import AgentStatus
from eyas_device.telemetry.messages import Status, Window
from tests.support.brokers import Broker

from .machine import Computer

SERVICE = "eyas-device"
CONFIG = "/etc/eyas/device.toml"
DROP_INS = f"/etc/systemd/system/{SERVICE}.service.d"
WAIT_S = 240
"""How long something may take that takes seconds on an idle machine."""
WATCHDOG_S = 20
"""Of the service that tests share: a loop that stood still for so long is ended."""
_AGENT = f"/run/eyas/{hashlib.sha256(b'/var/lib/eyas').hexdigest()[:16]}/agent.sock"
"""Where the service's agent answers."""
_Seen = TypeVar("_Seen")


def shown(board: Computer, name: str) -> str:
    """A property of the service, as systemd has it."""
    return board.run(f"systemctl show --property={name} --value {SERVICE}").stdout.strip()


def ask(board: Computer) -> AgentStatus | None:
    """What the agent says of itself; None if none answers."""
    with suppress(OSError), board.connect(_AGENT) as agent, agent.makefile("rb") as answer:
        line = answer.readline()
        return msgspec.json.decode(line, type=AgentStatus) if line else None
    return None


def wait_for(what: str, look: Callable[[], _Seen | None], timeout: float = WAIT_S) -> _Seen:
    """Look until there is something to see, and return that."""
    deadline = time.monotonic() + timeout
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.3)
    return seen


def saying(board: Computer, word: str) -> AgentStatus:
    """Wait until one of the agent's problems has a word in it."""

    def look() -> AgentStatus | None:
        status = ask(board)
        return status if status is not None and any(word in problem for problem in status.problems) else None

    return wait_for(f"a problem with {word!r}", look)


def recovered(board: Computer, word: str) -> bool:
    """Whether the agent answers and none of its problems has a word in it."""
    status = ask(board)
    return status is not None and not any(word in problem for problem in status.problems)


def answering(board: Computer, since: AgentStatus | None = None) -> AgentStatus:
    """Wait until the agent predicts frames: more than `since`, if that is of the same process."""

    def look() -> AgentStatus | None:
        status = ask(board)
        if status is None or status.camera.state != "delivering":
            return None
        before = since.frames if since is not None and since.pid == status.pid else 0
        return status if status.frames > before else None

    return wait_for("the agent predicts frames", look)


class Messages:
    """A broker on this machine and what has arrived there."""

    def __init__(self, folder: Path) -> None:
        self._broker = Broker(folder).start()
        self.port = self._broker.port
        self.windows: list[Window] = []
        self.states: list[str] = []
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", self.port)
        self._client.subscribe("eyas/#", qos=1)
        self._client.loop_start()

    def since_boot(self, board: Computer) -> list[Window]:
        """The windows of the board's present start, oldest first; one that came twice is there once."""
        boot = board.run("cut -c 1-8 /proc/sys/kernel/random/boot_id").stdout.strip()
        windows = {(w.spool, w.sequence): w for w in list(self.windows) if w.boot == boot}
        return sorted(windows.values(), key=lambda window: window.uptime_s)

    def close(self) -> None:
        """End both."""
        self._client.loop_stop()
        self._client.disconnect()
        self._broker.stop()

    def _on_message(self, client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        if message.topic.endswith("/window"):
            self.windows.append(msgspec.json.decode(message.payload, type=Window))
        elif message.topic.endswith("/status"):
            self.states.append(msgspec.json.decode(message.payload, type=Status).state)


def longest_gap(windows: list[Window]) -> float:
    """The longest time between the end of a window and the begin of the next one, seconds."""
    pairs = itertools.pairwise(windows)
    return max((later.uptime_s - later.seconds - before.uptime_s for before, later in pairs), default=0.0)
