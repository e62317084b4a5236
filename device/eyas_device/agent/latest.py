"""Latest-frame buffer between the capture thread and the frame loop."""

from __future__ import annotations

import threading

from eyas_device.camera import Frame
from eyas_device.errors import ImageError


class Ended:
    """Marks the end of the source."""


Item = Frame | Exception | Ended


class LatestFrame:
    """Holds the newest item; a frame that was not taken yet is replaced, the end of the source stays."""

    def __init__(self) -> None:
        self.replaced = 0
        """Frames that were replaced by a newer item."""
        self._item: Item | None = None
        self._filled = threading.Condition()

    def put(self, item: Item) -> None:
        """Replace the item. Never blocks."""
        with self._filled:
            if isinstance(self._item, Ended):
                return
            self.replaced += isinstance(self._item, Frame)
            self._item = item
            self._filled.notify()

    def take(self, timeout_s: float) -> Item | None:
        """Take the newest item, waiting at most `timeout_s` for one; None on timeout."""
        with self._filled:
            if self._item is None:
                self._filled.wait(timeout_s)
            item, self._item = self._item, None
            return item

    def discard(self) -> None:
        """Drop a waiting frame, or the reason why one is unusable."""
        with self._filled:
            if isinstance(self._item, Frame | ImageError):
                self._item = None
