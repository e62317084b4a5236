"""What the machine is and how it feels: model, temperature, frequency, throttling, power, pressure and memory.

Everything is read below a `root` (the machine's own `/` unless told otherwise) and through a `Runner` for the few
commands, so that recorded boards can be read anywhere. What has no sensor, or one that talks nonsense, is None: it was
not measured. Nothing here raises for what it finds on a machine.
"""

from eyas_device.board.machine import Board, System, read_board, read_system
from eyas_device.board.power import Power, read_power
from eyas_device.board.process import Memory, Pressure, read_memory, read_pressure
from eyas_device.board.reading import NOT_MEASURED, ROOT, Runner
from eyas_device.board.sensors import Throttle, Vitals, decode_throttled, read_vitals

__all__ = [
    "NOT_MEASURED",
    "ROOT",
    "Board",
    "Memory",
    "Power",
    "Pressure",
    "Runner",
    "System",
    "Throttle",
    "Vitals",
    "decode_throttled",
    "read_board",
    "read_memory",
    "read_power",
    "read_pressure",
    "read_system",
    "read_vitals",
]
