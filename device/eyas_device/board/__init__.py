"""Board model and sensors: temperature, frequency, throttling, power, CPU pressure and memory.

Everything is read below a `root` (`/` by default) and through a `CommandRunner` for the few commands, so that recorded
boards can be read anywhere. A value without a sensor, or outside its plausible range, is None: not measured. Nothing
here raises for what it finds on a machine.
"""

from eyas_device.board.kind import board_kind
from eyas_device.board.machine import Board, System, read_board, read_system
from eyas_device.board.power import Power, read_power
from eyas_device.board.process import Memory, Pressure, read_memory, read_pressure
from eyas_device.board.reading import NOT_MEASURED, ROOT, CommandRunner
from eyas_device.board.sensors import Throttle, Vitals, decode_throttled, read_vitals

__all__ = [
    "NOT_MEASURED",
    "ROOT",
    "Board",
    "CommandRunner",
    "Memory",
    "Power",
    "Pressure",
    "System",
    "Throttle",
    "Vitals",
    "board_kind",
    "decode_throttled",
    "read_board",
    "read_memory",
    "read_power",
    "read_pressure",
    "read_system",
    "read_vitals",
]
