"""The device's own loop, with everything it does for a frame (log, figures, OOD detector, telemetry window)."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.agent.ood import OodDetector
from eyas_device.agent.output import RunLog, Summary
from eyas_device.agent.recent import Recent
from eyas_device.agent.reporter import Reporter, ReporterSettings
from eyas_device.camera import Frame
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing
from eyas_device.telemetry.mqtt import UplinkSettings


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

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Keep one."""
        self.labels.append(predicted.prediction.index)


def main() -> None:
    """Answer turns of frames."""
    bundle, frames = Path(sys.argv[1]), np.load(sys.argv[2])
    runtime = sys.argv[3] if len(sys.argv) > 3 else "litert"
    cv2.setNumThreads(1)
    encoded = [frames[name].tobytes() for name in sorted(frames.files)]

    def for_ever() -> Iterator[bytes]:
        while True:
            yield from encoded

    uplink = UplinkSettings(host="127.0.0.1", port=9, site="bench", device="bench")  # nothing listens there
    with (
        Classifier.open(bundle, runtime) as classifier,
        Reporter(ReporterSettings(uplink=uplink), classifier) as reporter,
    ):
        reporter.start()
        labels = Labels()
        recent = Recent()
        log = RunLog(recent, link=lambda: reporter.description)
        listeners = [labels, recent, log, Summary(), OodDetector(classifier.bundle), reporter]
        loop = Loop(classifier, Replay(for_ever()), listeners)
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
