"""What is on its way to a broker: which message is sent next, which are in flight, and which the broker will not take.

A message that was in the air when a connection ended is a suspect: a broker may end a connection for one message (too
large, not allowed) without a word, and would do so for ever. Suspects are sent last and alone, so everything else goes
on; one that alone ended several connections is dropped and counted.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from eyas_device.telemetry.messages import SCHEMA, Ack
from eyas_device.telemetry.spool.spool import IN_FLIGHT, Held, Spool

Delivery = Literal["collector", "broker"]

_MAX_IN_FLIGHT = {"cmd/result": IN_FLIGHT, "event": 4, "profile": 1, "window": IN_FLIGHT, "status": IN_FLIGHT}
"""Kind -> messages that may wait for the broker, and be sent again to a collector that does not acknowledge them, in
sending order: the final status comes last."""
_MAX_WAITING = {**_MAX_IN_FLIGHT, "cmd/result": 1000, "event": 50}
"""Kind -> messages that may wait for the collector. Who sent a command reads its result, and a snapshot's event, from
the broker: those are sent once, whether or not a collector runs."""
_MAX_RANGES = 1000
_PUBACK_S = 30.0
_SLOWEST_BYTES_S = 10_000.0
_RESEND_S = (30.0, 600.0)
_MAX_STRIKES = 3.0
_SLOW_STRIKE = 0.3
"""A connection that ended by a time limit says less than one that the broker ended: the network may be slow."""
_SOON_S = 15.0
"""A broker that ends a connection for a message does so at once."""
_MAX_REFUSALS = 3
_MAX_IGNORED, _IGNORED_S = 8, 1800.0
"""A message that never arrives, although later ones do, is dropped after so many attempts and this time: MQTT 3.1.1
brokers acknowledge and discard what is too large for them. Longer than a dead collector keeps its share of messages."""
_CONTENT_REFUSED = (0x90, 0x95, 0x99)
"""MQTT 5 reason codes of messages that no later attempt can deliver: topic, size, format."""


class _InFlight(msgspec.Struct):
    """A message that was sent and that the collector has not acknowledged yet."""

    kind: str
    size: int
    sent: float
    due: float
    tries: int = 1
    mid: int | None = None
    """Packet number until the broker acknowledges it."""
    suspect: bool = False
    """Whether it was in the air when a connection ended, and has not been acknowledged by the broker since."""
    strikes: float = 0.0
    first_sent: float = 0.0
    ignored: int = 0
    """Attempts after which the collector acknowledged a message that was sent later, but not this one."""
    refused_at: float = 0.0
    refusals: int = 0


class Outbox:
    """The messages of a spool on their way to a broker. Not thread-safe: only the uplink's thread uses it."""

    def __init__(self, spool: Spool, *, delivery: Delivery) -> None:
        self.refused = 0
        """Messages that the broker refused; each refusal counts."""
        self.dropped = 0
        """Messages that were dropped because the broker would never take them."""
        self.resent = 0
        """Messages that were sent again."""
        self.refusals: dict[str, str] = {}
        """Kind -> why the broker refused its last message; accepting one takes it back."""
        self.unanswered = False
        """Whether messages wait for a collector that does not acknowledge."""
        self._spool, self._delivery = spool, delivery
        self._in_flight: dict[int, _InFlight] = {}
        self._sent: dict[str, int] = {}
        """Kind -> the highest sequence that was sent."""
        self._acknowledged: set[int] = set()
        self._seen = -1
        self._receive_maximum = IN_FLIGHT
        self._passed: dict[str, float] = {}
        """Kind -> when the broker last accepted a message of it."""
        self._largest = 0
        """Size of the largest message that the broker accepted."""
        self._arrived_sent = 0.0
        """When the latest message that the collector acknowledged was sent."""
        self._blocked: dict[str, tuple[float, float]] = {}
        """Kind that the broker refuses -> when one message of it is tried again, and after which pause."""
        self._suspects_turn = False
        self.others = 0
        """Messages in flight that are not the spool's."""

    def connected(self, *, receive_maximum: int, now: float) -> None:
        """Begin with a new connection: everything in flight is sent again."""
        self._receive_maximum = min(IN_FLIGHT, receive_maximum)
        self._suspects_turn = False
        for message in self._in_flight.values():
            if not message.refusals:
                message.due, message.tries = now, 0
            message.mid = None

    def disconnected(self, now: float, *, by_broker: bool) -> bool:
        """Note the end of a connection; return whether a single message is to blame for it.

        Args:
            now: `time.monotonic`.
            by_broker: Whether the broker ended it, not a time limit or this device.

        """
        air = [(sequence, message) for sequence, message in self._in_flight.items() if message.mid is not None]
        for _, message in air:
            message.mid, message.suspect, message.due = None, True, now
        if len(air) != 1:
            return False
        sequence, message = air[0]
        to_blame = by_broker and now - message.sent < _SOON_S
        message.strikes += 1.0 if to_blame else _SLOW_STRIKE
        if message.strikes >= _MAX_STRIKES:
            self._set_aside(sequence, message, now)
        return to_blame

    def send(self, now: float, publish: Callable[[Held], int | None]) -> str:
        """Forget what was acknowledged and send what may be sent.

        Args:
            now: `time.monotonic`.
            publish: Sends a message and returns its packet number; None for one that is too long for the broker.

        Returns: why the connection has to be dropped; empty if it need not.

        """
        self._forget()
        air = [message for message in self._in_flight.values() if message.mid is not None]
        for message in air:
            limit_s = _PUBACK_S + message.size / _SLOWEST_BYTES_S
            if now - message.sent > limit_s:
                return f"the broker did not acknowledge a message within {limit_s:.0f} s"
        if any(message.suspect for message in air):
            return ""  # it travels alone
        suspects = [s for s, message in self._in_flight.items() if message.suspect and message.due <= now]
        if suspects and self._suspects_turn:
            if not air:
                self._suspects_turn = False
                self._resend(suspects[0], now, publish)
            return ""
        self._suspects_turn = True
        older: Counter[str] = Counter()
        for sequence, message in list(self._in_flight.items()):
            older[message.kind] += not (message.suspect or message.ignored)
            due = message.mid is None and message.due <= now and not message.suspect
            due = due and older[message.kind] <= _MAX_IN_FLIGHT[message.kind]
            if due and (self.free <= 0 or not self._resend(sequence, now, publish)):
                break
        appended = self._spool.appended
        if appended != self._seen and self._send_new(now, publish):
            self._seen = appended
        return ""

    def on_puback(self, mid: int, reason: Any, now: float) -> None:
        """Note the broker's answer to a message."""
        for sequence, message in self._in_flight.items():
            if message.mid == mid:
                message.mid = None
                if reason.is_failure:
                    self._on_refusal(sequence, message, reason, now)
                else:
                    self._on_accepted(sequence, message, now)
                return

    def on_ack(self, ack: Ack, now: float) -> bool:
        """Note what the collector stored; false for another spool's, and for a newer schema, whose ranges may mean
        something else. What was not sent cannot be acknowledged.
        """
        if ack.schema > SCHEMA or ack.spool not in self._spool.ids or self._delivery != "collector":
            return False
        ranges = ack.ranges[:_MAX_RANGES]
        arrived = {s for s in self._in_flight if any(first <= s <= last for first, last in ranges)}
        self._acknowledged |= arrived
        self._arrived_sent = max([self._arrived_sent, *(self._in_flight[s].sent for s in arrived)])
        for message in self._in_flight.values():  # the collector is there: what it has not seen by now may be lost
            if now - message.sent > _RESEND_S[0] and not message.refusals:
                message.due = now
        return True

    @property
    def status_accepted(self) -> bool:
        """Whether the broker accepted a status."""
        return "status" in self._passed

    @property
    def all_sent(self) -> bool:
        """Whether the broker acknowledged everything that may be sent now."""
        return self._seen == self._spool.appended and all(m.mid is None for m in self._in_flight.values())

    def _forget(self) -> None:
        if self._acknowledged:
            for sequence in self._acknowledged:
                self._in_flight.pop(sequence, None)
            self._spool.forget(self._acknowledged)
            self._acknowledged = set()
            self.unanswered = False

    def _send_new(self, now: float, publish: Callable[[Held], int | None]) -> bool:
        """Send new messages of every kind; False if there may be more that cannot be sent now."""
        complete = True
        for kind, max_in_flight in _MAX_IN_FLIGHT.items():
            after = self._sent.get(kind, -1)
            if not self._spool.has(kind, after=after):
                continue
            waiting = [m for m in self._in_flight.values() if m.kind == kind and not (m.suspect or m.ignored)]
            free = min(max_in_flight - sum(m.mid is not None for m in waiting), _MAX_WAITING[kind] - len(waiting))
            reserved = kind != "status" and self._receive_maximum > 1  # one is kept for the status
            free = min(free, self.free - reserved, self._allowed(kind, now))
            if free <= 0:
                complete = False
                continue
            pending = self._spool.pending(kind, after=after, limit=free)
            complete &= len(pending) < free
            for held in pending:
                self._sent[kind] = held.sequence
                if kind == "status":  # it replaces the statuses before
                    old = [s for s, m in self._in_flight.items() if m.kind == "status" and m.mid is None]
                    self._in_flight = {s: m for s, m in self._in_flight.items() if s not in old}
                mid = publish(held)
                if mid is None:
                    self._drop(held.sequence)
                    continue
                self._in_flight[held.sequence] = _InFlight(
                    kind=kind, size=len(held.payload), sent=now, first_sent=now, due=now + _resend_pause(1), mid=mid
                )
        return complete

    def _allowed(self, kind: str, now: float) -> int:
        """How many messages of a kind may be tried: one from time to time while the broker refuses it."""
        if kind not in self._blocked:
            return IN_FLIGHT
        return int(now >= self._blocked[kind][0])

    def _resend(self, sequence: int, now: float, publish: Callable[[Held], int | None]) -> bool:
        """Send a message of the spool again; a message that is not there any more is forgotten."""
        message, held = self._in_flight[sequence], self._spool.get(sequence)
        if held is None:
            del self._in_flight[sequence]
            return True
        message.ignored += self._arrived_sent > message.sent
        never_arrives = message.ignored >= _MAX_IGNORED and now - message.first_sent > _IGNORED_S
        mid = None if never_arrives else publish(held)
        if mid is None:
            self._drop(sequence)
            return True
        message.mid, message.sent, message.tries = mid, now, message.tries + 1
        message.due = now + _resend_pause(message.tries)
        self.resent += 1
        self.unanswered |= message.tries > 2 and self._delivery == "collector"
        return True

    def _on_accepted(self, sequence: int, message: _InFlight, now: float) -> None:
        message.suspect, message.strikes, message.refusals = False, 0.0, 0
        self._passed[message.kind] = now
        self._largest = max(self._largest, message.size)
        self.refusals.pop(message.kind, None)
        if self._blocked.pop(message.kind, None):
            self._seen = -1
        if self._delivery == "broker":
            self._acknowledged.add(sequence)

    def _on_refusal(self, sequence: int, message: _InFlight, reason: Any, now: float) -> None:
        self.refused += 1
        self.refusals[message.kind] = str(reason)
        message.refusals += 1
        message.refused_at = message.refused_at or now
        others_pass = self._passed.get(message.kind, -1.0) > message.refused_at
        if int(reason.value) in _CONTENT_REFUSED or (others_pass and message.refusals >= _MAX_REFUSALS):
            self._drop(sequence)
            return
        message.due = now + _resend_pause(message.refusals)
        self._block(message.kind, now)

    def _set_aside(self, sequence: int, message: _InFlight, now: float) -> None:
        """Drop a message that alone ended several connections; if the broker may refuse its whole kind, keep it."""
        if message.kind in self._passed or message.size > self._largest:
            self._drop(sequence)
            return
        message.strikes, message.due = 0.0, now + _RESEND_S[1]
        self.refusals[message.kind] = "the broker ends the connection at each message of this kind"
        self._block(message.kind, now)

    def _block(self, kind: str, now: float) -> None:
        _, pause = self._blocked.get(kind, (0.0, _RESEND_S[0] / 2))
        pause = min(2 * pause, _RESEND_S[1])
        self._blocked[kind] = (now + pause, pause)

    def _drop(self, sequence: int) -> None:
        """Drop and count a message that the broker will never take."""
        self._in_flight.pop(sequence, None)
        self._seen = -1
        held = self._spool.get(sequence)
        if held is not None:
            self.dropped += 1
            self._spool.refuse(held)

    @property
    def free(self) -> int:
        """How many messages the broker takes now."""
        waiting = sum(message.mid is not None for message in self._in_flight.values())
        return self._receive_maximum - waiting - self.others


def _resend_pause(tries: int) -> float:
    """Seconds until a message is sent again."""
    return min(_RESEND_S[0] * 2.0 ** (max(tries, 1) - 1), _RESEND_S[1]) * random.uniform(0.9, 1.1)
