"""The device's own loop, with everything it does for a frame (status line, OOD detector, telemetry window)."""

import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.agent.ood import OodDetector
from eyas_device.agent.output import StatusLine
from eyas_device.agent.reporter import Reporter
from eyas_device.agent.stats import LoopStats
from eyas_device.camera import Frame
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing


class Replay(Closing):
    """A finite source that plays encoded frames."""

    live = False

    def __init__(self, encoded: Iterator[bytes]) -> None:
        self._encoded = encoded

    def capture(self) -> Frame | None:
        """The next one."""
        return Frame(image=next(self._encoded), time=time.time(), source="replay")


class Labels(Listener):
    """Keeps the answers' labels."""

    def __init__(self) -> None:
        self.labels: list[int] = []

    def answered(self, answer: FramePrediction) -> None:
        """Keep one."""
        self.labels.append(answer.prediction.index)


def main() -> None:
    """Answer turns of frames."""
    bundle, frames = Path(sys.argv[1]), np.load(sys.argv[2])
    runtime = sys.argv[3] if len(sys.argv) > 3 else "litert"
    cv2.setNumThreads(1)
    encoded = [frames[name].tobytes() for name in sorted(frames.files)]

    def for_ever() -> Iterator[bytes]:
        while True:
            yield from encoded

    with (
        Classifier.open(bundle, runtime) as classifier,
        Reporter("127.0.0.1", 9, site="bench", device="bench", classifier=classifier) as link,  # nobody listens there
    ):
        labels = Labels()
        told = [labels, StatusLine(io.StringIO(), LoopStats(), link), OodDetector(classifier.bundle), link]
        loop = Loop(classifier, Replay(for_ever()), told)
        loop.run(frames=20)
        print("ready", flush=True)
        for line in sys.stdin:
            count = int(line.split()[1])
            labels.labels = []
            wall, cpu = time.perf_counter(), time.process_time()
            loop.run(frames=count)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            print(json.dumps({"frames": count, "wall_s": wall, "cpu_s": cpu, "labels": labels.labels}), flush=True)


main()
