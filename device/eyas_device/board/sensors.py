"""Temperature, frequency and throttling of the processor."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.board.reading import COMMAND_S, ROOT, CommandRunner, fields, folders, number, text
from eyas_device.support.processes import run_command

_MIN_C, _MAX_C = -60.0, 150.0
_MAX_MHZ = 20_000.0

_THROTTLE_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_BOOT_SHIFT = 16
"""Offset of the bits for "has occurred since boot".

Source: Raspberry Pi documentation, `vcgencmd get_throttled`.
"""

_CPU_ZONES = (r"cpu[-_]?therm", r"x86_pkg_temp", r"^(coretemp|k10temp)$", r"soc[-_]?therm", r"cpu", r"acpitz")
"""Names of the processor's thermal zone, the most specific first."""


class Throttle(msgspec.Struct, frozen=True):
    """Throttling by a Raspberry Pi's firmware, for power or heat."""

    now: tuple[str, ...] = ()
    """Active causes."""
    since_boot: tuple[str, ...] = ()
    """Causes that have occurred since boot."""


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """One reading of all sensors; None is not measured."""

    temperature_c: float | None = None
    """Temperature of the processor."""
    temperatures_c: dict[str, float] = {}
    """Thermal zone -> °C; zones with the same name are numbered."""
    frequencies_mhz: tuple[float, ...] | None = None
    """Current frequency of each core."""
    governor: str | None = None
    """Frequency governor of the cores; several are joined by commas."""
    throttle: Throttle | None = None
    """Raspberry Pi only; None elsewhere."""

    @property
    def frequency_mhz(self) -> float | None:
        """Mean frequency over the cores."""
        return sum(self.frequencies_mhz) / len(self.frequencies_mhz) if self.frequencies_mhz else None

    @property
    def throttled(self) -> tuple[str, ...]:
        """Active causes of throttling; empty also where it is not measured."""
        return self.throttle.now if self.throttle else ()


def read_vitals(root: Path = ROOT, *, run: CommandRunner = run_command) -> Vitals:
    """Read the sensors below `root`.

    Runs a command (at most 2 s) only on a Raspberry Pi whose kernel has no file with the throttling bits.
    """
    zones = _temperatures(root)
    frequencies = _frequencies(root)
    cores = folders(root / "sys/devices/system/cpu", "cpu[0-9]*")
    governors = [name for core in cores if (name := text(core / "cpufreq/scaling_governor"))]
    return Vitals(
        temperature_c=_processor_temperature(zones),
        temperatures_c=zones,
        frequencies_mhz=frequencies,
        governor=", ".join(dict.fromkeys(governors)) or None,
        throttle=_throttle(root, run),
    )


def decode_throttled(output: str | None) -> Throttle | None:
    """Decode `throttled=0x50005` (`vcgencmd get_throttled`) or `50005` (the kernel's file); None for anything else."""
    match = re.fullmatch(r"\s*(?:throttled=)?(?:0x)?([0-9a-f]{1,8})\s*", output or "", re.IGNORECASE | re.ASCII)
    if match is None:
        return None
    bits = int(match[1], 16)
    return Throttle(
        now=tuple(name for bit, name in _THROTTLE_BITS.items() if bits >> bit & 1),
        since_boot=tuple(name for bit, name in _THROTTLE_BITS.items() if bits >> bit + _SINCE_BOOT_SHIFT & 1),
    )


def _temperatures(root: Path) -> dict[str, float]:
    """Read the thermal zones, and the two hwmon drivers of x86 processors without zones (millidegrees)."""
    temperatures: dict[str, float] = {}
    files = [(zone, "type", "temp") for zone in folders(root / "sys/class/thermal", "thermal_zone*")]
    hwmons = folders(root / "sys/class/hwmon", "hwmon*")
    files += [(chip, "name", "temp1_input") for chip in hwmons if text(chip / "name") in ("coretemp", "k10temp")]
    for folder, label, value in files:
        degrees = number(folder / value, scale=1e-3, minimum=_MIN_C, maximum=_MAX_C)
        if degrees is None:
            continue
        base = text(folder / label) or folder.name
        name, suffix = base, 2
        while name in temperatures:
            name, suffix = f"{base}-{suffix}", suffix + 1
        temperatures[name] = round(degrees, 2)
    return temperatures


def _processor_temperature(zones: dict[str, float]) -> float | None:
    for pattern in _CPU_ZONES:
        matching = [degrees for name, degrees in zones.items() if re.search(pattern, name, re.IGNORECASE)]
        if matching:
            return max(matching)
    return next(iter(zones.values())) if len(zones) == 1 else None


def _frequencies(root: Path) -> tuple[float, ...] | None:
    """Read the frequency of each core, MHz: from cpufreq (kHz), else from `/proc/cpuinfo` (x86)."""
    cores = folders(root / "sys/devices/system/cpu", "cpu[0-9]*")
    readings = [number(core / "cpufreq/scaling_cur_freq", scale=1e-3, minimum=1, maximum=_MAX_MHZ) for core in cores]
    known = tuple(round(mhz, 1) for mhz in readings if mhz is not None)
    if known:
        return known
    entries = [value for name, value in fields(text(root / "proc/cpuinfo")) if name == "cpu MHz"]
    known = tuple(round(float(value), 1) for value in entries if re.fullmatch(r"\d{1,5}(\.\d{1,6})?", value, re.ASCII))
    return known or None


def _throttle(root: Path, run: CommandRunner) -> Throttle | None:
    """Read the throttling bits from the firmware driver's file, else with `vcgencmd` on a Raspberry Pi."""
    for path in sorted((root / "sys/devices/platform").glob("soc*/*firmware/get_throttled")):
        throttle = decode_throttled(text(path))
        if throttle is not None:
            return throttle
    if "Raspberry Pi" not in (text(root / "proc/device-tree/model") or ""):
        return None
    return decode_throttled(run(("vcgencmd", "get_throttled"), COMMAND_S))
