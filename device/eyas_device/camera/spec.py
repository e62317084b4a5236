"""What stands behind the colon of a camera's specification: options and addresses, checked as a whole."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from urllib.parse import SplitResult, urlsplit

from eyas_device.errors import CameraSpecError

SIZE = r"[1-9]\d{0,3}x[1-9]\d{0,3}"
"""Pattern of WIDTHxHEIGHT."""
RATE = r"\d{1,3}(\.\d{1,3})?"
"""Pattern of frames per second; `rate` refuses 0."""
MAX_SIDE = 8192


def options(query: str, patterns: Mapping[str, str], *, spec: str, usage: str) -> dict[str, str]:
    """Read `name=value&name=value`, each name at most once, each value matching the whole of its pattern.

    Raises `CameraSpecError` naming `spec`, every fault and `usage`.
    """
    found: dict[str, str] = {}
    faults = []
    for part in query.split("&") if query else []:
        name, equals, value = part.partition("=")
        if name not in patterns:
            faults.append(f"unknown option {name!r}")
        elif name in found:
            faults.append(f"{name} given twice")
        elif not equals or not re.fullmatch(patterns[name], value, re.ASCII):
            faults.append(f"{name}={value!r} is not possible")
        found[name] = value
    if faults:
        raise CameraSpecError(f"camera {spec}: {', '.join(faults)}; allowed are {usage}")
    return found


def sides(size: str, *, spec: str, usage: str) -> tuple[int, int]:
    """Width and height of a value that matched `SIZE`. Raises `CameraSpecError` if a side is not 8 to 8192."""
    width, height = (int(side) for side in size.split("x"))
    if not all(8 <= side <= MAX_SIDE for side in (width, height)):
        raise CameraSpecError(
            f"camera {spec}: size={size}, but sides of 8 to {MAX_SIDE} pixels are needed; allowed are {usage}"
        )
    return width, height


def rate(fps: str, *, spec: str, usage: str) -> float:
    """The value of one that matched `RATE`, frames per second. Raises `CameraSpecError` for 0."""
    value = float(fps)
    if value == 0:
        raise CameraSpecError(f"camera {spec}: fps={fps}, but a rate above 0 is needed; allowed are {usage}")
    return value


def address(url: str, schemes: Collection[str], *, kind: str) -> SplitResult:
    """Take an address apart. Raises `CameraSpecError` if it is none of `schemes`, or has no host or an odd port.

    The message shows the address without its password.
    """
    allowed = " or ".join(f"{scheme}://[USER:PASSWORD@]HOST[:PORT]/PATH" for scheme in schemes)
    fault = None
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url):
        fault = "holds a space or a control character (write a space as %20)"
    else:
        try:
            parts = urlsplit(url)
            if parts.scheme not in schemes or not parts.hostname or parts.port == 0:
                fault = "is no such address"
            elif not re.fullmatch(r"[\w.:%-]+", parts.hostname):
                fault = f"names an odd host {parts.hostname!r}"
            elif not url.startswith(f"{parts.scheme}://"):
                fault = f"must begin with {parts.scheme}:// in small letters"
            else:
                parts.hostname.encode("idna")
        except ValueError as error:  # UnicodeError included
            fault = f"is no such address ({error})"
    if fault is not None:
        raise CameraSpecError(f"camera {kind}: {hidden(url)!r} {fault}; allowed is {allowed}")
    return parts


def hidden(url: str) -> str:
    """`url` with the user and password, where it has them, replaced by `***`."""
    return re.sub(r"//.*@", "//***@", url, flags=re.DOTALL)
