"""How much electric power the board draws, where it has a sensor for that."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from eyas_device.board.reading import COMMAND_S, ROOT, Runner, folders, number, text
from eyas_device.support.processes import run_command

_MOST_MV, _MOST_MA, _MOST_UW = 60_000.0, 100_000.0, 2e9
_WHOLE = re.compile(r"VDD_IN|POM_5V_IN|VIN_SYS_5V0", re.IGNORECASE)
"""Rails that feed the whole of a Jetson. Source: NVIDIA Jetson Linux developer guide, power monitors."""
_ADC = re.compile(r"(\w{1,32})_([AV]) +(?:current|volt)\(\d+\)=(\d{1,4}(?:\.\d{1,12})?)[AV]", re.ASCII)
_PMIC_NOTE = "sum of the power chip's own rails: leaves out what hangs on the 5 V rail (USB, fan, HATs) and its losses"


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """Electric power at a moment."""

    watts: float
    source: str
    """The sensor."""
    rails_w: dict[str, float] = {}
    """Rail -> watts. Rails may feed one another, so that their sum need not be `watts`."""
    note: str = ""
    """What `watts` covers."""


def read_power(root: Path = ROOT, *, run: Runner = run_command) -> Power | None:
    """The power that the board below `root` draws now; None without a sensor.

    From the kernel's hwmon (INA3221 on Jetson, any other chip with a `power*_input`), else from `vcgencmd
    pmic_read_adc` on a Raspberry Pi 5, which runs for at most 2 s.
    """
    chips = folders(root / "sys/class/hwmon", "hwmon*")
    found = _ina3221([chip for chip in chips if text(chip / "name") == "ina3221"]) or _direct(chips)
    if found is None and "Raspberry Pi" in (text(root / "proc/device-tree/model") or ""):
        return decode_pmic(run(("vcgencmd", "pmic_read_adc"), COMMAND_S))
    return found


def decode_pmic(told: str | None) -> Power | None:
    """The sum of volts times amperes over the rails that have both, as `vcgencmd pmic_read_adc` lists them."""
    volts: dict[str, float] = {}
    amperes: dict[str, float] = {}
    for name, unit, value in _ADC.findall(told or ""):
        (amperes if unit == "A" else volts)[name] = float(value)
    rails = {name: round(volts[name] * amperes[name], 4) for name in amperes if name in volts}
    if not rails:
        return None
    watts = round(sum(rails.values()), 3)
    return Power(watts=watts, source="vcgencmd pmic_read_adc", rails_w=rails, note=_PMIC_NOTE)


def _ina3221(chips: list[Path]) -> Power | None:
    """Three channels a chip: in1..3 are bus voltages in mV, curr1..3 currents in mA.

    Source: Linux, Documentation/hwmon/ina3221.rst (in4..7 and curr4 are shunt voltages and sums).
    """
    rails: dict[str, float] = {}
    for chip in chips:
        for channel in (1, 2, 3):
            millivolts = number(chip / f"in{channel}_input", least=0, most=_MOST_MV)
            milliamperes = number(chip / f"curr{channel}_input", least=0, most=_MOST_MA)
            if millivolts is not None and milliamperes is not None:
                name = text(chip / f"in{channel}_label") or f"{chip.name} channel {channel}"
                rails[name] = round(millivolts * milliamperes * 1e-6, 4)
    if not rails:
        return None
    whole = [watts for name, watts in rails.items() if _WHOLE.search(name)]
    note = "the whole module" if whole else "sum of the rails that are measured"
    return Power(watts=round(sum(whole or rails.values()), 3), source="ina3221", rails_w=rails, note=note)


def _direct(chips: list[Path]) -> Power | None:
    """Chips that tell microwatts themselves."""
    rails: dict[str, float] = {}
    for chip in chips:
        for channel in range(1, 9):
            watts = number(chip / f"power{channel}_input", scale=1e-6, least=0, most=_MOST_UW * 1e-6)
            if watts is not None:
                maker = text(chip / "name") or chip.name
                rails[f"{maker} {text(chip / f'power{channel}_label') or f'power{channel}'}"] = round(watts, 4)
    if not rails:
        return None
    watts = round(sum(rails.values()), 3)
    return Power(watts=watts, source="hwmon", rails_w=rails, note="sum of the chips that tell it")
