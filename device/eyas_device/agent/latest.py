"""A slot with one place: who puts never waits, who takes gets the newest."""

from __future__ import annotations

import threading

from eyas_device.camera import Frame


class Ended:
    """The source has no more frames."""


Item = Frame | Exception | Ended


class LatestFrame:
    """Holds the newest item, a frame still encoded. One that nobody took is replaced; only the end stays."""

    def __init__(self) -> None:
        self.replaced = 0
        """How many frames a newer item replaced."""
        self._item: Item | None = None
        self._filled = threading.Condition()

    def put(self, item: Item) -> None:
        """Put `item` in the place of an older one."""
        with self._filled:
            if isinstance(self._item, Ended):
                return
            self.replaced += isinstance(self._item, Frame)
            self._item = item
            self._filled.notify()

    def take(self, timeout_s: float) -> Item | None:
        """The newest item, waiting for one for at most `timeout_s`; None if none came."""
        with self._filled:
            if self._item is None:
                self._filled.wait(timeout_s)
            item, self._item = self._item, None
            return item
