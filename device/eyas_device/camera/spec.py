"""Parsers for the part of a camera specification after the colon: options and addresses."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from eyas_device.errors import CameraSpecError
from eyas_device.support.image_files import SUFFIXES
from eyas_device.support.redact import redact

SIZE = r"[1-9]\d{0,3}x[1-9]\d{0,3}"
"""Pattern of WIDTHxHEIGHT."""
RATE = r"\d{1,3}(\.\d{1,3})?"
"""Pattern of frames per second; `parse_rate` rejects 0."""
MAX_SIDE = 8192
_VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm"}


def parse_options(query: str, patterns: Mapping[str, str], *, spec: str, usage: str) -> dict[str, str]:
    """Parse `name=value&name=value`, each name at most once, each value fully matching its pattern.

    Raises `CameraSpecError` with `spec`, every problem and `usage`.
    """
    values: dict[str, str] = {}
    problems = []
    for part in query.split("&") if query else []:
        name, equals, value = part.partition("=")
        if name not in patterns:
            problems.append(f"unknown option {name!r}")
        elif name in values:
            problems.append(f"{name} is given twice")
        elif not equals or not re.fullmatch(patterns[name], value, re.ASCII):
            problems.append(f"{name}={value!r} is not valid")
        values[name] = value
    if problems:
        raise CameraSpecError(f"camera {spec}: {', '.join(problems)}; allowed are {usage}")
    return values


def parse_size(size: str, *, spec: str, usage: str) -> tuple[int, int]:
    """Width and height, pixels, of a value that matched `SIZE`. Raises `CameraSpecError` if a side is not 8 to 8192."""
    width, height = (int(side) for side in size.split("x"))
    if not all(8 <= side <= MAX_SIDE for side in (width, height)):
        raise CameraSpecError(
            f"camera {spec}: size={size}, but sides of 8 to {MAX_SIDE} pixels are needed; allowed are {usage}"
        )
    return width, height


def parse_rate(fps: str, *, spec: str, usage: str) -> float:
    """Frames per second of a value that matched `RATE`. Raises `CameraSpecError` for 0."""
    value = float(fps)
    if value == 0:
        raise CameraSpecError(f"camera {spec}: fps={fps}, but a rate above 0 is needed; allowed are {usage}")
    return value


def parse_address(url: str, schemes: Collection[str], *, kind: str) -> SplitResult:
    """Parse and check an address. Raises `CameraSpecError` for another scheme, a missing host or an invalid port.

    The message shows the address without credentials.
    """
    allowed = " or ".join(f"{scheme}://HOST[:PORT]/PATH" for scheme in schemes)
    problem = None
    if any(ord(c) <= 0x20 or ord(c) == 0x7F for c in url):
        problem = "contains a space or a control character (write a space as %20)"
    else:
        try:
            parts = urlsplit(url)
            if parts.scheme not in schemes or not parts.hostname or parts.port == 0:
                problem = "is not such an address"
            elif not re.fullmatch(r"[\w.:%-]+", parts.hostname):
                problem = f"has an invalid host {parts.hostname!r}"
            elif not url.startswith(f"{parts.scheme}://"):
                problem = f"must begin with {parts.scheme}:// in lower case"
            else:
                parts.hostname.encode("idna")
        except ValueError as error:  # UnicodeError included
            problem = f"is not such an address ({error})"
    if problem is not None:
        shown = redact(re.sub(r"//.*@", "//***@", url, flags=re.DOTALL))  # all of it is one address
        raise CameraSpecError(f"camera {kind}: {shown!r} {problem}; allowed is {allowed}, a login before HOST")
    return parts


def suggest(spec: str) -> str:
    """The specification that is meant by one without a kind, such as `/dev/video0` or `clip.mp4`; empty if none is."""
    scheme, colon, rest = spec.partition("://")
    if colon and scheme.lower() in ("http", "https"):
        return f"mjpeg:{scheme.lower()}://{rest}"
    if colon:
        return f"{scheme.lower()}://{rest}" if scheme.lower() in ("rtsp", "rtsps") else ""
    if re.fullmatch(r"\d{1,3}", spec, re.ASCII):
        return f"v4l2:{spec}"
    if re.match(r"/dev/(video|v4l/)", spec):
        return f"v4l2:{spec}"
    if number := re.fullmatch(r"video(\d{1,3})", spec, re.ASCII):
        return f"v4l2:{number[1]}"
    path = Path(spec)
    with contextlib.suppress(OSError, ValueError):
        if spec and (path.is_dir() or (spec.endswith("/") and ":" not in spec)):
            return f"folder:{spec}"
        if path.suffix.lower() in SUFFIXES:
            return f"folder:{path.parent}"
        if path.is_file() or path.suffix.lower() in _VIDEOS:
            return f"video:{spec}"
    return ""
