"""Windows of many devices at QoS 1 over one plain socket: little work, so that the collector is what is measured.

mqtt_load.py PORT MESSAGES DEVICES
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
import uuid
from typing import TYPE_CHECKING

import msgspec

from eyas_device.telemetry.messages import encode, topic

if TYPE_CHECKING:
    from sides.telemetry_device import window
else:
    from telemetry_device import window  # a program of its own: this folder is on its path

_AHEAD = 2000
"""Messages that the broker has not acknowledged, at most."""


def length(number: int) -> bytes:
    """MQTT's remaining length."""
    out = bytearray()
    while True:
        number, digit = divmod(number, 128)
        out.append(digit | (128 if number else 0))
        if not number:
            return bytes(out)


def packets(messages: int, devices: int) -> list[bytes]:
    """PUBLISH packets, the devices taking turns; each spool is a new one."""
    spools = [str(uuid.uuid4()) for _ in range(devices)]
    base = window(30)
    made = []
    for number in range(messages):
        who, sequence = number % devices, number // devices
        name = f"load-{who}"
        message = msgspec.structs.replace(base, device=name, spool=spools[who], sequence=sequence, time=time.time())
        where = topic("s", name, "window").encode()
        body = struct.pack(">H", len(where)) + where + struct.pack(">H", number % 65535 + 1) + encode(message)
        made.append(b"\x32" + length(len(body)) + body)
    return made


def main() -> None:
    """Send when a line comes on standard input, and end when the broker has everything."""
    port, messages, devices = (int(word) for word in sys.argv[1:4])
    made = packets(messages, devices)
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(b"\x10\x10\x00\x04MQTT\x04\x02\x00\x00\x00\x04load")
    assert connection.recv(4)[3] == 0
    print("ready", flush=True)
    sys.stdin.readline()
    answered = 0

    def listen() -> None:
        nonlocal answered
        while answered < 4 * messages and (data := connection.recv(65536)):
            answered += len(data)

    listener = threading.Thread(target=listen)
    listener.start()
    for start in range(0, messages, 100):
        connection.sendall(b"".join(made[start : start + 100]))
        while answered // 4 < start - _AHEAD:
            time.sleep(0.001)
    listener.join()


if __name__ == "__main__":
    main()
