"""GPIO: a pin of the board that follows an answer's level, by gpiozero."""

from __future__ import annotations

from typing import Any

from eyas_device.config import OutputSection
from eyas_device.outputs.answer import Answer
from eyas_device.outputs.delivery import OutputError
from eyas_device.support.packages import install_line


class Gpio:
    """One output pin, opened with its safe level at the first answer; opened again after an error."""

    max_attempts: int | None = None

    def __init__(self, output: OutputSection) -> None:
        self._pin, self._active_high, self._safe = output.pin, output.active_high, output.safe == "on"
        self._device: Any = None

    def deliver(self, answer: Answer) -> None:
        """Set the pin. Raises `OutputError` if there is no gpiozero or no such pin."""
        if self._device is None:
            self._device = self._open()
        try:
            self._device.value = int(answer.active)
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Release the pin. It becomes an input: a resistor on the board must hold what is safe while nothing runs."""
        if self._device is not None:
            device, self._device = self._device, None
            device.close()

    def _open(self) -> Any:
        try:
            from gpiozero import DigitalOutputDevice
        except ImportError as error:
            raise OutputError(f"gpiozero cannot be used ({error}); {install_line('gpio')}") from None
        try:
            return DigitalOutputDevice(self._pin, active_high=self._active_high, initial_value=self._safe)
        except Exception as error:  # of gpiozero's pin library, whichever is installed
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OutputError(f"GPIO {self._pin} cannot be opened ({reason}); see docs/outputs.md for access") from None
