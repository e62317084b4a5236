"""Electric power that the board draws, where it has a sensor."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.board.reading import COMMAND_S, ROOT, CommandRunner, folders, number, text
from eyas_device.support.processes import run_command

_MAX_MV, _MAX_MA, _MAX_UW = 60_000.0, 100_000.0, 2e9
_TOTAL_RAIL = re.compile(r"VDD_IN|POM_5V_IN|VIN_SYS_5V0", re.IGNORECASE)
"""Rails that feed a whole Jetson module. Source: NVIDIA Jetson Linux developer guide, power monitors."""
_ADC = re.compile(r"(\w{1,32})_([AV]) +(?:current|volt)\(\d+\)=(\d{1,4}(?:\.\d{1,12})?)[AV]", re.ASCII)
_PMIC_NOTE = "sum of the power chip's own rails: without the 5 V rail (USB, fan, HATs) and losses"


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """One power reading."""

    watts: float
    source: str
    """Name of the sensor."""
    rails_w: dict[str, float] = {}
    """Rail -> watts. A rail may feed another one, so their sum is not always `watts`."""
    note: str = ""
    """What `watts` includes."""


def read_power(root: Path = ROOT, *, run: CommandRunner = run_command) -> Power | None:
    """Read the power that the board draws now; None without a sensor.

    From the kernel's hwmon (INA3221 on Jetson, any other chip with a `power*_input`), else from `vcgencmd
    pmic_read_adc` on a Raspberry Pi 5, which runs for at most 2 s.
    """
    chips = folders(root / "sys/class/hwmon", "hwmon*")
    power = _ina3221([chip for chip in chips if text(chip / "name") == "ina3221"]) or _direct(chips)
    if power is None and "Raspberry Pi" in (text(root / "proc/device-tree/model") or ""):
        return decode_pmic(run(("vcgencmd", "pmic_read_adc"), COMMAND_S))
    return power


def decode_pmic(output: str | None) -> Power | None:
    """Sum volts times amperes over the rails that `vcgencmd pmic_read_adc` lists with both."""
    volts: dict[str, float] = {}
    amperes: dict[str, float] = {}
    for name, unit, value in _ADC.findall(output or ""):
        (amperes if unit == "A" else volts)[name] = float(value)
    rails = {name: round(volts[name] * amperes[name], 4) for name in amperes if name in volts}
    if not rails:
        return None
    watts = round(sum(rails.values()), 3)
    return Power(watts=watts, source="vcgencmd pmic_read_adc", rails_w=rails, note=_PMIC_NOTE)


def _ina3221(chips: list[Path]) -> Power | None:
    """INA3221 power monitors: per chip, in1..3 are bus voltages in mV and curr1..3 currents in mA.

    Source: Linux, Documentation/hwmon/ina3221.rst (in4..7 and curr4 are shunt voltages and sums).
    """
    rails: dict[str, float] = {}
    for chip in chips:
        for channel in (1, 2, 3):
            millivolts = number(chip / f"in{channel}_input", minimum=0, maximum=_MAX_MV)
            milliamperes = number(chip / f"curr{channel}_input", minimum=0, maximum=_MAX_MA)
            if millivolts is not None and milliamperes is not None:
                name = text(chip / f"in{channel}_label") or f"{chip.name} channel {channel}"
                rails[name] = round(millivolts * milliamperes * 1e-6, 4)
    if not rails:
        return None
    totals = [watts for name, watts in rails.items() if _TOTAL_RAIL.search(name)]
    note = "the whole module" if totals else "sum of the rails that are measured"
    return Power(watts=round(sum(totals or rails.values()), 3), source="ina3221", rails_w=rails, note=note)


def _direct(chips: list[Path]) -> Power | None:
    """Chips that report microwatts directly."""
    rails: dict[str, float] = {}
    for chip in chips:
        for channel in range(1, 9):
            watts = number(chip / f"power{channel}_input", scale=1e-6, minimum=0, maximum=_MAX_UW * 1e-6)
            if watts is not None:
                driver = text(chip / "name") or chip.name
                rails[f"{driver} {text(chip / f'power{channel}_label') or f'power{channel}'}"] = round(watts, 4)
    if not rails:
        return None
    watts = round(sum(rails.values()), 3)
    return Power(watts=watts, source="hwmon", rails_w=rails, note="sum of the chips that report it")
