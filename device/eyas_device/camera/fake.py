"""A camera without a camera: scripted frames and scripted faults, for tests, demonstrations and dry runs of a fleet."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from urllib.parse import parse_qsl

import cv2
import numpy as np

from eyas_device.camera import TIMEOUT_S, Frame
from eyas_device.closing import Closing
from eyas_device.errors import CameraError
from eyas_device.preprocess import Pixels

_OPTIONS = {"frames": "20", "size": "640x480", "seed": "0", "junk": "", "lost": ""}
_MAX_SIDE = 8192


class FakeCamera(Closing):
    """Plays a script: a frame is delivered, an exception is raised, and after the last item the source has ended."""

    live = False

    def __init__(self, script: Iterable[Frame | Exception]) -> None:
        self._script = iter(script)
        self.closed = False

    @classmethod
    def open(cls, rest: str, *, timeout_s: float = TIMEOUT_S) -> FakeCamera:
        """`fake:` or `fake:?frames=20&size=640x480&seed=0&junk=3,7&lost=12`.

        Drawn shapes, JPEG-encoded; the frames numbered in `junk` are bytes that cannot be decoded, and at the frame
        `lost` the source fails with `CameraError`. Raises `CameraError` for an unknown option or an odd value.
        """
        given = dict(parse_qsl(rest.removeprefix("?"), keep_blank_values=True))
        values = {**_OPTIONS, **given}
        size = re.fullmatch(r"(\d{1,4})x(\d{1,4})", values["size"], re.ASCII)
        numbers = [values["frames"], values["seed"], *_listed(values["junk"]), *_listed(values["lost"])]
        plain = all(re.fullmatch(r"\d{1,9}", number, re.ASCII) for number in numbers)
        odd = bool(rest) and not given
        if odd or set(given) - set(_OPTIONS) or not plain or size is None or not _sides_fit(size):
            raise CameraError(
                f"camera fake:{rest}: allowed are fake: and "
                f"fake:?frames=N&size=WIDTHxHEIGHT&seed=N&junk=N,N&lost=N (sides 8 to {_MAX_SIDE})"
            )
        return cls(
            _drawn(
                frames=int(values["frames"]),
                width=int(size[1]),
                height=int(size[2]),
                seed=int(values["seed"]),
                junk={int(n) for n in _listed(values["junk"])},
                lost={int(n) for n in _listed(values["lost"])},
            )
        )

    def capture(self) -> Frame | None:
        """The script's next item: a frame is returned, an exception is raised, None at the end."""
        item = next(self._script, None)
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Remember that it was closed, for tests."""
        self.closed = True


def draw(width: int, height: int, rng: np.random.Generator) -> Pixels:
    """A grey, noisy picture with one bright disc, square or bar on it; uint8 [height, width, 3] BGR."""
    picture = np.full((height, width, 3), 60, dtype=np.uint8)
    unit = max(2, min(width, height) // 4)
    x, y = int(rng.integers(unit, width - unit + 1)), int(rng.integers(unit, height - unit + 1))
    colour = tuple(int(c) for c in rng.integers(150, 256, 3))
    shape = int(rng.integers(3))
    if shape == 0:
        cv2.circle(picture, (x, y), unit, colour, -1)
    elif shape == 1:
        cv2.rectangle(picture, (x - unit, y - unit), (x + unit, y + unit), colour, -1)
    else:
        cv2.line(picture, (x - unit, y - unit), (x + unit, y + unit), colour, max(1, unit // 3))
    return np.clip(picture + rng.normal(0.0, 6.0, picture.shape), 0, 255).astype(np.uint8)


def _drawn(
    *, frames: int, width: int, height: int, seed: int, junk: set[int], lost: set[int]
) -> Iterator[Frame | Exception]:
    for number in range(frames):
        if number in lost:
            yield CameraError(f"camera fake: lost at frame {number}, as asked for")
            return
        encoded = cv2.imencode(".jpg", draw(width, height, np.random.default_rng((seed, number))))[1].tobytes()
        image = encoded[:20] if number in junk else encoded
        yield Frame(image=image, time=time.time(), source=f"fake#{number}")


def _listed(numbers: str) -> list[str]:
    return numbers.split(",") if numbers else []


def _sides_fit(size: re.Match[str]) -> bool:
    return all(8 <= int(side) <= _MAX_SIDE for side in size.groups())
