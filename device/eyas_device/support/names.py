"""Names of sites and devices, and addresses of brokers."""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import NamedTuple

MAX_NAME = 64
NAME = rf"[A-Za-z0-9._-]{{1,{MAX_NAME}}}"
"""Pattern of a site's or device's name: one level of a topic."""
MQTT_PORT, TLS_PORT = 1883, 8883
"""Default ports without and with TLS."""
_SCHEMES = {"mqtt": False, "tcp": False, "mqtts": True, "ssl": True, "tls": True}
"""Scheme of an address -> whether it means TLS."""
_FORMS = "HOST or HOST:PORT is needed, an IPv6 address with a port as [::1]:8883"
COLLECTORS = "collectors"
"""Level of the topics of collectors, where devices have their site."""
_SHOWN = 40
"""Characters of a name that are quoted."""
_PLACEHOLDERS = ("BROKER", "HOST", "HOSTNAME", "ADDRESS")


class BrokerAddress(NamedTuple):
    """Where a broker listens, and whether its address asks for TLS."""

    host: str
    port: int
    tls: bool = False

    @property
    def is_loopback(self) -> bool:
        """Whether it is the machine itself, whichever that is."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def __str__(self) -> str:
        return format_address(self.host, self.port)


LOG_LEVELS = ("debug", "info", "warning", "error")
"""Names of the levels of log messages, for the command line and the configuration."""


def format_address(host: str, port: int) -> str:
    """`HOST:PORT`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_name() -> str:
    """The host's name, with characters that are not allowed in a name replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:64] or "device"


def check_name(name: str) -> str:
    """Return `name` if a site, device or collector may be called so. Raises `ValueError` otherwise.

    It becomes a level of topics, a folder and a part of a client id.
    """
    if name in (".", ".."):
        raise ValueError(f"{name!r}: not a name; choose another one")
    if not re.fullmatch(NAME, name):
        shown = name if len(name) <= _SHOWN else f"{name[:_SHOWN]}..."
        raise ValueError(f"{shown!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed")
    return name


def check_site(site: str) -> str:
    """Return `site` if a site may be called so. Raises `ValueError` otherwise."""
    if site == COLLECTORS:
        raise ValueError(f"{site!r}: reserved for collectors; choose another name")
    return check_name(site)


def parse_broker(text: str, *, tls: bool = False) -> BrokerAddress:
    """Parse the address of a broker in any of its usual forms.

    Args:
        text: A host name or an IPv4 or IPv6 address, each with or without a port; an IPv6 address with a port has
            brackets. `mqtt://` or `tcp://` in front means without TLS, `mqtts://`, `ssl://` or `tls://` with it.
        tls: Whether TLS is configured; it makes 8883 the default port instead of 1883.

    Raises:
        ValueError: for anything else; the message names the right form and never a password.

    """
    scheme, separator, rest = text.rpartition("://")
    if "@" in text:
        raise ValueError(
            "user and password do not belong into the address of a broker: `user` and `password_file` in [telemetry], "
            "or the options for them, take them"
        )
    if separator:
        rest = rest.removesuffix("/")
        if "/" not in rest:
            tls = _scheme_tls(scheme, text, tls=tls)
    if "/" in rest:
        raise ValueError(f"{text!r}: the address of a broker has no path; {_FORMS}")
    host, port = _split_port(rest, text)
    check_address(host, TLS_PORT if port is None else port, text)
    return BrokerAddress(host, port if port is not None else TLS_PORT if tls else MQTT_PORT, tls)


def check_address(host: str, port: int, text: str = "") -> None:
    """Raise `ValueError` unless a broker can have this host and port; the message quotes `text`."""
    text = text or format_address(host, port)
    if not 1 <= port <= 65535:
        raise ValueError(f"{text!r}: HOST or HOST:PORT is needed, the port from 1 to 65535")
    if ":" in host:
        if not _is_ipv6(host):
            raise ValueError(f"{text!r}: not an IPv6 address; with a port it is written [2001:db8::17]:8883")
        return
    if host in _PLACEHOLDERS:
        raise ValueError(f"{text!r}: {host} is a placeholder; put the broker's own name or address there")
    try:
        possible = bool(re.fullmatch(r"[\w.-]+", host)) and bool(host.encode("idna"))
    except UnicodeError:
        possible = False
    if not possible:
        raise ValueError(f"{text!r}: {_FORMS}")


def _scheme_tls(scheme: str, text: str, *, tls: bool) -> bool:
    """Whether a scheme means TLS. Raises `ValueError` for one that is not MQTT's or contradicts the configured TLS."""
    kind = scheme.lower()
    if kind in ("ws", "wss"):
        raise ValueError(f"{text!r}: MQTT over WebSocket is not supported; name the broker's MQTT port, mqtts://HOST")
    if kind not in _SCHEMES:
        raise ValueError(f"{text!r}: {scheme}:// is not for MQTT; {_FORMS}")
    if tls and not _SCHEMES[kind]:
        raise ValueError(f"{text!r}: {kind}:// is without TLS, but TLS is configured; write mqtts://")
    return _SCHEMES[kind]


def _split_port(rest: str, text: str) -> tuple[str, int | None]:
    """Host, without brackets, and port, None without one."""
    if bracketed := re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", rest, re.DOTALL):
        host, port = bracketed[1], bracketed[2]
        if ":" not in host:
            raise ValueError(f"{text!r}: brackets are for an IPv6 address; {_FORMS}")
    elif rest.count(":") > 1:
        if rest.endswith((f":{MQTT_PORT}", f":{TLS_PORT}")):
            start, _, last = rest.rpartition(":")
            raise ValueError(f"{text!r}: an address, or one with a port? Write [{rest}] or [{start}]:{last}")
        host, port = rest, None
    else:
        host, colon, after = rest.partition(":")
        port = after if colon else None
    if port is None:
        return host, None
    if not re.fullmatch(r"\d{1,5}", port, re.ASCII):
        raise ValueError(f"{text!r}: HOST or HOST:PORT is needed, the port from 1 to 65535; IPv6 as [::1]:8883")
    return host, int(port)


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True
