"""What sides share that answer frame by frame: warming up, turns, and the clocks. Needs nothing but the interpreter."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

Frame = TypeVar("Frame")


def serve(answer: Callable[[Frame], int], encoded: Sequence[Frame], *, warm: int = 20) -> None:
    """Answer the first frames, say `ready`, then answer each turn that is asked for; see `sides/__init__.py`."""
    for data in encoded[:warm]:
        answer(data)
    print("ready", flush=True)
    place = 0
    for line in sys.stdin:
        count = int(line.split()[1])
        wall, cpu, labels = time.perf_counter(), time.process_time(), []
        for _ in range(count):
            labels.append(answer(encoded[place % len(encoded)]))
            place += 1
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"frames": count, "wall_s": wall, "cpu_s": cpu, "labels": labels}), flush=True)
