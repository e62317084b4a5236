"""Command-line arguments of a broker and the credentials for it, the same for every verb that connects to one."""

from __future__ import annotations

import argparse
from typing import Any

from eyas_device.support import names


def add_broker_arguments(parser: argparse.ArgumentParser, *, purpose: str) -> None:
    """Add the arguments; each overrides a key of [telemetry]."""
    add = parser.add_argument
    add("--mqtt", type=_address, metavar="HOST[:PORT]", help=f"{purpose}; also [IPV6]:PORT, mqtt://HOST, mqtts://HOST")
    add("--ca", metavar="FILE", help="certificate authority of the broker; turns TLS on")
    add("--cert", metavar="FILE", help="the device's certificate")
    add("--key", metavar="FILE", help="its private key")
    add("--mqtt-user", metavar="NAME", help="user at the broker")
    add("--mqtt-password-file", metavar="FILE", help="file whose first line is the password; chmod 600")
    add("--insecure", action="store_true", default=None, help="allow a password or commands without TLS")


def broker_values(args: argparse.Namespace) -> dict[str, Any]:
    """Keys of [telemetry] -> values of the command line, None where nothing was given."""
    return {
        "broker": args.mqtt,
        "ca": args.ca,
        "certificate": args.cert,
        "key": args.key,
        "user": args.mqtt_user,
        "password_file": args.mqtt_password_file,
        "insecure": args.insecure,
    }


def _address(text: str) -> str:
    try:
        names.parse_broker(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
