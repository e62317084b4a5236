"""Minutes at full rate: what is left of the first seconds' speed when the board has grown hot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from time import perf_counter

from eyas_device.bench.measure import Candidate, Progress
from eyas_device.bench.result import Interval, Sustained
from eyas_device.board import Power, Vitals
from eyas_device.camera import Frame
from eyas_device.support.histogram import LogHistogram

INTERVAL_S = 10.0


def sustain(
    candidate: Candidate,
    frames: Sequence[Frame],
    *,
    seconds: float,
    feel: Callable[[], tuple[Vitals, Power | None]],
    told: Callable[[Interval], None],
    progress: Progress,
    interval_s: float = INTERVAL_S,
) -> Sustained:
    """Answer `frames` over and over for `seconds`, an interval at a time; `told` of each when it ends.

    `feel` reads the board's sensors at the end of an interval; what that takes is in none of them. What is left at
    the end is an interval too if it is at least half as long as the others.
    """
    source = cycle(frames)
    intervals: list[Interval] = []
    started = perf_counter()
    while (left := started + seconds - perf_counter()) > 0.5 * min(interval_s, seconds) or not intervals:
        began = perf_counter()
        ends = began + min(interval_s, left)
        latencies, count = LogHistogram(), 0
        while (now := perf_counter()) < ends or not count:
            latencies.add(candidate.answer(next(source), keep=False))
            count += 1
            if count % 64 == 0:
                progress(min((now - started) / seconds, 1.0))
        took = perf_counter() - began
        vitals, power = feel()
        figures = latencies.summary()
        intervals.append(
            Interval(
                second=round(perf_counter() - started, 1),
                frames=count,
                frames_per_second=round(count / took, 2),
                p50=figures["p50"],
                p90=figures["p90"],
                p99=figures["p99"],
                temperature_c=vitals.temperature_c,
                frequency_mhz=vitals.frequency_mhz,
                throttled=vitals.throttle.now if vitals.throttle else None,
                watts=power.watts if power else None,
            )
        )
        told(intervals[-1])
    first, last = intervals[0].frames_per_second, intervals[-1].frames_per_second
    return Sustained(
        runtime=candidate.chosen.runtime,
        artefact=candidate.chosen.artefact.name,
        intervals=tuple(intervals),
        drop=round(1 - last / first, 4) if len(intervals) > 1 else None,
    )
