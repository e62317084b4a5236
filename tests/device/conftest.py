"""What the device's tests share: a tiny real bundle, images in class folders, and a real broker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import pytest

from tests.support import tiny
from tests.support.brokers import Broker
from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.system_parts import require


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images a label, in folders named as the labels."""
    root = tmp_path_factory.mktemp("images")
    for label in tiny.LABELS:
        (root / label).mkdir()
        for seed in range(4):
            suffix = ".png" if seed % 2 else ".jpg"
            assert cv2.imwrite(str(root / label / f"{seed}{suffix}"), tiny.draw_shape(label, 100 + seed))
    return root


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Make brokers that end with the test. Skips without mosquitto, but fails on continuous integration."""
    require("mosquitto")
    made: list[Broker] = []

    def make(**options: str) -> Broker:
        made.append(Broker(tmp_path, **options))
        return made[-1]

    yield make
    for broker in made:
        broker.stop()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    """A running broker that lets anybody in."""
    return make_broker().start()
