"""Waiting for packets and for other threads at once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
from paho.mqtt.client import Client, MQTTErrorCode

from eyas_device.telemetry.packet_loop import PacketLoop

_LONG_S = 60.0


class Connection:
    """The part of a paho client that moves packets."""

    def __init__(self) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.received, self.writes, self.waiting = b"", 0, False

    def socket(self) -> socket.socket:
        return self.ours

    def want_write(self) -> bool:
        return self.waiting

    def loop_read(self) -> MQTTErrorCode:
        data = self.ours.recv(100)
        self.received += data
        return MQTTErrorCode.MQTT_ERR_SUCCESS if data else MQTTErrorCode.MQTT_ERR_CONN_LOST

    def loop_write(self) -> MQTTErrorCode:
        self.writes, self.waiting = self.writes + 1, False
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def loop_misc(self) -> MQTTErrorCode:
        return MQTTErrorCode.MQTT_ERR_SUCCESS


class HeldUp:
    """A sender whose signal is on its way."""

    def send(self, data: bytes) -> int:
        return len(data)


@pytest.fixture
def connection() -> Iterator[Any]:
    made = Connection()
    yield made
    made.ours.close()
    made.theirs.close()


def test_a_turn_ends_by_packets_by_room_to_write_and_by_other_threads(connection: Any) -> None:
    client = cast(Client, connection)
    with PacketLoop() as loop:
        connection.theirs.send(b"packet")
        assert loop.turn(client, _LONG_S) == MQTTErrorCode.MQTT_ERR_SUCCESS
        assert connection.received == b"packet"
        connection.waiting = True
        loop.turn(client, _LONG_S)
        assert connection.writes == 1
        for _ in range(3):
            threading.Timer(0.05, loop.wake).start()
            loop.turn(client, _LONG_S)
        for _ in range(1000):
            loop.wake()
        loop.turn(client, _LONG_S)
        started = time.monotonic()
        loop.turn(client, 0.2)
        assert time.monotonic() - started >= 0.2, "all wake-ups before are gone"


def test_a_signal_that_comes_after_its_turn_does_not_keep_the_loop_awake(connection: Any) -> None:
    """A thread that is held up between noting its wake-up and sending the signal."""
    client = cast(Client, connection)
    with PacketLoop() as loop:
        sender, loop._sender = loop._sender, cast(Any, HeldUp())
        loop.wake()
        connection.theirs.send(b"packet")  # ends the wait, before there is a signal
        loop.turn(client, _LONG_S)
        loop._sender = sender
        sender.send(b"\0")
        loop.turn(client, _LONG_S)  # ended by the late signal
        started = time.monotonic()
        loop.turn(client, 0.2)
        assert time.monotonic() - started >= 0.2
        threading.Timer(0.05, loop.wake).start()
        loop.turn(client, _LONG_S)


def test_packets_arrive_while_wake_ups_are_gathered_and_the_end_is_noticed(connection: Any) -> None:
    client = cast(Client, connection)
    with PacketLoop() as loop:
        loop.wake()
        connection.theirs.send(b"packet")
        loop.turn(client, _LONG_S)
        assert connection.received == b"packet"
        connection.theirs.close()
        assert loop.turn(client, _LONG_S) == MQTTErrorCode.MQTT_ERR_CONN_LOST
    loop.wake()  # closed: nothing happens
