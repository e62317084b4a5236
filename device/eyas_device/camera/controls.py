"""Controls of a camera (exposure, gain, focus, white balance, ...), set when it opens; what is refused is reported.

A control that cannot be set is no reason for a camera to stay dark: each function returns its problems, one line each.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Wanted = Mapping[str, float | str]
"""Name of a control -> its value, or `auto`."""
Ioctl = Callable[[int, int, bytearray], object]

# Source: linux/videodev2.h and linux/v4l2-controls.h.
_QUERYCTRL, _S_CTRL = 0xC0445624, 0xC008561C
_QUERY, _VALUE = struct.Struct("=II32siiiiI8x"), struct.Struct("=Ii")
_NEXT, _DISABLED, _READ_ONLY = 0x80000000, 0x0001, 0x0004
_MAX_CONTROLS = 256
_CLASS_HEADING = 6
_SHORT = {
    "exposure": (0x009A0902, 0x00980911),
    "gain": (0x00980913,),
    "focus": (0x009A090A,),
    "white_balance": (0x0098091A,),
    "zoom": (0x009A090D,),
}
"""Short name -> ids of the control, the first that the driver has."""
_AUTO = {
    "exposure": (0x009A0901, (3, 0), 1),
    "gain": (0x00980912, (1,), 0),
    "focus": (0x009A090C, (1,), 0),
    "white_balance": (0x0098090C, (1,), 0),
}
"""Short name -> id of its automatic mode, values that switch that on (the first that is accepted), and off."""


class _Control(NamedTuple):
    id: int
    name: str
    low: int
    high: int
    fixed: bool


def set_v4l2(path: str, wanted: Wanted, *, ioctl: Ioctl = fcntl.ioctl) -> list[str]:
    """Set controls of a V4L2 device, by the short names above or those that `v4l2-ctl --list-ctrls` shows."""
    if not wanted:
        return []
    try:
        device = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return [f"its controls cannot be set ({error.strerror})"]
    try:
        driver = _Driver(device, ioctl)
        return [problem for name, value in wanted.items() if (problem := driver.set(name, value))]
    finally:
        os.close(device)


class _Driver:
    """The controls of an open device."""

    def __init__(self, device: int, ioctl: Ioctl) -> None:
        self._device, self._ioctl = device, ioctl
        self._controls = list(self._list())
        self._ids = {control.id: control for control in self._controls}

    def _list(self) -> list[_Control]:
        controls: list[_Control] = []
        last = 0
        with contextlib.suppress(OSError):  # EINVAL after the last one
            for _ in range(_MAX_CONTROLS):
                data = bytearray(_QUERY.pack(last | _NEXT, 0, b"", 0, 0, 0, 0, 0))
                self._ioctl(self._device, _QUERYCTRL, data)
                last, kind, title, low, high, _, _, flags = _QUERY.unpack(data)
                if kind != _CLASS_HEADING and not flags & _DISABLED:
                    controls.append(_Control(last, control_name(title), low, high, bool(flags & _READ_ONLY)))
        return controls

    def _find(self, name: str) -> _Control | None:
        for number in _SHORT.get(name, ()):
            if number in self._ids:
                return self._ids[number]
        return next((control for control in self._controls if control.name == name), None)

    def set(self, name: str, value: float | str) -> str:
        """Set a control; returns what is wrong, if anything is."""
        automatic = _AUTO.get(name)
        if value == "auto":
            if automatic is None or automatic[0] not in self._ids:
                return f"{name} = auto: this camera has no automatic mode of it; {self._allowed(name)}"
            reasons = [self._write(automatic[0], on) for on in automatic[1]]
            return "" if "" in reasons else f"{name} = auto: {reasons[0]}"
        control = self._find(name)
        if control is None:
            return f"{name}: no such control; this camera has {self._names()}"
        if control.fixed or not control.low <= float(value) <= control.high:
            return f"{name} = {value:g}: {self._allowed(name)}"
        if automatic is not None and automatic[0] in self._ids:
            self._write(automatic[0], automatic[2])
        reason = self._write(control.id, round(float(value)))
        return f"{name} = {value:g}: {reason}; {self._allowed(name)}" if reason else ""

    def _write(self, number: int, value: int) -> str:
        """Write a value; returns why the driver refused it."""
        try:
            self._ioctl(self._device, _S_CTRL, bytearray(_VALUE.pack(number, value)))
        except OSError as error:
            return f"refused by the driver ({os.strerror(error.errno or errno.EIO)})"
        return ""

    def _allowed(self, name: str) -> str:
        control = self._find(name)
        if control is None:
            return f"this camera has {self._names()}"
        return "it can only be read" if control.fixed else f"{control.low} to {control.high} is allowed"

    def _names(self) -> str:
        short = [name for name in _SHORT if self._find(name) is not None]
        return ", ".join(dict.fromkeys([*short, *(control.name for control in self._controls)])) or "none"


def control_name(title: bytes) -> str:
    """The name that `v4l2-ctl` shows for a control's title: `Exposure Time, Absolute` -> `exposure_time_absolute`."""
    return re.sub(r"[^a-z0-9]+", "_", title.partition(b"\0")[0].decode("latin-1").lower()).strip("_")


_LIBCAMERA: dict[str, tuple[str, dict[str, float | bool], dict[str, float | bool]]] = {
    "exposure": ("ExposureTime", {"AeEnable": False}, {"AeEnable": True, "ExposureTime": 0}),
    "gain": ("AnalogueGain", {}, {"AnalogueGain": 0.0}),
    "focus": ("LensPosition", {"AfMode": 0}, {"AfMode": 2}),
    "white_balance": ("ColourTemperature", {"AwbEnable": False}, {"AwbEnable": True}),
}
"""Short name -> libcamera's control, what is set with a value, and what is set for `auto`."""


def for_libcamera(wanted: Wanted, known: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Controls for Picamera2, and problems; `known` maps each of the camera's controls to (min, max, default)."""
    values: dict[str, Any] = {}
    problems = []
    for name, value in wanted.items():
        title = "".join(word.capitalize() for word in name.split("_"))
        control, manual, automatic = _LIBCAMERA.get(name, (title, {}, {}))
        if value == "auto":
            if not automatic or not set(automatic) <= set(known):
                problems.append(f"{name} = auto: this camera has no automatic mode of it")
            else:
                values |= automatic
            continue
        if control not in known:
            problems.append(
                f"{name}: no such control ({control}); this camera has {', '.join(sorted(known)) or 'none'}"
            )
            continue
        low, high = known[control][:2]
        if not _within(float(value), low, high):
            problems.append(f"{name} = {value:g}: {low} to {high} is allowed")
            continue
        exact = isinstance(low, int) and not isinstance(low, bool)
        values |= {key: off for key, off in manual.items() if key in known}
        values[control] = round(float(value)) if exact else bool(value) if isinstance(low, bool) else float(value)
    return values, problems


def _within(value: float, low: Any, high: Any) -> bool:
    """Whether a control without scalar bounds, or with these, takes `value`."""
    try:
        return float(low) <= value <= float(high)
    except (TypeError, ValueError):
        return True
