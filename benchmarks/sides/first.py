"""From the first import to the first answer, and the memory that it took: `python first.py BUNDLE IMAGE`."""

import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Answer one image and say when and at what cost."""
    started = time.perf_counter()
    from eyas_device.predict import Classifier
    from eyas_device.preprocess import decode

    with Classifier.open(sys.argv[1]) as classifier:
        pixels = decode(Path(sys.argv[2]).read_bytes(), spec=classifier.spec)
        classifier.predict(pixels)
        seconds = time.perf_counter() - started
        for _ in range(50):
            classifier.predict(pixels)
        status = Path("/proc/self/status").read_text()
    kilobytes = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"seconds": seconds, "peak_rss_mb": kilobytes / 1024}))


main()
