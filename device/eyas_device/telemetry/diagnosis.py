"""Why a connection to a broker failed, in words: a second connection finds out what MQTT and TLS do not say.

TLS 1.3 reports a refused client certificate only after the handshake, where an MQTT client sees nothing but a lost
connection; a broker with TLS hangs up on a client without it, and the other way round.
"""

from __future__ import annotations

import socket
import ssl
import time
from contextlib import suppress

from eyas_device.errors import LinkError
from eyas_device.telemetry.certificates import parse_certificate
from eyas_device.telemetry.tls import Security

_TIMEOUT_S = 3.0
_ALERT_S = 1.0
"""How long a broker may take to refuse a client certificate after the handshake."""
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
"""CONNECT of MQTT 3.1.1, without a client id."""
_CONNACK = 0x20
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
_MISSING = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE")
_SPEAKS_TLS = (
    "the broker speaks TLS on this port: set telemetry.ca to its authority's certificate (or tls = true), --ca on the "
    "command line"
)
_ASKS_FOR_CERTIFICATE = (
    "the broker asks for a client certificate: set telemetry.certificate and telemetry.key, or --certificate and --key"
)
_SPEAKS_PLAIN = "the broker speaks MQTT without TLS on this port; with TLS it usually listens on 8883"


def diagnose(address: tuple[str, int], security: Security) -> str:
    """Say why connections to a listening broker end before it accepts them; empty if that is not found out.

    Takes a few seconds at most.
    """
    with suppress(OSError, ValueError, LinkError):
        if not security.uses_tls:
            return _SPEAKS_TLS if _speaks_tls(address) else ""
        for certificate in security.certificates():
            if problem := certificate.problem(time.time()):
                return problem
        return _diagnose_tls(address, security, time.time())
    return ""


def _diagnose_tls(address: tuple[str, int], security: Security, now: float) -> str:
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
            return ""
    except ssl.SSLCertVerificationError as error:
        return _unverified(address, security, error, now)
    except ssl.SSLError as error:
        if words := _alert(error, security):
            return words
    except OSError:
        pass
    return _SPEAKS_PLAIN if _speaks_plain(address) else ""


def _unverified(address: tuple[str, int], security: Security, error: ssl.SSLCertVerificationError, now: float) -> str:
    """Why the broker's certificate is not trusted."""
    with suppress(OSError, ValueError):
        problem = parse_certificate(_peer_certificate(address), "the broker's certificate").problem(now)
        if problem:
            return problem
    message = error.verify_message or str(error)
    if "not valid for" in message or "mismatch" in message.lower():
        return f"the broker's certificate is not for this name ({message}): connect by a name that is in it"
    authority = security.ca or "the system's authorities"
    return f"the broker's certificate was not signed by {authority} ({message}): another broker, or another fleet's ca"


def _alert(error: ssl.SSLError, security: Security) -> str:
    """What the broker said about the client's certificate; empty if it said nothing about it."""
    reason = (error.reason or str(error)).upper()
    if "ALERT" not in reason:
        return ""
    if any(name in reason for name in _MISSING) and not security.certificate:
        return _ASKS_FOR_CERTIFICATE
    for name, words in _ALERTS.items():
        if name in reason and security.certificate:
            return f"the broker refuses the certificate {security.certificate}: {words}"
    return f"the broker refuses the TLS connection ({error.reason})"


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


def _speaks_tls(address: tuple[str, int]) -> bool:
    try:
        return bool(_peer_certificate(address))
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "").upper()
    except OSError:
        return False


def _speaks_plain(address: tuple[str, int]) -> bool:
    try:
        with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
            connection.sendall(_CONNECT)
            return connection.recv(1) == bytes([_CONNACK])
    except OSError:
        return False
