"""A camera without a camera: scripted frames and scripted faults, for tests, demonstrations and dry runs of a fleet."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

import cv2
import numpy as np

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.camera.spec import MAX_SIDE, RATE, SIZE, options, rate, sides
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
    """In a script: nothing comes any more."""


class FakeCamera(Closing):
    """Plays a script: a frame is delivered, an exception raised, a `Hang` waited for; after the last item it ends."""

    def __init__(
        self,
        script: Iterable[Frame | Exception | Hang],
        *,
        live: bool = False,
        fps: float | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Clock = SYSTEM,
    ) -> None:
        """`live` is what the camera says of itself; `fps` paces the items by `clock`, items per second."""
        self.live = live
        self._script = iter(script)
        self._interval_s = 0.0 if fps is None else 1.0 / fps
        self._timeout_s, self._clock = timeout_s, clock
        self._due = clock.monotonic()
        self._closed = threading.Event()

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S, clock: Clock = SYSTEM) -> FakeCamera:
        """`fake:` or `fake:?frames=20&size=640x480&seed=0`, with faults at the frames that are named by number.

        Drawn shapes, JPEG-encoded. `fps` delivers so many a second, `live=1` calls that real time. Frames in `junk` are
        bytes that cannot be decoded; at `lost` the source fails; at `hang` it is silent until the timeout or `close`;
        frames N to M are `black`, or the same image (`frozen`); from `resize` on they have another size.
        Raises `CameraSpecError` for an unknown option or an odd value.
        """
        shown = f"fake:{rest}"
        if rest and not rest.startswith("?"):
            raise CameraSpecError(f"camera {shown}: allowed are {_USAGE}")
        given = options(rest.removeprefix("?"), _PATTERNS, spec=shown, usage=_USAGE)
        return cls(
            _drawn(given, _sizes(given, shown), clock),
            live=given.get("live") == "1",
            fps=rate(given["fps"], spec=shown, usage=_USAGE) if "fps" in given else None,
            timeout_s=timeout_s,
            clock=clock,
        )

    @property
    def closed(self) -> bool:
        """Whether it was closed, for tests."""
        return self._closed.is_set()

    def capture(self) -> Frame | None:
        """The script's next item: a frame is returned, an exception is raised, None at the end or after `close`.

        Raises `CameraError` when it hangs for as long as its timeout.
        """
        if self._interval_s:
            self._clock.wait(self._closed, self._due - self._clock.monotonic())
            self._due = max(self._due, self._clock.monotonic()) + self._interval_s
        item = next(self._script, None)
        if isinstance(item, Hang) and not self._clock.wait(self._closed, self._timeout_s):
            raise CameraError(f"camera fake: no frame within {self._timeout_s:g} s, as asked for")
        if self.closed or isinstance(item, Hang):
            return None
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """End it; a capture that waits in another thread returns."""
        self._closed.set()


def draw(width: int, height: int, rng: np.random.Generator) -> Pixels:
    """A grey, noisy image with one bright disc, square or bar on it; uint8 [height, width, 3] BGR."""
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


def _sizes(given: Mapping[str, str], shown: str) -> list[tuple[int, tuple[int, int]]]:
    """From which frame on the images have which size."""
    sizes = [(0, sides(given.get("size", "640x480"), spec=shown, usage=_USAGE))]
    if "resize" in given:
        number, _, size = given["resize"].partition(":")
        sizes.append((int(number), sides(size, spec=shown, usage=_USAGE)))
    return sizes


def _drawn(
    given: Mapping[str, str], sizes: list[tuple[int, tuple[int, int]]], clock: Clock
) -> Iterator[Frame | Exception | Hang]:
    seed = int(given.get("seed", "0"))
    junk = {int(number) for number in given.get("junk", "").split(",") if number}
    black, frozen = _span(given.get("black")), _span(given.get("frozen"))
    lost, hang = given.get("lost", ""), given.get("hang", "")
    for number in range(int(given.get("frames", "20"))):
        if lost and number == int(lost):
            yield CameraError(f"camera fake: lost at frame {number}, as asked for")
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
    """The frames of `N` or `N-M`, both ends included."""
    if numbers is None:
        return range(0)
    first, _, last = numbers.partition("-")
    return range(int(first), int(last or first) + 1)
