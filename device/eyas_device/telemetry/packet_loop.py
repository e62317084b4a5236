"""Wait for packets of a broker and for other threads at once, instead of asking many times a second."""

from __future__ import annotations

import select
import socket
import ssl
from contextlib import suppress

from paho.mqtt.client import Client, MQTTErrorCode

from eyas_device.support.closing import Closing

_GATHER_S = 0.05
"""After a wake-up, the time in which more of them are gathered: a burst of messages costs one turn."""


class PacketLoop(Closing):
    """Reads and writes the packets of a paho client in one thread; `wake` is for the others."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._woken = False
        """Whether `wake` was called since the last turn."""
        self._signalled = False
        """Whether its signal can be received."""

    def wake(self) -> None:
        """End the wait of `turn` soon."""
        if not self._woken:
            self._woken = True
            with suppress(OSError):  # closed, or woken already
                self._sender.send(b"\0")

    def turn(self, client: Client, seconds: float) -> MQTTErrorCode:
        """Read and write what there is, after at most `seconds` of waiting. Raises `OSError` or `ValueError`."""
        code = self._exchange(client, seconds, listen=True)
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS and self._woken:
            code = self._exchange(client, _GATHER_S, listen=False)
        if self._woken or self._signalled:
            with suppress(OSError):  # not sent yet: it ends the next wait
                self._receiver.recv(64)
            self._woken = self._signalled = False
        return code if code != MQTTErrorCode.MQTT_ERR_SUCCESS else client.loop_misc()

    def close(self) -> None:
        """Close both ends."""
        self._receiver.close()
        self._sender.close()

    def _exchange(self, client: Client, seconds: float, *, listen: bool) -> MQTTErrorCode:
        sock = client.socket()
        if sock is None:
            return MQTTErrorCode.MQTT_ERR_NO_CONN
        decrypted = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0  # select does not see it
        reads = [sock, self._receiver] if listen else [sock]
        readable, writable, _ = select.select(
            reads, [sock] if client.want_write() else [], [], 0.0 if decrypted else seconds
        )
        self._signalled |= self._receiver in readable
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        if sock in readable or decrypted:
            code = client.loop_read()
        if code == MQTTErrorCode.MQTT_ERR_SUCCESS and sock in writable:
            code = client.loop_write()
        return code
