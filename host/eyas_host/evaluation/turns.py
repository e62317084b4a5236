"""Calls that are timed in turns, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


def take_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    seconds: float = 0.0,
    calls_per_turn: int = 5,
    warm_up: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of each call; all take turns in every round, so that a busy machine slows all alike.

    Args:
        calls: what to time, by name.
        rounds: least number of timed rounds; an untimed one comes first.
        seconds: least time for all rounds together.
        calls_per_turn: timed calls in one turn.
        warm_up: untimed calls before each turn, which fill the caches.
        clock: seconds, wall-clock or processor time.
        progress: called after each timed round.

    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    ends, number = time.perf_counter() + seconds, 0
    while number <= rounds or time.perf_counter() < ends:
        for name, call in calls.items():
            for _ in range(warm_up):
                call()
            for _ in range(calls_per_turn):
                started = clock()
                call()
                if number:
                    times[name].append(1000 * (clock() - started))
        if number:
            progress()
        number += 1
    return times
