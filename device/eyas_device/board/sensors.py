"""How the board feels: temperature, frequency, and whether something holds the processor back."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.board.reading import COMMAND_S, ROOT, Runner, fields, folders, number, text
from eyas_device.support.processes import run_command

_COLDEST_C, _HOTTEST_C = -60.0, 150.0
_MOST_MHZ = 20_000.0

_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_BOOT = 16
"""The same bits so much higher say that it happened since the boot.

Source: Raspberry Pi documentation, `vcgencmd get_throttled`.
"""

_CPU_ZONES = (r"cpu[-_]?therm", r"x86_pkg_temp", r"^(coretemp|k10temp)$", r"soc[-_]?therm", r"cpu", r"acpitz")
"""Which thermal zone is the processor's, the surest names first."""


class Throttle(msgspec.Struct, frozen=True):
    """What a Raspberry Pi's firmware says about power and heat."""

    now: tuple[str, ...] = ()
    """What slows it down at this moment."""
    since_boot: tuple[str, ...] = ()
    """What happened since the boot."""


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """The sensors at a moment; None is not measured."""

    temperature_c: float | None = None
    """Of the processor."""
    temperatures_c: dict[str, float] = {}
    """Thermal zone -> °C; two of one name are numbered."""
    frequencies_mhz: tuple[float, ...] | None = None
    """Of each core."""
    governor: str | None = None
    """Of the cores; several are joined by commas."""
    throttle: Throttle | None = None
    """Raspberry Pi only."""

    @property
    def frequency_mhz(self) -> float | None:
        """The mean over the cores."""
        return sum(self.frequencies_mhz) / len(self.frequencies_mhz) if self.frequencies_mhz else None

    @property
    def throttled(self) -> tuple[str, ...]:
        """What slows the processor down at this moment; empty also where that is not measured."""
        return self.throttle.now if self.throttle else ()


def read_vitals(root: Path = ROOT, *, run: Runner = run_command) -> Vitals:
    """What the sensors below `root` say now.

    A command is run (for at most 2 s) only on a Raspberry Pi whose kernel does not tell the throttling bits in a file.
    """
    zones = _temperatures(root)
    frequencies = _frequencies(root)
    cores = folders(root / "sys/devices/system/cpu", "cpu[0-9]*")
    governors = [told for core in cores if (told := text(core / "cpufreq/scaling_governor"))]
    return Vitals(
        temperature_c=_of_processor(zones),
        temperatures_c=zones,
        frequencies_mhz=frequencies,
        governor=", ".join(dict.fromkeys(governors)) or None,
        throttle=_throttle(root, run),
    )


def decode_throttled(told: str | None) -> Throttle | None:
    """The bits of `throttled=0x50005` (`vcgencmd get_throttled`) or of `50005` (the kernel's file); None for others."""
    match = re.fullmatch(r"\s*(?:throttled=)?(?:0x)?([0-9a-f]{1,8})\s*", told or "", re.IGNORECASE | re.ASCII)
    if match is None:
        return None
    bits = int(match[1], 16)
    return Throttle(
        now=tuple(name for bit, name in _BITS.items() if bits >> bit & 1),
        since_boot=tuple(name for bit, name in _BITS.items() if bits >> bit + _SINCE_BOOT & 1),
    )


def _temperatures(root: Path) -> dict[str, float]:
    """Millidegrees of thermal zones, and of the two hwmon drivers of x86 processors that have none."""
    found: dict[str, float] = {}
    files = [(zone, "type", "temp") for zone in folders(root / "sys/class/thermal", "thermal_zone*")]
    hwmons = folders(root / "sys/class/hwmon", "hwmon*")
    files += [(chip, "name", "temp1_input") for chip in hwmons if text(chip / "name") in ("coretemp", "k10temp")]
    for folder, label, value in files:
        degrees = number(folder / value, scale=1e-3, least=_COLDEST_C, most=_HOTTEST_C)
        if degrees is None:
            continue
        name, again = text(folder / label) or folder.name, 2
        while name in found:
            name, again = f"{(text(folder / label) or folder.name)}-{again}", again + 1
        found[name] = round(degrees, 2)
    return found


def _of_processor(zones: dict[str, float]) -> float | None:
    for pattern in _CPU_ZONES:
        matching = [degrees for name, degrees in zones.items() if re.search(pattern, name, re.IGNORECASE)]
        if matching:
            return max(matching)
    return next(iter(zones.values())) if len(zones) == 1 else None


def _frequencies(root: Path) -> tuple[float, ...] | None:
    """MHz of each core: from cpufreq (kHz), else as `/proc/cpuinfo` of an x86 says."""
    cores = folders(root / "sys/devices/system/cpu", "cpu[0-9]*")
    told = [number(core / "cpufreq/scaling_cur_freq", scale=1e-3, least=1, most=_MOST_MHZ) for core in cores]
    known = tuple(round(mhz, 1) for mhz in told if mhz is not None)
    if known:
        return known
    shown = [value for name, value in fields(text(root / "proc/cpuinfo")) if name == "cpu MHz"]
    known = tuple(round(float(value), 1) for value in shown if re.fullmatch(r"\d{1,5}(\.\d{1,6})?", value, re.ASCII))
    return known or None


def _throttle(root: Path, run: Runner) -> Throttle | None:
    """From the firmware driver's file, else from `vcgencmd` on a Raspberry Pi."""
    for path in sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled")):
        throttle = decode_throttled(text(path))
        if throttle is not None:
            return throttle
    if "Raspberry Pi" not in (text(root / "proc/device-tree/model") or ""):
        return None
    return decode_throttled(run(("vcgencmd", "get_throttled"), COMMAND_S))
