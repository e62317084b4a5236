"""Board, processor, memory and operating system."""

from __future__ import annotations

import os
import platform
import re
import struct
from pathlib import Path

import msgspec

from eyas_device.board.reading import ROOT, as_number, fields, text

_PLACEHOLDERS = re.compile(
    r"(to be filled|system (product|manufacturer|version)|default string|not (specified|applicable)|o\.?e\.?m\.?$)"
    r"|^(none|unknown|n/?a)$",
    re.IGNORECASE,
)
_ARM_PARTS = {
    0xD03: "Cortex-A53",
    0xD04: "Cortex-A35",
    0xD05: "Cortex-A55",
    0xD07: "Cortex-A57",
    0xD08: "Cortex-A72",
    0xD09: "Cortex-A73",
    0xD0A: "Cortex-A75",
    0xD0B: "Cortex-A76",
    0xD0C: "Neoverse-N1",
    0xD41: "Cortex-A78",
    0xD42: "Cortex-A78AE",
}
"""Part numbers of Arm's own cores. Source: Linux, arch/arm64/include/asm/cputype.h."""


class Board(msgspec.Struct, frozen=True, kw_only=True):
    """The machine: board, processor and memory."""

    model: str
    """Name in the device tree or the firmware; the processor's if neither has one."""
    soc: str | None = None
    """The SoC's name in the device tree, e.g. `brcm,bcm2712`."""
    processor: str | None = None
    cores: int = 1
    """Cores that are online."""
    memory_mb: float | None = None
    """Memory that the kernel manages, 10^6 bytes."""
    max_frequency_mhz: float | None = None
    """Maximum frequency of the fastest core."""


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The operating system, and the Python process that reads it."""

    name: str | None = None
    kernel: str | None = None
    machine: str = ""
    """Processor architecture, e.g. `aarch64`."""
    bits: int = 64
    """Word size of this process: a 64-bit kernel may run a 32-bit userland."""
    libc: str = ""
    python: str = ""


def read_board(root: Path = ROOT) -> Board:
    """Read the board below `root`."""
    tree = root / "proc/device-tree"
    cpuinfo = fields(text(root / "proc/cpuinfo"))
    processor = _processor(cpuinfo)
    model = text(tree / "model") or _firmware(root) or dict(cpuinfo).get("Model") or processor
    compatible = (text(tree / "compatible") or "").split("\0")
    memory = next((value for name, value in fields(text(root / "proc/meminfo")) if name == "MemTotal"), None)
    kib = as_number((memory or "").removesuffix("kB"), minimum=0)
    cpus = root / "sys/devices/system/cpu"
    fastest = [
        as_number(text(path / "cpufreq/cpuinfo_max_freq"), scale=1e-3, minimum=1, maximum=20_000)
        for path in cpus.glob("cpu[0-9]*")
    ]
    return Board(
        model=_printable(model) or platform.machine() or "unknown machine",
        soc=_printable(compatible[-1]),
        processor=_printable(processor),
        cores=sum(name == "processor" for name, _ in cpuinfo) or os.cpu_count() or 1,
        memory_mb=None if kib is None else round(kib * 1024 / 1e6, 1),
        max_frequency_mhz=max((f for f in fastest if f is not None), default=None),
    )


def read_system(root: Path = ROOT) -> System:
    """Read the operating system below `root`, and this process's Python."""
    release = dict(line.partition("=")[::2] for line in (text(root / "etc/os-release") or "").splitlines())
    return System(
        name=_printable(release.get("PRETTY_NAME", "").strip("\"'")),
        kernel=_printable(text(root / "proc/sys/kernel/osrelease")),
        machine=platform.machine(),
        bits=8 * struct.calcsize("P"),
        libc=" ".join(platform.libc_ver()).strip(),
        python=platform.python_version(),
    )


def _firmware(root: Path) -> str | None:
    """Vendor and product from DMI, unless they are placeholders."""
    folder = root / "sys/devices/virtual/dmi/id"
    entries = [text(folder / name) for name in ("sys_vendor", "product_name")]
    vendor, product = (None if entry is None or _PLACEHOLDERS.search(entry) else entry for entry in entries)
    return " ".join(name for name in (vendor, product) if name) if product else None


def _processor(cpuinfo: list[tuple[str, str]]) -> str | None:
    """`model name` of an x86, or the names of the Arm cores by part number, in order of the cores."""
    named = next((value for name, value in cpuinfo if name == "model name" and value), None)
    if named is not None:
        return named
    parts = [int(value, 16) for name, value in cpuinfo if name == "CPU part" and re.fullmatch("0x[0-9a-f]{1,4}", value)]
    cores = dict.fromkeys(_ARM_PARTS.get(part, f"Arm part {part:#x}") for part in parts)
    return " + ".join(cores) or None


def _printable(value: str | None) -> str | None:
    """The printable characters, at most 128; None if there are none."""
    shown = "".join(character for character in (value or "") if character.isprintable())
    return shown.strip()[:128] or None
