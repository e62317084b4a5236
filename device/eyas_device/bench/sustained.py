"""Sustained load: minutes at full rate, to see how much speed is lost when the board heats up."""

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
    read_sensors: Callable[[], tuple[Vitals, Power | None]],
    on_interval: Callable[[Interval], None],
    progress: Progress,
    interval_s: float = INTERVAL_S,
) -> Sustained:
    """Classify `frames` repeatedly for `seconds`, in intervals; `on_interval` is called at the end of each.

    `read_sensors` is called between intervals; its duration is not part of any. The rest at the end is an interval too
    if it is at least half as long as the others.
    """
    source = cycle(frames)
    intervals: list[Interval] = []
    started = perf_counter()
    while (remaining := started + seconds - perf_counter()) > 0.5 * min(interval_s, seconds) or not intervals:
        began = perf_counter()
        ends = began + min(interval_s, remaining)
        latencies, count = LogHistogram(), 0
        while (now := perf_counter()) < ends or not count:
            latencies.add(candidate.time_frame(next(source), record=False))
            count += 1
            if count % 64 == 0:
                progress(min((now - started) / seconds, 1.0))
        duration = perf_counter() - began
        vitals, power = read_sensors()
        quantiles = latencies.summary()
        intervals.append(
            Interval(
                second=round(perf_counter() - started, 1),
                frames=count,
                frames_per_second=round(count / duration, 2),
                p50=quantiles["p50"],
                p90=quantiles["p90"],
                p99=quantiles["p99"],
                temperature_c=vitals.temperature_c,
                frequency_mhz=vitals.frequency_mhz,
                throttled=vitals.throttle.now if vitals.throttle else None,
                watts=power.watts if power else None,
            )
        )
        on_interval(intervals[-1])
    first, last = intervals[0].frames_per_second, intervals[-1].frames_per_second
    return Sustained(
        runtime=candidate.selection.runtime,
        artefact=candidate.selection.artefact.name,
        intervals=tuple(intervals),
        drop=round(1 - last / first, 4) if len(intervals) > 1 else None,
    )
