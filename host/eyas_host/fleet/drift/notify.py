"""Tell people and programs of alarms: a retained MQTT message a device, and a POST to a web server.

What could not be delivered waits in memory and is tried again with the next change or turn; of each device the newest
state counts.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec

from eyas_device import __version__
from eyas_device.errors import EyasError
from eyas_device.support.redact import redact
from eyas_device.telemetry.messages import topic
from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.broker.publish import publish_retained
from eyas_host.fleet.drift.alarms import Alarm, anchor_of
from eyas_host.fleet.drift.errors import DriftError

KIND = "drift"
"""Last level of the topic `eyas/SITE/DEVICE/drift`."""
_TIMEOUT_S = 10.0
_MAX_WAITING = 1000


class Notifier:
    """Delivers alarms.

    Args:
        access: The broker; None: no MQTT messages.
        webhook: Address that alarms are posted to; empty: none.
        page_url: Address of the page of drift; messages carry that of the alarm's section on it. Empty: none.

    Raises:
        DriftError: An address is not one of a web server.

    """

    def __init__(self, access: BrokerAccess | None = None, webhook: str = "", page_url: str = "") -> None:
        for option, address in (("--webhook", webhook), ("--page-url", page_url)):
            if address and not _is_web_address(address):
                raise DriftError(f"{option} {redact(address)}: http://HOST/PATH or https://HOST/PATH is needed")
        self._access, self._webhook, self._page_url = access, webhook, page_url.partition("#")[0]
        self._for_broker: dict[str, Alarm] = {}
        self._for_webhook: dict[str, Alarm] = {}

    def deliver(self, alarms: Iterable[Alarm] = ()) -> list[str]:
        """Deliver alarms and what waits from before; return what could not be, for people."""
        for alarm in map(self._with_page, alarms):
            if self._access is not None:
                self._for_broker[alarm.device] = alarm
            if self._webhook:
                self._for_webhook[alarm.id] = alarm
        for waiting in (self._for_broker, self._for_webhook):
            while len(waiting) > _MAX_WAITING:
                del waiting[next(iter(waiting))]
        return [*self._publish(), *self._post()]

    def _with_page(self, alarm: Alarm) -> Alarm:
        if not self._page_url:
            return alarm
        return msgspec.structs.replace(alarm, page=f"{self._page_url}#{quote(anchor_of(alarm))}")

    def _publish(self) -> list[str]:
        if self._access is None or not self._for_broker:
            return []
        messages = {topic(a.site, a.device, KIND): msgspec.json.encode(a) for a in self._for_broker.values()}
        try:
            publish_retained(self._access, messages, name="eyas-drift")
        except EyasError as error:
            return [f"drift: {len(messages)} alarms wait for the broker: {error}"]
        self._for_broker.clear()
        return []

    def _post(self) -> list[str]:
        for id_, alarm in list(self._for_webhook.items()):
            try:
                _post(self._webhook, msgspec.json.encode(alarm))
            except (OSError, ValueError) as error:  # urllib's errors are OSErrors
                why = getattr(error, "reason", None) or error
                return [f"drift: {len(self._for_webhook)} alarms wait for {redact(self._webhook)}: {why}"]
            del self._for_webhook[id_]
        return []


def _is_web_address(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # e.g. brackets without an IPv6 address
        return False


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _post(address: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json", "User-Agent": f"eyas/{__version__}"}
    request = urllib.request.Request(address, body, headers, method="POST")
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S) as response:
        response.read(1024)
