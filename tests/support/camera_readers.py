"""Readers that behave as badly as a camera's library may; imported in the child process only."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from eyas_device.errors import CameraError, CameraSpecError, ImageError
from tests.support.streams import jpeg_image

Image = npt.NDArray[Any]


class Behaviour(msgspec.Struct, frozen=True):
    """How to behave."""

    how: str = "raw"
    at: int = 3
    """Frame at which something happens."""
    text: str = ""
    fps: float = 100.0


def pixels(number: int, width: int = 32, height: int = 24) -> npt.NDArray[np.uint8]:
    """The frame with this number, recognisable by its pixels; uint8 [height, width, 3]."""
    ramp = np.arange(height * width * 3, dtype=np.uint32) * 7 + number
    return (ramp % 251).astype(np.uint8).reshape(height, width, 3)


def _rights(path: str) -> dict[str, Any]:
    """What this process is, and what it can read."""
    try:
        read = Path(path).read_text()
    except OSError as error:
        read = type(error).__name__
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines}
    return {
        "uid": status["Uid"],
        "groups": sorted(os.getgroups()),
        "caps": status["CapEff"][0],
        "nnp": status["NoNewPrivs"][0],
        "oom": Path("/proc/self/oom_score_adj").read_text().strip(),
        "read": read,
        "secret": [name for name in os.environ if "SECRET" in name or "NOTIFY" in name],
        "path": "PATH" in os.environ,
        "fds": len(list(Path("/proc/self/fd").iterdir())),
    }


class Drawn:
    """Numbered frames, and what `how` names at frame `at`, or for the first frame that is asked for."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.behaviour = msgspec.convert(settings, Behaviour)
        self.number = -1
        self.asked = False
        self.note = self.behaviour.text if self.behaviour.how == "note" else ""
        if self.behaviour.how == "tell":
            raise CameraError(json.dumps(_rights(self.behaviour.text)))
        if self.behaviour.how == "slow opening":
            time.sleep(600)
        if self.behaviour.how == "no opening":
            raise CameraError("not there")
        if self.behaviour.how == "mistake":
            raise CameraSpecError("no such thing")

    def grab(self) -> bool:
        time.sleep(1 / self.behaviour.fps)
        self.number += 1
        if self.number < self.behaviour.at:
            return True
        match self.behaviour.how:
            case "hang":
                while True:
                    time.sleep(600)
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "end":
                return False
            case "fail":
                raise CameraError("pulled out")
            case "say":
                os.write(int(sys.argv[1]), self.behaviour.text.encode())
                time.sleep(600)
        return True

    def retrieve(self, buffer: npt.NDArray[np.uint8]) -> Image | bytes:
        odd, self.asked = not self.asked, True
        match self.behaviour.how:
            case "encoded":
                return jpeg_image(self.number)
            case "in place":
                target = buffer[: 24 * 32 * 3].reshape(24, 32, 3)
                target[...] = pixels(self.number)
                return target
            case "huge" if odd:
                return bytes(len(buffer) + 1)
            case "16 bit" if odd:
                return np.zeros((24, 32, 3), dtype=np.uint16)
            case "two channels" if odd:
                return np.zeros((24, 32, 2), dtype=np.uint8)
            case "nothing" if odd:
                return np.zeros((0, 0, 3), dtype=np.uint8)
            case "torn" if odd:
                raise ImageError("torn")
            case "grey" if odd:
                return pixels(self.number)[..., 0]
        return pixels(self.number)

    def close(self) -> None:
        """Nothing is held."""
