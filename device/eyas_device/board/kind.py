"""The kind of a board, in one word: what a release may be limited to."""

from __future__ import annotations

import platform
from pathlib import Path

from eyas_device.board.machine import read_board
from eyas_device.board.reading import ROOT

_BY_SOC = {"brcm,bcm2837": "pi3", "brcm,bcm2711": "pi4", "brcm,bcm2712": "pi5"}
"""SoC in the device tree -> kind: a Zero 2 is a `pi3`, a 400 a `pi4`. Source: Linux, arch/arm64/boot/dts/broadcom."""
_BY_MACHINE = {"x86_64": "x86", "amd64": "x86"}


def board_kind(root: Path = ROOT) -> str:
    """`pi3`, `pi4`, `pi5`, `jetson` or `x86`; the processor's architecture, e.g. `aarch64`, for any other board."""
    soc = read_board(root).soc or ""
    if soc.startswith("nvidia,tegra"):
        return "jetson"
    machine = platform.machine()
    return _BY_SOC.get(soc) or _BY_MACHINE.get(machine, machine)
