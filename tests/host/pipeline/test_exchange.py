"""Sums over processes by sockets: the same everywhere, whoever comes first or late, and an end that is noticed."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.pipeline.exchange import Exchange, Floats


@contextmanager
def connected(count: int) -> Iterator[list[Exchange]]:
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(count) as pool:
        exchanges = [Exchange(rank, count, Path(place)) for rank in range(count)]
        list(pool.map(Exchange.connect, exchanges))
        try:
            yield exchanges
        finally:
            for exchange in exchanges:
                exchange.close()


def together(exchanges: list[Exchange], work: Callable[[Exchange], list[Floats]]) -> list[list[Floats]]:
    with ThreadPoolExecutor(len(exchanges)) as pool:
        return list(pool.map(work, exchanges))


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_all_get_the_same_sums_in_order(count: int, lengths: list[int], seed: int) -> None:
    values = [[np.random.default_rng((seed, rank, n)).normal(size=n) for n in lengths] for rank in range(count)]
    with connected(count) as exchanges:
        found = together(exchanges, lambda one: [one.sum(mine) for mine in values[one.rank]])
    for number in range(len(lengths)):
        expected = np.sum([values[rank][number] for rank in range(count)], axis=0)
        for rank in range(count):
            assert found[rank][number].tobytes() == expected.tobytes()


def test_one_that_is_late_is_waited_for_without_work() -> None:
    with connected(2) as exchanges:
        late = threading.Timer(0.5, lambda: exchanges[1].sum(np.ones(3)))
        late.start()
        before = time.thread_time()
        assert exchanges[0].sum(np.full(3, 2.0)).tolist() == [3.0, 3.0, 3.0]
        assert time.thread_time() - before < 0.3, "it polls for a moment only"
        late.join()


def test_one_that_ended_is_noticed() -> None:
    with connected(3) as exchanges:
        exchanges[2].close()
        with pytest.raises(RuntimeError, match="another training process has ended"):
            for _ in range(3):  # what was sent to a closed socket shows at the next try at the latest
                exchanges[0].sum(np.ones(3))
