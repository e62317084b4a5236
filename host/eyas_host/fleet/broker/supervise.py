"""Run mosquitto, and disconnect expelled devices while it runs.

The revocation list is a file in the broker's folder, wherever it came from. When it changes, mosquitto reloads it: that
keeps revoked certificates out but leaves connections alone. These end by a takeover: the host connects with the
device's client id, which mosquitto's log names. All other connections stay.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from cryptography import x509
from paho.mqtt.client import CallbackAPIVersion, Client, MQTTProtocolVersion

from eyas_device.errors import EyasError, LinkError
from eyas_device.support.names import format_address
from eyas_host.fleet.broker.account import broker_account, check_access, hand_over
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.kit import AUTHORITY, Kit
from eyas_host.fleet.broker.pki import Authority, CredentialError
from eyas_host.fleet.broker.revocation import LIST, load_list, revoked

_STOP_S = 10.0
_POLL_S = 1.0
_WATCHED_S = 150.0
"""How long new connections of an expelled device are ended: mosquitto gives one that passed TLS before the list was
reloaded up to 90 s to log in. A device that is enrolled again meanwhile may connect."""
_MAX_IDS = 100
"""Client ids of one user that are remembered; one that had more is disconnected by a restart."""
_REPLY_S = 5.0
_QUIET_S = 0.5
_CONNECTED = re.compile(r"New client connected from \S+ as (.*) \(p\d+, c\d+, k\d+, u'([^']*)'\)\.$")


def serve(kit: Kit, say: Callable[[str], None] = print) -> int:
    """Run mosquitto in the foreground until it ends or SIGTERM/SIGINT arrives, and return its exit code.

    Raises `LinkError` if mosquitto is not installed, `CredentialError` if its user cannot reach its files.
    """
    program = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        raise LinkError("mosquitto is not installed: apt-get install mosquitto, or use `eyas broker --embedded`")
    if account := broker_account():
        check_access(kit.config.parent, account)
    say(f"broker: mqtts on port {kit.port}, certificate for {', '.join(kit.hosts)}")
    return _Supervisor(program, kit, say).run()


_FOR_EVERYBODY = b"/group/+/desired' does not contain '%c' or '%u'"
"""Mosquitto warns of the rule by which every device reads what rollouts want; that is what the rule is for."""


class _ConnectionLog:
    """Forwards mosquitto's log and remembers with which client ids each user connected."""

    def __init__(self) -> None:
        self.complete = True
        """Whether every connection could be read."""
        self._ids: dict[str, set[str]] = defaultdict(set)
        self._lock = threading.Lock()

    def follow(self, stream: Iterable[bytes]) -> None:
        for line in stream:
            if _FOR_EVERYBODY in line:
                continue
            with suppress(OSError):  # a full log disk must not stop the broker
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            self.read(line.decode("utf-8", "replace").rstrip())

    def read(self, line: str) -> None:
        if "New client connected" not in line:
            return
        match = _CONNECTED.search(line)
        with self._lock:
            if match is None or len(self._ids[match[2]]) >= _MAX_IDS:
                self.complete = False
            else:
                self._ids[match[2]].add(match[1])

    def take(self, user: str) -> set[str]:
        """Client ids of a user's connections since the last call."""
        with self._lock:
            return self._ids.pop(user, set())


class _Supervisor:
    def __init__(self, program: str, kit: Kit, say: Callable[[str], None]) -> None:
        self._program, self._kit, self._say = program, kit, say
        self._crl = kit.config.with_name(LIST)
        self._authority = x509.load_pem_x509_certificate(kit.host.ca.read_bytes())
        self._version, self._revoked = self._file_version(), revoked(load_list(self._crl, self._authority))
        self._watched: dict[str, float] = {}
        """Expelled device -> until when its connections are ended, by `time.monotonic`."""
        self._ids: set[str] = set()
        """Client ids to end."""
        self._statuses: set[str] = set()
        """Devices whose retained status is to be removed."""
        self._stopping = False
        self._process, self._log = self._start()

    def run(self) -> int:
        before = {kind: signal.signal(kind, self._stop) for kind in (signal.SIGTERM, signal.SIGINT)}
        try:
            while True:
                try:
                    return self._process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    if self._stopping:
                        self._process.terminate()  # it was started since
                    else:
                        self._follow_list()
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
            self._end()

    def _start(self) -> tuple[subprocess.Popen[bytes], _ConnectionLog]:
        log = _ConnectionLog()
        process = subprocess.Popen([self._program, "-c", str(self._kit.config)], stderr=subprocess.PIPE)
        assert process.stderr is not None
        threading.Thread(target=log.follow, args=(process.stderr,), daemon=True).start()
        return process, log

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._process.terminate()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_STOP_S)

    def _file_version(self) -> tuple[int, int, int] | None:
        try:
            info = self._crl.stat()
        except OSError:
            return None
        return info.st_mtime_ns, info.st_size, info.st_ino

    def _follow_list(self) -> None:
        version = self._file_version()
        if version != self._version:
            self._version = version
            self._reload()
        self._let_back_in()
        for name in self._watched:
            if ids := self._log.take(name):
                self._ids |= ids
                self._statuses.add(name)
        if self._ids or self._statuses:
            self._evict()

    def _let_back_in(self) -> None:
        """Forget expelled devices after a while, and those that the authority, if it is here, has enrolled again."""
        now = time.monotonic()
        self._watched = {name: until for name, until in self._watched.items() if until > now}
        if self._watched or self._statuses:
            with suppress(CredentialError):
                issued = Authority(self._kit.folder / AUTHORITY, create=False).issued()
                back = {one.name for one in issued if int(one.serial, 16) not in self._revoked}
                self._watched = {name: until for name, until in self._watched.items() if name not in back}
                self._statuses -= back

    def _reload(self) -> None:
        """Let mosquitto read the list, and end the connections of the devices that are new in it."""
        try:
            found = revoked(load_list(self._crl, self._authority))
        except CredentialError as error:
            self._say(f"broker: {error}; the list of before stays in use")
            return
        names = sorted({name for serial, name in found.items() if serial not in self._revoked} - {""})
        self._revoked = found
        self._say(f"broker: {len(found)} certificates are revoked; expelled now: {', '.join(names) or 'nobody'}")
        if account := broker_account():
            hand_over(self._crl.parent, account)  # a list that root copied may be closed to mosquitto
        self._process.send_signal(signal.SIGHUP)
        self._watched |= dict.fromkeys(names, time.monotonic() + _WATCHED_S)
        self._statuses |= set(names)
        if names and not self._log.complete:
            self._say("broker: restarts to end the connections of expelled devices")
            self._end()
            self._process, self._log = self._start()

    def _evict(self) -> None:
        """End connections and remove statuses; what fails is tried again at the next call."""
        host = self._kit.host
        access = BrokerAccess(
            broker=format_address(self._kit.address, self._kit.port), ca=host.ca, certificate=host.cert, key=host.key
        )
        try:
            for client_id in sorted(self._ids):
                with _Connection(access, client_id):
                    self._ids.discard(client_id)
            self._let_back_in()  # ending connections took a while
            with _Connection(access, "") as connection:
                connection.remove_statuses(self._statuses)
            self._statuses.clear()
        except (EyasError, OSError) as error:
            self._say(f"broker: an expelled device may still be connected ({access.describe(error)}); trying again")


class _Connection:
    """A connection of the host under a client id, which ends any other one under it."""

    def __init__(self, access: BrokerAccess, client_id: str) -> None:
        self._access = access
        self._connected, self._subscribed = threading.Event(), threading.Event()
        self._last = 0.0
        self._client = Client(CallbackAPIVersion.VERSION2, client_id=client_id, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda *_: self._connected.set()
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message

    def __enter__(self) -> _Connection:
        self._access.apply(self._client)
        self._client.connect(*self._access.address[:2], clean_start=True)
        self._client.loop_start()
        _wait(self._connected)
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def remove_statuses(self, names: Iterable[str]) -> None:
        """Remove the statuses and answers of devices that are retained now."""
        for name in names:
            self._subscribed.clear()
            self._client.subscribe([(f"eyas/+/{name}/{kind}", 1) for kind in ("status", "answer", "drift")])
            _wait(self._subscribed)
        self._last = time.monotonic()
        while time.monotonic() - self._last < _QUIET_S:
            time.sleep(_QUIET_S / 10)

    def _on_message(self, client: Client, userdata: object, message: Any) -> None:
        if message.retain and message.payload:  # not what a device that is enrolled again sends now
            self._last = time.monotonic()
            client.publish(message.topic, b"", qos=1, retain=True)


def _wait(event: threading.Event) -> None:
    if not event.wait(_REPLY_S):
        raise TimeoutError("the broker does not reply")
