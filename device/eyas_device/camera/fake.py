"""Fake camera: scripted frames and failures, for tests, demonstrations and dry runs of a fleet."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import cv2
import numpy as np

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.camera.spec import MAX_SIDE, RATE, SIZE, parse_options, parse_rate, parse_size
from eyas_device.errors import CameraError, CameraSpecError
from eyas_device.preprocess import Pixels
from eyas_device.support.clock import SYSTEM, Clock
from eyas_device.support.closing import Closing

_NUMBER = r"\d{1,9}"
_SPAN = rf"{_NUMBER}(-{_NUMBER})?"
_PATTERNS = {
    "frames": _NUMBER,
    "size": SIZE,
    "seed": _NUMBER,
    "fps": RATE,
    "live": "[01]",
    "junk": rf"({_NUMBER}(,{_NUMBER})*)?",
    "lost": rf"({_NUMBER})?",
    "hang": _NUMBER,
    "black": _SPAN,
    "frozen": _SPAN,
    "resize": rf"{_NUMBER}:{SIZE}",
}
_USAGE = (
    "fake: and fake:?frames=N&size=WIDTHxHEIGHT&seed=N&fps=N&live=0|1"
    f"&junk=N,N&lost=N&hang=N&black=N-M&frozen=N-M&resize=N:WIDTHxHEIGHT (sides 8 to {MAX_SIDE})"
)


class Hang:
    """Script item: the source stops responding."""


class Script(NamedTuple):
    """Parsed options."""

    values: Mapping[str, str]
    sizes: list[tuple[int, tuple[int, int]]]
    """First frame -> width and height, in ascending order."""
    fps: float | None


class FakeCamera(Closing):
    """Plays a script: frames are returned, exceptions raised, a `Hang` waits for the timeout; then the source ends."""

    def __init__(
        self,
        script: Iterable[Frame | Exception | Hang],
        *,
        live: bool = False,
        fps: float | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Clock = SYSTEM,
    ) -> None:
        """`live` is the value of the attribute; `fps` paces the items by `clock`, items per second."""
        self.live = live
        self._script = iter(script)
        self._interval_s = 0.0 if fps is None else 1.0 / fps
        self._timeout_s, self._clock = timeout_s, clock
        self._due = clock.monotonic()
        self._closed = threading.Event()

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S, clock: Clock = SYSTEM) -> FakeCamera:
        """Open `fake:` or `fake:?frames=20&size=640x480&seed=0`, with failures at numbered frames.

        Delivers drawn shapes as JPEG, `fps` a second; `live=1` marks the source as live. Frames in `junk` cannot be
        decoded; at `lost` the source fails; at `hang` it is silent until the timeout or `close`; frames N to M are
        `black`, or the same image (`frozen`); from `resize` on they have another size.
        Raises `CameraSpecError` for an unknown option or an invalid value.
        """
        script = cls.parse(rest)
        frames = _scripted_frames(script.values, script.sizes, clock)
        live = script.values.get("live") == "1"
        return cls(frames, live=live, fps=script.fps, timeout_s=timeout_s, clock=clock)

    @staticmethod
    def parse(rest: str) -> Script:
        """Options of a specification. Raises `CameraSpecError` for an unknown option or an invalid value."""
        shown = f"fake:{rest}"
        if rest and not rest.startswith("?"):
            raise CameraSpecError(f"camera {shown}: allowed are {_USAGE}")
        values = parse_options(rest.removeprefix("?"), _PATTERNS, spec=shown, usage=_USAGE)
        fps = parse_rate(values["fps"], spec=shown, usage=_USAGE) if "fps" in values else None
        return Script(values, _sizes(values, shown), fps)

    @property
    def closed(self) -> bool:
        """Whether it has been closed, for tests."""
        return self._closed.is_set()

    def capture(self) -> Frame | None:
        """Play the script's next item; None at the end or after `close`.

        Raises `CameraError` if it hangs for the whole timeout.
        """
        if self._interval_s:
            self._clock.wait(self._closed, self._due - self._clock.monotonic())
            self._due = max(self._due, self._clock.monotonic()) + self._interval_s
        item = next(self._script, None)
        if isinstance(item, Hang) and not self._clock.wait(self._closed, self._timeout_s):
            raise CameraError(f"camera fake: no frame within {self._timeout_s:g} s, as scripted")
        if self.closed or isinstance(item, Hang):
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Close the source; a capture that waits in another thread returns."""
        self._closed.set()


def draw(width: int, height: int, rng: np.random.Generator) -> Pixels:
    """Draw one bright disc, square or bar on a noisy grey image, uint8 [height, width, 3] BGR."""
    image = np.full((height, width, 3), 60, dtype=np.uint8)
    unit = max(2, min(width, height) // 4)
    x, y = int(rng.integers(unit, width - unit + 1)), int(rng.integers(unit, height - unit + 1))
    colour = tuple(int(c) for c in rng.integers(150, 256, 3))
    shape = int(rng.integers(3))
    if shape == 0:
        cv2.circle(image, (x, y), unit, colour, -1)
    elif shape == 1:
        cv2.rectangle(image, (x - unit, y - unit), (x + unit, y + unit), colour, -1)
    else:
        cv2.line(image, (x - unit, y - unit), (x + unit, y + unit), colour, max(1, unit // 3))
    return np.clip(image + rng.normal(0.0, 6.0, image.shape), 0, 255).astype(np.uint8)


def _sizes(values: Mapping[str, str], shown: str) -> list[tuple[int, tuple[int, int]]]:
    """Image sizes as (first frame, (width, height)), in ascending order."""
    sizes = [(0, parse_size(values.get("size", "640x480"), spec=shown, usage=_USAGE))]
    if "resize" in values:
        number, _, size = values["resize"].partition(":")
        sizes.append((int(number), parse_size(size, spec=shown, usage=_USAGE)))
    return sizes


def _scripted_frames(
    values: Mapping[str, str], sizes: list[tuple[int, tuple[int, int]]], clock: Clock
) -> Iterator[Frame | Exception | Hang]:
    seed = int(values.get("seed", "0"))
    junk = {int(number) for number in values.get("junk", "").split(",") if number}
    black, frozen = _span(values.get("black")), _span(values.get("frozen"))
    lost, hang = values.get("lost", ""), values.get("hang", "")
    for number in range(int(values.get("frames", "20"))):
        if lost and number == int(lost):
            yield CameraError(f"camera fake: lost at frame {number}, as scripted")
            return
        if hang and number == int(hang):
            yield Hang()
            return
        width, height = next(size for start, size in reversed(sizes) if number >= start)
        shown = frozen.start if number in frozen else number
        pixels = draw(width, height, np.random.default_rng((seed, shown)))
        if number in black:
            pixels[...] = 0
        encoded = cv2.imencode(".jpg", pixels)[1].tobytes()
        yield Frame(
            image=encoded[:20] if number in junk else encoded,
            time=clock.time(),
            source=f"fake#{number}",
            captured=clock.monotonic(),
        )


def _span(numbers: str | None) -> range:
    """The frame numbers of `N` or `N-M`, both ends included."""
    if numbers is None:
        return range(0)
    first, _, last = numbers.partition("-")
    return range(int(first), int(last or first) + 1)
