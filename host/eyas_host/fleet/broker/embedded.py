"""An MQTT broker inside this process, for a first try without mosquitto.

MQTT 3.1.1 on this machine only: no TLS, no access control, no persistence, no shared subscriptions. Devices, collectors
and watchers fall back to 3.1.1 by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from eyas_device.errors import LinkError
from eyas_host.support.errors import MissingExtra
from eyas_host.support.extras import install_line


def serve_embedded(port: int = 1883, say: Callable[[str], None] = print) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT.

    Raises `MissingExtra` without amqtt, `LinkError` if the port is in use.
    """
    try:
        from amqtt.broker import Broker
        from amqtt.errors import AMQTTError, BrokerError
    except ImportError:
        raise MissingExtra(f"the embedded broker is not installed: {install_line('fleet')}") from None
    for library in ("amqtt", "transitions"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what ends it is raised, too
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"127.0.0.1:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(_on_uncaught)
        broker = Broker(config)
        ended = asyncio.Event()
        for kind in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(kind, ended.set)
        await broker.start()
        say(f"broker: mqtt on 127.0.0.1:{port}, for a first try: no TLS, no access control, no persistence")
        await ended.wait()
        await broker.shutdown()

    try:
        asyncio.run(run())
    except (OSError, AMQTTError, BrokerError) as error:
        number = getattr(error.__cause__ or error, "errno", None)
        reason = os.strerror(number) if number else error
        raise LinkError(f"127.0.0.1:{port}: the embedded broker cannot listen there ({reason})") from None


def _on_uncaught(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Pass over clients that hang up, as one does after it learned that there is no MQTT 5; the rest is logged."""
    if not isinstance(context.get("exception"), OSError):
        loop.default_exception_handler(context)
