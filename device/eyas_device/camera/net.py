"""Connections to network cameras: every wait has an end."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

CONNECT_S = 1.5
"""Longest wait for one address to accept: long enough for one repeated SYN, short enough to be back in two seconds."""


class ConnectTimeout(TimeoutError):  # noqa: N818 - like its base class
    """The host did not respond."""


def remaining(deadline: float) -> float:
    """Seconds until `deadline`. Raises `TimeoutError` if it has passed."""
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first address of `host` that accepts. Raises `OSError` with the last address's reason."""
    last_error: OSError = OSError("no address")
    for family, kind, protocol, _, address in _resolve(host, port, deadline):
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(min(CONNECT_S, remaining(deadline)))
            connected.connect(address)
            return connected
        except TimeoutError:
            connected.close()
            last_error = ConnectTimeout("timed out")
        except OSError as error:
            connected.close()
            last_error = error
    raise last_error


def connect_problem(error: OSError) -> str:
    """Explain why `connect` failed, and what to do."""
    if isinstance(error, TimeoutError):
        return "the host does not respond; is the camera on, and on this network?"
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there (connection refused); is the camera on, and the port right?"
    if isinstance(error, socket.gaierror):
        return f"unknown host name ({error.strerror}); check the name and the network"
    return str(error.strerror or error)


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """Resolve `host` in a thread that can be abandoned, because `getaddrinfo` has no timeout."""
    addresses: list[Any] = []
    errors: list[OSError] = []

    def resolve() -> None:
        try:
            addresses.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            errors.append(error)

    thread = threading.Thread(target=resolve, name="eyas-resolve", daemon=True)
    thread.start()
    thread.join(remaining(deadline))
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TimeoutError("the host name was not resolved")
    return addresses
