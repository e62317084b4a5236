"""Daily hours, such as maintenance hours: `22:00-05:00`."""

from __future__ import annotations

import re
from typing import NamedTuple

DAY = 24 * 60
"""Minutes of a day."""


class Hours(NamedTuple):
    """From a minute of the day up to another one, over midnight if that is smaller; equal ones are the whole day."""

    start: int
    end: int

    def wait(self, minute: int) -> int:
        """Minutes from a minute of the day until these hours begin; 0 within them."""
        length = (self.end - self.start) % DAY or DAY
        return 0 if (minute - self.start) % DAY < length else (self.start - minute) % DAY


def parse_hours(text: str) -> Hours:
    """Parse `HH:MM-HH:MM`; an empty text is the whole day. Raises `ValueError`."""
    if not text:
        return Hours(0, 0)
    match = re.fullmatch(r"(\d{2}):(\d{2})-(\d{2}):(\d{2})", text, re.ASCII)
    if match is not None:
        first, second, third, fourth = map(int, match.groups())
        if max(first, third) < 24 and max(second, fourth) < 60:
            return Hours(60 * first + second, 60 * third + fourth)
    raise ValueError(f"{text!r}: hours such as 22:00-05:00 are needed")
