"""A camera that is faster than the model: the one-place slot of undecoded frames against a queue of two decoded ones.

Started as `python overload.py BUNDLE FRAMES.npz slot|queue`; a turn is seconds and frames a second. It keeps to one
processor core, as on a busy device. Camera, model and preprocessing are the same; what lies between them differs.
"""

import contextlib
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np

from eyas_device.agent.loop import FramePrediction, Listener, Loop
from eyas_device.camera import Frame
from eyas_device.predict import Classifier
from eyas_device.support.closing import Closing


class Clockwork(Closing):
    """A live camera of so many frames a second; who comes late gets the newest, as from a driver."""

    live = True

    def __init__(self, encoded: list[bytes], fps: float) -> None:
        self._encoded, self._every = encoded, 1.0 / fps
        self._started, self._last = time.monotonic(), -1
        self._closed = False

    def capture(self) -> Frame | None:
        """The newest frame that was not captured yet."""
        number = max(self._last + 1, int((time.monotonic() - self._started) / self._every))
        due = self._started + number * self._every
        if (early := due - time.monotonic()) > 0:
            time.sleep(early)
        if self._closed:
            return None
        self._last = number
        return Frame(image=self._encoded[number % len(self._encoded)], time=time.time(), source="", captured=due)

    def close(self) -> None:
        """Deliver no more."""
        self._closed = True


class Ages(Listener):
    """Keeps how old each answered frame was, milliseconds."""

    def __init__(self) -> None:
        self.ages: list[float] = []

    def on_prediction(self, predicted: FramePrediction) -> None:
        """Keep one."""
        self.ages.append(predicted.age_ms)


def slot(classifier: Classifier, camera: Clockwork, seconds: float) -> list[float]:
    """The device's own loop."""
    ages = Ages()
    loop = Loop(classifier, camera, [ages])
    timer = threading.Timer(seconds, loop.stop)
    timer.start()
    loop.run()
    return ages.ages


def decoded_queue(classifier: Classifier, camera: Clockwork, seconds: float) -> list[float]:
    """Decode every frame as it comes, keep the newest two, answer the older one."""
    waiting: queue.Queue[tuple[np.ndarray, float]] = queue.Queue(maxsize=2)

    def capture() -> None:
        while (frame := camera.capture()) is not None:
            if waiting.full():
                with contextlib.suppress(queue.Empty):
                    waiting.get_nowait()
            waiting.put((frame.pixels(classifier.spec), frame.captured))

    thread = threading.Thread(target=capture)
    thread.start()
    ages = []
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        pixels, captured = waiting.get(timeout=10)
        classifier.predict(pixels)
        ages.append(1000 * (time.monotonic() - captured))
    camera.close()
    thread.join()
    return ages


def main() -> None:
    """Answer turns of seconds."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    frames = np.load(sys.argv[2])
    encoded = [frames[name].tobytes() for name in sorted(frames.files)]
    way = {"slot": slot, "queue": decoded_queue}[sys.argv[3]]
    with Classifier.open(Path(sys.argv[1])) as classifier:
        way(classifier, Clockwork(encoded, 30), 0.5)
        print("ready", flush=True)
        for line in sys.stdin:
            seconds, fps = map(float, line.split()[1:])
            ages = way(classifier, Clockwork(encoded, fps), seconds)
            print(json.dumps({"answers": len(ages), "seconds": seconds, "ages_ms": ages}), flush=True)


main()
