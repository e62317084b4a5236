"""What the machine is: board, processor, memory, operating system."""

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
    """The machine."""

    model: str
    """As the device tree or the firmware names it; where neither does, the processor."""
    soc: str | None = None
    """The device tree's name of the system on a chip, e.g. `brcm,bcm2712`."""
    processor: str | None = None
    cores: int = 1
    """That are on line."""
    memory_mb: float | None = None
    """10^6 bytes that the kernel manages."""
    max_frequency_mhz: float | None = None
    """Highest frequency of the fastest core."""


class System(msgspec.Struct, frozen=True, kw_only=True):
    """The operating system, and the process that reads it."""

    name: str | None = None
    kernel: str | None = None
    machine: str = ""
    """e.g. `aarch64`."""
    bits: int = 64
    """Of this process: a 64-bit kernel may run a 32-bit userland."""
    libc: str = ""
    python: str = ""


def read_board(root: Path = ROOT) -> Board:
    """The board below `root`."""
    tree = root / "proc/device-tree"
    cpuinfo = fields(text(root / "proc/cpuinfo"))
    processor = _processor(cpuinfo)
    model = text(tree / "model") or _firmware(root) or dict(cpuinfo).get("Model") or processor
    compatible = (text(tree / "compatible") or "").split("\0")
    memory = next((value for name, value in fields(text(root / "proc/meminfo")) if name == "MemTotal"), None)
    kib = as_number((memory or "").removesuffix("kB"), least=0)
    cpus = root / "sys/devices/system/cpu"
    fastest = [
        as_number(text(path / "cpufreq/cpuinfo_max_freq"), scale=1e-3, least=1, most=20_000)
        for path in cpus.glob("cpu[0-9]*")
    ]
    return Board(
        model=_plain(model) or platform.machine() or "unknown machine",
        soc=_plain(compatible[-1]),
        processor=_plain(processor),
        cores=sum(name == "processor" for name, _ in cpuinfo) or os.cpu_count() or 1,
        memory_mb=None if kib is None else round(kib * 1024 / 1e6, 1),
        max_frequency_mhz=max((f for f in fastest if f is not None), default=None),
    )


def read_system(root: Path = ROOT) -> System:
    """The operating system below `root`, and what this process runs on."""
    release = dict(line.partition("=")[::2] for line in (text(root / "etc/os-release") or "").splitlines())
    return System(
        name=_plain(release.get("PRETTY_NAME", "").strip("\"'")),
        kernel=_plain(text(root / "proc/sys/kernel/osrelease")),
        machine=platform.machine(),
        bits=8 * struct.calcsize("P"),
        libc=" ".join(platform.libc_ver()).strip(),
        python=platform.python_version(),
    )


def _firmware(root: Path) -> str | None:
    """Maker and product by the BIOS, where those are not placeholders."""
    folder = root / "sys/devices/virtual/dmi/id"
    words = [text(folder / name) for name in ("sys_vendor", "product_name")]
    vendor, product = (None if word is None or _PLACEHOLDERS.search(word) else word for word in words)
    return " ".join(word for word in (vendor, product) if word) if product else None


def _processor(cpuinfo: list[tuple[str, str]]) -> str | None:
    """The name that an x86 gives itself, or the names of Arm's cores by their part numbers, the first core's first."""
    named = next((value for name, value in cpuinfo if name == "model name" and value), None)
    if named is not None:
        return named
    parts = [int(value, 16) for name, value in cpuinfo if name == "CPU part" and re.fullmatch("0x[0-9a-f]{1,4}", value)]
    cores = dict.fromkeys(_ARM_PARTS.get(part, f"Arm part {part:#x}") for part in parts)
    return " + ".join(cores) or None


def _plain(told: str | None) -> str | None:
    """One line of printable characters, 128 at most."""
    shown = "".join(character for character in (told or "") if character.isprintable())
    return shown.strip()[:128] or None
