"""A fleet that the tests of drift share."""

from __future__ import annotations

import pytest

from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.store.database import Store
from tests.support.drift_parts import BEGIN, DAY, DAYS, NAMES, TUNING, dirty_camera, fill


@pytest.fixture(scope="session")
def raw_fleet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with the windows of twenty cameras, one of which becomes dirty on the third day; nobody looked at it."""
    url = f"sqlite:///{tmp_path_factory.mktemp('fleet') / 'raw.db'}"
    with Store(url) as store:
        fill(store, NAMES, dirty_camera(), DAYS, sites=["north"] * 10 + ["south"] * 10)
    return url


@pytest.fixture(scope="session")
def fleet(raw_fleet: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same, looked at."""
    from tests.support.drift_parts import copy_of

    url = copy_of(raw_fleet, tmp_path_factory.mktemp("fleet"))
    with Store(url) as store:
        Monitor(store, TUNING, clock=lambda: BEGIN + DAYS * DAY + 600).catch_up()
    return url
