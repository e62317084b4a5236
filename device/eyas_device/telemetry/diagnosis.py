"""Why a connection to a broker failed, in words and with the fix: a second connection finds out what MQTT and TLS do
not say.

TLS 1.3 reports a refused client certificate only after the handshake, where an MQTT client sees nothing but a lost
connection; a broker with TLS hangs up on a client without it, and the other way round.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress
from typing import Any

import msgspec

from eyas_device.errors import LinkError
from eyas_device.telemetry.certificates import Certificate, parse_certificate
from eyas_device.telemetry.tls import Security

_TIMEOUT_S = 3.0
_ALERT_S = 1.0
"""How long a broker may take to refuse a client certificate after the handshake."""
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
"""CONNECT of MQTT 3.1.1, without a client id."""
_CONNACK = b"\x20"
_BANNER = 64
"""Bytes of an answer that are looked at to say what listens."""
_SERVERS = {b"HTTP/": "a web server (HTTP)", b"<": "a web server (HTTP)", b"SSH-": "an SSH server"}
"""Start of an answer -> what gives it."""
_ALERTS = {
    "CERTIFICATE_EXPIRED": "expired",
    "UNKNOWN_CA": "signed by an authority that the broker does not know",
    "CERTIFICATE_REVOKED": "revoked",
    "BAD_CERTIFICATE": "bad",
    "CERTIFICATE_UNKNOWN": "not accepted",
    "UNSUPPORTED_CERTIFICATE": "of a kind that the broker does not support",
    "DECRYPT_ERROR": "signed by another authority of the same name",
    "ACCESS_DENIED": "not allowed",
}
"""Part of OpenSSL's name of a TLS alert -> what the client's certificate is, as the broker sees it."""
_REVOKED = "CERTIFICATE_REVOKED"
_MISSING = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE")
_ENROLL = "eyas enroll makes a new certificate for a device"
_NOT_YET_VALID = "set the clock: timedatectl set-ntp true"
_LOGIN_REFUSED = (0x86, 0x87)
"""Reason codes of a CONNACK: bad user name or password, not authorized."""
_NO_DNS = (socket.EAI_AGAIN,)


class Diagnosis(msgspec.Struct, frozen=True):
    """Why a connection fails, and the fix: for people, one line each."""

    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.fix}"


_SPEAKS_TLS = Diagnosis(
    "the broker speaks TLS on this port",
    "set telemetry.ca (--ca) to its authority's certificate, or tls = true (--tls) for a public one",
)
_SPEAKS_PLAIN = Diagnosis(
    "the broker speaks MQTT without TLS on this port",
    "use its port with TLS, usually 8883; without TLS: leave out ca, certificate and tls",
)
_ASKS_FOR_CERTIFICATE = Diagnosis(
    "the broker asks for a client certificate",
    "set telemetry.certificate and telemetry.key (--certificate and --key) to the files of `eyas enroll`",
)
NOT_A_BROKER = Diagnosis(
    "something accepts connections but does not answer as an MQTT broker",
    "check the port, and whether a firewall or a proxy is in between",
)


def diagnose(address: tuple[str, int], security: Security) -> Diagnosis | None:
    """Say why connections to a listening server end before it accepts them; None if that is not found out.

    Takes a few seconds at most.
    """
    with suppress(OSError, ValueError, LinkError):
        if not security.uses_tls:
            return _SPEAKS_TLS if _speaks_tls(address) else _not_a_broker(_answer(address))
        if found := next((one for one in map(invalid, security.certificates()) if one), None):
            return found
        return _diagnose_tls(address, security)
    return None


def invalid(certificate: Certificate) -> Diagnosis | None:
    """Say that a certificate is not valid now; None if it is."""
    now = time.time()
    problem = certificate.problem(now)
    if not problem:
        return None
    renew = f"{_ENROLL}, a start of `eyas broker` one for itself; check the clock, too"
    return Diagnosis(problem, _NOT_YET_VALID if now < certificate.not_before else renew)


def unreachable(address: tuple[str, int], error: OSError) -> Diagnosis | None:
    """Say why no connection could be opened; None if the error is of another kind."""
    host, port = address
    if isinstance(error, socket.gaierror):
        if error.errno in _NO_DNS:
            return Diagnosis(f"the name {host} cannot be looked up now", "check the network and its DNS server")
        return Diagnosis(f"the host name {host} is not known", "check the spelling, and the device's DNS")
    if isinstance(error, ConnectionRefusedError):
        return Diagnosis(
            f"nothing listens on port {port} of {host}",
            "start the broker; check the port, and that the broker serves the network (`eyas broker --bind 0.0.0.0`)",
        )
    if isinstance(error, TimeoutError) and not isinstance(error, ssl.SSLError):
        return Diagnosis(f"{host} does not answer", "check the address, and whether a firewall drops the connection")
    if error.errno is not None and not isinstance(error, ssl.SSLError | ConnectionError):
        return Diagnosis(f"no way to {host} ({error.strerror})", "check the device's network: ip route")
    return None


def refused(reason: Any, security: Security) -> Diagnosis:
    """Say why a broker refused the connection, by the reason code of its CONNACK."""
    if int(getattr(reason, "value", reason)) not in _LOGIN_REFUSED:
        return Diagnosis(f"the connection is not accepted ({reason})", "see the broker's log")
    if security.user:
        return Diagnosis(
            f"the user {security.user} with this password is not accepted ({reason})",
            "correct user and password_file (--user, --password-file), or the broker's list of users",
        )
    if security.certificate:
        return Diagnosis(
            f"the name in this certificate is not accepted ({reason})", "see the broker's log and its access list"
        )
    return Diagnosis(
        f"nobody is accepted without a login ({reason})",
        "set telemetry.user and telemetry.password_file (--user and --password-file)",
    )


def other_identity(device: str, security: Security) -> Diagnosis | None:
    """Say that a client's certificate or user is not of the device's name; None if it is, or if there is none.

    A broker whose access list goes by that name, such as the one of `eyas broker`, refuses the device's messages.
    """
    own = next(iter(security.certificates()), None) if security.certificate else None
    name = security.user or (own.common_name if own is not None else "")
    if name in ("", device):
        return None
    if security.user:
        return Diagnosis(f"the user is {name}, this device is {device}", f"set telemetry.user to {device}")
    return Diagnosis(
        f"the certificate is of {name}, this device is {device}",
        f'bring the certificate of {device} (`eyas enroll {device}`), or set [device] name = "{name}"',
    )


def _diagnose_tls(address: tuple[str, int], security: Security) -> Diagnosis | None:
    context = security.context()
    assert context is not None
    try:
        with (
            socket.create_connection(address, timeout=_TIMEOUT_S) as plain,
            context.wrap_socket(plain, server_hostname=address[0]) as connection,
        ):
            connection.settimeout(_ALERT_S)
            with suppress(TimeoutError):
                connection.recv(1)
            connection.settimeout(_TIMEOUT_S)
            connection.sendall(_CONNECT)
            return _not_a_broker(connection.recv(_BANNER))
    except ssl.SSLCertVerificationError as error:
        return _unverified(address, security, error)
    except ssl.SSLError as error:
        if found := _alert(error, security):
            return found
    except OSError:
        pass
    answer = _answer(address)
    return _SPEAKS_PLAIN if answer[:1] == _CONNACK else _not_a_broker(answer)


def _not_a_broker(answer: bytes) -> Diagnosis | None:
    """What a server is that answers a CONNECT with this; None for a broker."""
    if answer[:1] == _CONNACK:
        return None
    server = next((name for start, name in _SERVERS.items() if answer.startswith(start)), "")
    if server:
        return Diagnosis(f"{server} listens on this port, not an MQTT broker", "check the address and the port")
    return NOT_A_BROKER


def _unverified(address: tuple[str, int], security: Security, error: ssl.SSLCertVerificationError) -> Diagnosis:
    """Why the broker's certificate is not trusted."""
    with suppress(OSError, ValueError):
        if found := invalid(parse_certificate(_peer_certificate(address), "the broker's certificate")):
            return found
    message = error.verify_message or str(error)
    if "not valid for" in message or "mismatch" in message.lower():
        names = _names_in_certificate(address, security)
        there = f" but for {', '.join(names)}" if names else ""
        return Diagnosis(
            f"the broker's certificate is not for {address[0]}{there}",
            f"connect by a name that is in it, or start the broker with --name {address[0]}",
        )
    authority = security.ca or "the system's authorities"
    return Diagnosis(
        f"the broker's certificate was not signed by {authority} ({message})",
        "bring the ca.crt of this broker's fleet; or is it another broker?",
    )


def _alert(error: ssl.SSLError, security: Security) -> Diagnosis | None:
    """What the broker said about the client's certificate; None if it said nothing about it."""
    reason = (error.reason or str(error)).upper()
    if "ALERT" not in reason:
        return None
    if any(name in reason for name in _MISSING) and not security.certificate:
        return _ASKS_FOR_CERTIFICATE
    for name, words in _ALERTS.items():
        if name in reason and security.certificate:
            fix = "the device was expelled; to let it back in: eyas enroll" if name == _REVOKED else _ENROLL
            return Diagnosis(f"the broker refuses the certificate {security.certificate}: {words}", fix)
    return Diagnosis(f"the broker refuses the TLS connection ({error.reason})", "see the broker's log")


def _peer_certificate(address: tuple[str, int]) -> bytes:
    """The broker's certificate, unverified: only to say what is wrong with it. Nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(address, timeout=_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as connection,
    ):
        return connection.getpeercert(binary_form=True) or b""


def _names_in_certificate(address: tuple[str, int], security: Security) -> list[str]:
    """The names and addresses in the broker's certificate, which is trusted but for them."""
    context = security.context()
    assert context is not None
    context.check_hostname = False
    with (
        suppress(OSError),
        socket.create_connection(address, timeout=_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=address[0]) as connection,
    ):
        names = (connection.getpeercert() or {}).get("subjectAltName", ())
        return [str(entry[1]) for entry in names]
    return []


def _speaks_tls(address: tuple[str, int]) -> bool:
    try:
        return bool(_peer_certificate(address))
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "").upper()
    except OSError:
        return False


def _answer(address: tuple[str, int]) -> bytes:
    """The start of what a server answers to an MQTT client without TLS; empty if it says nothing."""
    try:
        with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
            connection.sendall(_CONNECT)
            return connection.recv(_BANNER)
    except OSError:
        return b""
