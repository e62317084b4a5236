"""Command-line arguments of a broker and the credentials for it, the same for every verb that connects to one.

Each option has the name of the key of [telemetry] or [device] that it overrides.
"""

from __future__ import annotations

import argparse
from typing import Any

from eyas_device.commands import values
from eyas_device.support import names

_KEYS = ("broker", "tls", "ca", "certificate", "key", "user", "password_file", "insecure")


def add_broker_arguments(parser: argparse.ArgumentParser, *, purpose: str) -> None:
    """Add the arguments; each overrides the key of its name."""
    add = parser.add_argument
    add("--broker", type=_address, metavar="HOST[:PORT]", help=f"{purpose}; also [IPV6]:PORT, mqtt(s)://HOST")
    add("--tls", action="store_true", default=None, help="encrypt, trusting the system's certificate authorities")
    add("--ca", metavar="FILE", help="certificate authority of the broker; turns TLS on")
    add("--certificate", metavar="FILE", help="the device's certificate")
    add("--key", metavar="FILE", help="its private key")
    add("--user", metavar="NAME", help="user at the broker")
    add("--password-file", metavar="FILE", help="file whose first line is the password; chmod 600")
    add("--site", type=values.site, help="second level of the topics (default: default)")
    add("--name", type=values.device, metavar="NAME", help="third level: the device's name (default: the host's)")
    add("--insecure", action="store_true", default=None, help="allow a password or commands without TLS")


def broker_values(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of [telemetry] -> values of the command line, None where nothing was given."""
    return {key: getattr(args, key) for key in _KEYS}


def identity_values(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of [device] -> values of the command line, None where nothing was given."""
    return {"site": args.site, "name": args.name}


def _address(text: str) -> str:
    try:
        names.parse_broker(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
