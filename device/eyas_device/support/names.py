"""Names of sites, devices and brokers."""

from __future__ import annotations

import re
import socket

NAME = r"[A-Za-z0-9._-]{1,64}"
"""What a site or a device may be called."""


def host_name() -> str:
    """The host's name, with what is not allowed in a name replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "device"


def broker(text: str) -> tuple[str, int]:
    """Host and port of `HOST` or `HOST:PORT` (1883 without one). Raises `ValueError` for anything else."""
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, "1883"
    if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 0 < int(port) < 65536:
        raise ValueError(f"{text!r}: HOST or HOST:PORT is needed")
    return host, int(port)
