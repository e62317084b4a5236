"""Sums over processes by sockets: the same everywhere, whoever comes first or late, and an end that is noticed."""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_host.pipeline import exchange
from eyas_host.pipeline.exchange import Exchange

_Value = TypeVar("_Value")


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


def together(exchanges: list[Exchange], work: Callable[[Exchange], list[_Value]]) -> list[list[_Value]]:
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


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 4),
    chunk=st.sampled_from([8, 64, exchange.CHUNK]),
    rows=st.lists(st.lists(st.integers(0, 5), min_size=4, max_size=4), min_size=1, max_size=5),
    columns=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_large_sums_and_gathers_in_any_order_and_size(
    count: int, chunk: int, rows: list[list[int]], columns: int, seed: int
) -> None:
    """Through memory of a few values up to megabytes; between them sums of a few, as in a step."""

    def numbers(rank: int, number: int, rows: int) -> npt.NDArray[np.float32]:
        return np.random.default_rng((seed, rank, number)).normal(size=(rows, columns)).astype(np.float32)

    def work(one: Exchange) -> list[npt.NDArray[Any]]:
        found: list[npt.NDArray[Any]] = []
        for number, sizes in enumerate(rows):
            own = numbers(one.rank, number, 1 + sum(sizes)).ravel()
            one.sum_in_place(own)
            found += [own, one.sum(np.full(2, one.rank + number, dtype=np.float64))]
            found += one.gather(numbers(one.rank, number, sizes[one.rank]), sizes[:count])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "CHUNK", chunk)
        with connected(count) as exchanges:
            everywhere = together(exchanges, work)
    for found in everywhere:
        results = iter(found)
        for number, sizes in enumerate(rows):
            parts = [numbers(rank, number, 1 + sum(sizes)).ravel() for rank in range(count)]
            assert next(results).tobytes() == functools.reduce(np.add, parts).tobytes()
            assert next(results).tolist() == [sum(range(count)) + count * number] * 2
            for rank, size in zip(range(count), sizes, strict=False):
                assert next(results).tolist() == numbers(rank, number, size).tolist()


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
        for work in (lambda: exchanges[0].sum(np.ones(3)), lambda: exchanges[0].sum_in_place(np.ones(3))):
            with pytest.raises(RuntimeError, match="another training process has ended"):
                for _ in range(3):  # what was sent to a closed socket shows at the next try at the latest
                    work()
