"""A device's telemetry without a camera: windows go through the real spool and uplink.

    telemetry_device.py PORT FOLDER NAME MESSAGES RATE

Each window has its number in `frames`. FOLDER/NAME.tried gets the number before the window is in the spool,
FOLDER/NAME.kept once it is on disk: the latter have to arrive. Restarted, it continues after the last number tried. It
ends when the spool is empty.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from eyas_device.telemetry.messages import Status, Window
from eyas_device.telemetry.mqtt import Uplink, UplinkSettings
from eyas_device.telemetry.spool.spool import Spool, SpoolState

LABELS = tuple(f"label-{n}" for n in range(10))
BINS = (1, 0, 0, 0, 0, 2, 3, 4, 5, 15)


def window(number: int) -> Window:
    """A window of a device with ten labels, about 1 kB."""
    return Window(
        seconds=30.0,
        model="benchmark 1.0.0",
        digest="0123456789ab",
        artefact="litert-int8",
        frames=number,
        counts=dict.fromkeys(LABELS, 30),
        confidence_bins=dict.fromkeys(LABELS, BINS),
        confidence_sum=dict.fromkeys(LABELS, 29.12),
        latency_bins={100 + n: 15 for n in range(20)},
        latency_ms={"p50": 3.1, "p90": 4.2, "p99": 6.3, "max": 9.9},
        camera="delivering",
    )


def last(path: Path) -> int:
    """Last complete line of a file, as an integer; -1 if there is none."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return int(lines[-2]) if len(lines) > 1 else -1


def main() -> None:
    """Send the windows."""
    port, folder, name = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    total, rate = int(sys.argv[4]), float(sys.argv[5])
    tried, kept = folder / f"{name}.tried", folder / f"{name}.kept"
    start = last(tried) + 1
    out = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for path in (tried, kept)]
    (folder / name).mkdir(exist_ok=True)
    spool = Spool(folder / name, device=name)
    uplink = Uplink(
        UplinkSettings(host="127.0.0.1", port=port, site="s", device=name),
        spool,
        will=Status(device=name),
        make_status=lambda: Status(state="online"),
        on_command=lambda payload: None,
    )
    uplink.start()
    due = time.monotonic()
    for number in range(start, total):
        os.write(out[0], b"%d\n" % number)
        spool.append(window(number))
        if spool.state is SpoolState.ON_DISK:
            os.write(out[1], b"%d\n" % number)
        spool.maintain()
        due += 1 / rate
        time.sleep(max(0.0, due - time.monotonic()))
    while spool.pending("window", limit=1):
        spool.maintain()
        time.sleep(0.1)
    uplink.close()
    spool.close()


if __name__ == "__main__":
    main()
