"""Names of sites and devices, and addresses of brokers."""

from __future__ import annotations

import re
import socket

NAME = r"[A-Za-z0-9._-]{1,64}"
"""Pattern of a site's or device's name: one level of a topic."""
MQTT_PORT = 1883


def host_name() -> str:
    """The host's name, with characters that are not allowed in a name replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "device"


def check_name(name: str) -> str:
    """Return `name` if a site or device may be called so. Raises `ValueError` otherwise."""
    if not re.fullmatch(NAME, name):
        raise ValueError(f"{name!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed")
    return name


def parse_broker(text: str) -> tuple[str, int]:
    """Host and port of `HOST` or `HOST:PORT` (1883 by default). Raises `ValueError` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(MQTT_PORT)
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII):
        raise ValueError(f"{text!r}: HOST or HOST:PORT is needed")
    return check_address(host, int(port))


def check_address(host: str, port: int) -> tuple[str, int]:
    """Return host and port if both are possible. Raises `ValueError` otherwise."""
    try:
        possible = bool(host.encode("idna")) and 1 <= port <= 65535
    except UnicodeError:
        possible = False
    if not possible:
        raise ValueError(f"{f'{host}:{port}'!r}: HOST or HOST:PORT is needed, the port from 1 to 65535")
    return host, port
