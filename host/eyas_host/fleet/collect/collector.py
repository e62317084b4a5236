"""The collector: what devices send goes to the store, and only what is in the store is acknowledged.

Two threads. One owns the connection: it gathers what arrives, and acknowledges what was committed, to the broker
message by message and to the devices as ranges of sequence numbers. The other checks and commits, a batch at a time.
Several collectors share the messages of a fleet by a shared subscription. A killed collector loses nothing: what was
not committed was not acknowledged and comes again, and what comes twice is stored once.
"""

from __future__ import annotations

import random
import select
import signal
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import msgspec
from paho.mqtt.client import Client

from eyas_device.errors import LinkError
from eyas_device.support.closing import Closing
from eyas_device.telemetry.messages import KINDS, Ack, encode, topic
from eyas_device.telemetry.mqtt_client import Connector, LinkState, LinkStatus, Session
from eyas_host.fleet.broker.client import Access, why
from eyas_host.fleet.collect.writer import Arrived, Committed, Writer
from eyas_host.fleet.store.checked import Address
from eyas_host.fleet.store.ranges import as_ranges
from eyas_host.fleet.store.store import Store

_TAKEN_OVER = 0x8E
"""Reason code of a session that another client with the same name took over."""
_SESSION_S = 600
"""How long the broker keeps messages for a collector that is away; devices repeat what it then forgets."""
_CONNACK_S = 5.0
_LINGER_S = 0.01
"""How long messages are gathered at least before they are handed over, unless there are many."""
_TICK_S = 0.2
_RETRY_S = (0.25, 30.0)
_STABLE_S = 60.0
"""A connection that lasted so long was a good one: the next retry is quick again."""
_OWED = 4
"""Sequences of one spool after which its acknowledgement goes out although more messages wait."""
_OWED_S = 5.0
"""Longest time that an acknowledgement is held back while messages keep coming; devices repeat after 30 s."""
_SHORT = 3
"""Connections that did not last, one after the other, before a second collector of the same name is suspected."""
_CREDIT = 500
"""Acknowledgements to devices that the broker has not taken yet, at most."""
_LAST_S = 15.0
"""Longest time to commit and acknowledge what is in hand after being told to stop."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How collecting goes; also the line of `--json`."""

    time: float
    state: str
    """`connected`, or why not."""
    store: str
    """`writing`, or why not."""
    messages: int
    """Stored since the start."""
    duplicates: int
    """Came again, and were acknowledged again."""
    quarantined: int
    per_second: float
    """Stored, since the report before."""
    waiting: int
    """Received and not yet committed."""
    lag_s: float
    """From arrival to commit, the longest since the report before."""


class Collector(Closing):
    """Collects until told to stop. `stop` may be called from any thread and from signal handlers."""

    def __init__(
        self,
        store: Store,
        access: Access,
        *,
        name: str,
        group: str = "eyas",
        receive_maximum: int = 500,
        batch: int = 500,
        tell: Callable[[Report], None] = lambda report: None,
        every_s: float = 5.0,
    ) -> None:
        """Prepare; `run` connects.

        `name` is this collector's own within the group: the broker keeps its session under it. `receive_maximum` is how
        many messages may be in hand uncommitted, `batch` how many are committed together at most: more is faster where
        a commit takes long. Raises `LinkError` for mistaken credentials.
        """
        self.status = LinkStatus()
        self._access, self._name, self._group = access, f"eyas-collect-{group}-{name}", group
        self._most, self._part = receive_maximum, min(max(1, receive_maximum // 2), batch)
        self._tell, self._every_s = tell, every_s
        session = Session(client_id=self._name, expiry_s=_SESSION_S, receive_maximum=receive_maximum, manual_ack=True)
        self._connector = Connector(access.address, session)
        self._client = self._make_client()
        self._stopping = False
        self._up = False
        self._was_up = False
        self._since = time.monotonic()
        """When it last tried to connect."""
        self._short = 0
        """How many connections in a row did not last."""
        self._epoch = 0
        """Of the connection: an acknowledgement of a message that came on an earlier one would be another message's."""
        self._gathered: list[Arrived] = []
        self._in_hand = 0
        self._owed: OrderedDict[tuple[str, str, str], tuple[float, list[int]]] = OrderedDict()
        """(site, device, spool) -> since when, and the sequences whose acknowledgement is not sent yet."""
        self._unsettled, self._credit = 0, _CREDIT
        self._done: deque[Committed] = deque()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._writer = Writer(store, self._committed, batch=batch)
        self._failure: LinkError | None = None
        self._reported = (time.monotonic(), 0)

    def stop(self) -> None:
        """Commit and acknowledge what is in hand, and return from `run`."""
        self._stopping = True

    def run(self) -> None:
        """Collect until `stop`. Raises `LinkError` if another collector of the same name takes the session over."""
        while not self._stopping and self._failure is None:
            if self._client.socket() is None:
                self._connect()
                self._since = time.monotonic()
            else:
                self._turn(_TICK_S)
                self._expect_answer()
            if self._client.socket() is None:
                self._lost()
        self._finish()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the writer; what it had not committed was not acknowledged and will come again."""
        self._writer.close()
        if self._client.socket() is not None:
            self._client.disconnect()
            self._client.loop_write()
        self._woken.close()
        self._waker.close()

    def report(self) -> Report:
        """How it goes now."""
        now, stored = time.monotonic(), self._writer.stored
        since, before = self._reported
        self._reported = (now, stored)
        return Report(
            time=round(time.time(), 3),
            state=str(self.status),
            store=self._writer.state,
            messages=stored,
            duplicates=self._writer.duplicates,
            quarantined=self._writer.quarantined,
            per_second=round((stored - before) / max(now - since, 1e-3), 1),
            waiting=self._in_hand,
            lag_s=round(self._writer.take_lag(), 3),
        )

    def _make_client(self) -> Client:
        client = self._connector.make_client()
        self._access.apply(client)
        client.max_inflight_messages_set(_CREDIT)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        client.on_publish = self._on_publish
        # With this hook set, packets wait for loop_write: a batch of acknowledgements is one turn, not one each.
        client.on_socket_register_write = lambda *_: None
        return client

    def _connect(self) -> None:
        self._epoch += 1
        self._was_up = False
        try:
            self._connector.connect(self._client)
        except (OSError, ValueError) as error:
            self._set_state(LinkState.DISCONNECTED, f"{why(error)}; trying again")

    def _set_state(self, state: LinkState, detail: str = "") -> None:
        self.status = LinkStatus(state, detail)

    def _expect_answer(self) -> None:
        """A broker of MQTT 3.1.1 may say nothing at all to a greeting in MQTT 5: try the other one in turn."""
        if not self._was_up and time.monotonic() - self._since > _CONNACK_S and (sock := self._client.socket()):
            self._connector.switch_version()
            version = "5" if self._connector.mqtt5 else "3.1.1"
            self._set_state(LinkState.DISCONNECTED, f"no answer; trying MQTT {version}")
            sock.close()
            self._client = self._make_client()

    def _lost(self) -> None:
        """Forget what belonged to the connection, and wait a while: what was not acknowledged comes again."""
        self._up = False
        self._owed.clear()
        self._hand_over()
        # A client that is made again holds no half-read packet and no acknowledgement of the connection that is gone.
        self._client = self._make_client()
        self._short = 0 if time.monotonic() - self._since > _STABLE_S else self._short + 1
        if self._was_up and self._short > _SHORT:
            detail = f"lost again and again; does another collector have the name {self._name!r}? (--name)"
            self._set_state(LinkState.DISCONNECTED, detail)
        low, high = _RETRY_S
        self._rest(min(low * 2 ** min(self._short, 10), high) * random.uniform(0.5, 1.0))

    def _rest(self, seconds: float) -> None:
        """Wait, committing all the while."""
        end = time.monotonic() + seconds
        while not self._stopping and (left := end - time.monotonic()) > 0:
            select.select([self._woken], [], [], min(left, _TICK_S))
            self._settle()
            self._say()

    def _turn(self, timeout: float) -> None:
        """Read what is there, write what is due, at most `timeout` seconds."""
        client = self._client
        sock = client.socket()
        if sock is None:
            return
        room = self._has_room
        pending = bool(room and getattr(sock, "pending", None) and sock.pending())  # what TLS has decrypted already
        if self._gathered:
            timeout = min(timeout, _LINGER_S)
        readers = [self._woken, sock] if room else [self._woken]
        writers = [sock] if client.want_write() else []
        ready, writable, _ = select.select(readers, writers, [], 0 if pending else timeout)
        if sock in ready or pending:
            self._read()
        if self._gathered and time.monotonic() - self._gathered[0].at >= _LINGER_S:
            self._hand_over()
        self._settle()
        if client.want_write() or writable:
            client.loop_write()
        client.loop_misc()
        self._say()

    def _read(self) -> None:
        """Read packets until there are none, or enough for a batch."""
        for _ in range(self._most):
            before = self._in_hand
            self._client.loop_read()
            if len(self._gathered) >= self._part:
                self._hand_over()
            if self._in_hand == before or not self._has_room:
                return

    @property
    def _has_room(self) -> bool:
        """Whether more may be read. Brokers (mosquitto 2.0) may send more than the receive maximum: then TCP waits."""
        return self._in_hand < self._most

    def _hand_over(self) -> None:
        if self._gathered:
            self._writer.put(self._gathered)
            self._gathered = []

    def _committed(self, committed: Committed) -> None:
        """Called by the writer's thread."""
        self._done.append(committed)
        self._waker.send(b"\0")

    def _settle(self) -> None:
        """Acknowledge what was committed: to the broker at once, to devices when it pays."""
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        now = time.monotonic()
        mids: list[int] = []
        while self._done:
            done = self._done.popleft()
            self._in_hand -= done.count
            if self._up and done.epoch == self._epoch:
                mids += done.mids
                for address in done.addresses:
                    self._owe(address, now)
        if not self._up:
            return
        idle = self._in_hand == 0
        while self._owed and self._unsettled < self._credit:
            if not idle and now - next(iter(self._owed.values()))[0] < _OWED_S:
                break
            self._pay(*self._owed.popitem(last=False))
        # The broker comes last: a collector killed in between gets the messages again, and answers the devices then.
        for mid in mids:
            self._client.ack(mid, 1)

    def _owe(self, address: Address, now: float) -> None:
        key = (address.site, address.device, address.spool)
        owed = self._owed.get(key)
        if owed is None:
            self._owed[key] = (now, [address.sequence])
        else:
            owed[1].append(address.sequence)
            if len(owed[1]) >= _OWED and self._unsettled < self._credit:
                self._pay(key, self._owed.pop(key))

    def _pay(self, key: tuple[str, str, str], owed: tuple[float, Iterable[int]]) -> None:
        site, device, spool = key
        ack = Ack(device=device, spool=spool, ranges=tuple(as_ranges(owed[1])))
        self._unsettled += 1
        self._client.publish(topic(site, device, "ack"), encode(ack), qos=1)

    def _finish(self) -> None:
        """After `stop`: commit and acknowledge what is in hand."""
        self._hand_over()
        self._writer.finish()
        end = time.monotonic() + _LAST_S
        while (self._in_hand or self._owed or self._client.want_write()) and time.monotonic() < end:
            if self._client.socket() is None:
                self._owed.clear()
                if not self._in_hand:
                    break
                self._rest_for_writer()
                continue
            select.select([self._woken], [], [], 0.02)
            self._settle()
            self._client.loop_write()
        self._tell(self.report())

    def _rest_for_writer(self) -> None:
        select.select([self._woken], [], [], _TICK_S)
        self._settle()

    def _say(self) -> None:
        if time.monotonic() - self._reported[0] >= self._every_s:
            self._tell(self.report())

    def _on_connect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            detail = str(reason)
            if self._connector.mqtt5 and self._connector.switch_if_unsupported(reason):
                detail = "it does not speak MQTT 5; trying 3.1.1, without shared subscriptions"
            self._set_state(LinkState.REFUSED, detail)
            return
        self._up = self._was_up = True  # what waited for this session comes before the answer to the subscription
        self._unsettled, self._credit = 0, min(_CREDIT, getattr(properties, "ReceiveMaximum", _CREDIT))
        mqtt5 = self._connector.mqtt5
        share = f"$share/{self._group}/" if mqtt5 else ""
        client.subscribe([(f"{share}eyas/+/+/{kind}", _options(mqtt5)) for kind in KINDS])

    def _on_subscribe(self, client: Client, userdata: object, mid: int, reasons: Any, properties: Any) -> None:
        refused = [str(reason) for reason in reasons if reason.is_failure]
        if refused:
            self._set_state(LinkState.SUBSCRIPTION_REFUSED, refused[0])
        else:
            self._set_state(LinkState.CONNECTED)

    def _on_disconnect(self, client: Client, userdata: object, flags: Any, reason: Any, properties: Any) -> None:
        self._up = False
        if getattr(reason, "value", 0) == _TAKEN_OVER:
            self._failure = LinkError(f"another collector took the name {self._name!r}; give each a --name of its own")
        elif self.status.state is not LinkState.REFUSED:
            self._set_state(LinkState.DISCONNECTED, f"{reason}; trying again")

    def _on_publish(self, client: Client, userdata: object, mid: int, reason: Any, properties: Any) -> None:
        self._unsettled -= 1
        if reason.is_failure:
            self._set_state(LinkState.MESSAGE_REFUSED, str(reason))

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        if message.qos == 0 and not self._has_room:
            return  # nothing was promised for it
        self._in_hand += 1
        mid = message.mid if message.qos else 0
        self._gathered.append(Arrived(self._epoch, mid, message.topic, message.payload, time.monotonic()))


def collect(
    store_url: str,
    access: Access,
    *,
    name: str | None = None,
    group: str = "eyas",
    receive_maximum: int = 500,
    batch: int = 500,
    tell: Callable[[Report], None] = lambda report: None,
    every_s: float = 5.0,
) -> None:
    """Collect until SIGTERM or SIGINT; see `Collector`. Raises `StoreError` and `LinkError`."""
    with (
        Store(store_url) as store,
        Collector(
            store,
            access,
            name=name or socket.gethostname(),
            group=group,
            receive_maximum=receive_maximum,
            batch=batch,
            tell=tell,
            every_s=every_s,
        ) as collector,
    ):
        before = {kind: signal.signal(kind, lambda *_: collector.stop()) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            collector.run()
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def _options(mqtt5: bool) -> Any:
    from paho.mqtt.subscribeoptions import SubscribeOptions

    return SubscribeOptions(qos=1) if mqtt5 else 1
