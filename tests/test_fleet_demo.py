"""The demonstration's cameras: nothing that a version is tried on was trained on, and a change is one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.sides import demo_scenes as scenes


def test_no_camera_sees_what_the_first_version_was_trained_on(tmp_path: Path) -> None:
    folder = scenes.write_images(tmp_path)
    trained = {(path.parent.name, int(path.stem.split("-")[0])) for path in folder.glob("*/*.png")}
    assert {label for label, _ in trained} == set(scenes.LABELS)
    assert not trained & set(scenes.scenes())
    for label in scenes.LABELS:
        pieces = [piece.tobytes() for piece in scenes.patches(label)]
        assert len(set(pieces)) == len(pieces) == scenes.PER_LABEL, "no piece is another one again"


def test_fewer_scenes_are_some_of_all_and_as_many_of_each_label(tmp_path: Path) -> None:
    some = scenes.scenes(5)
    assert set(some) < set(scenes.scenes())
    assert Counter(label for label, _ in some) == dict.fromkeys(scenes.LABELS, 5)
    assert len(list(scenes.write_images(tmp_path, 3).glob("*/*.png"))) == 2 * 3 * len(scenes.LABELS), "in two lights"


@pytest.mark.parametrize("kind", ["season", "dirt"])
def test_a_change_grows_and_a_usual_day_is_only_light(kind: str) -> None:
    image = scenes.patches("gravel")[0]
    usual = scenes.show(image, scenes.Condition(2), seed=1).astype(float)
    assert np.abs(usual - image).mean() < 4, "the noise of a sensor"
    changed = [
        np.abs(scenes.show(image, scenes.Condition(2, **{kind: step}), seed=1) - usual).mean()
        for step in range(scenes.STEPS + 1)
    ]
    assert changed[0] == 0 and all(np.diff(changed) > 0.5), changed
    night, noon = (scenes.show(image, scenes.Condition(light), seed=1).mean() for light in (0, 3))
    assert night < usual.mean() < noon
