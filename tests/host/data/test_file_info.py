"""Files read by threads and by processes: the same results in the same order, and a killed process is one line."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from eyas_host.data import file_info
from eyas_host.data.file_info import FileInfo, UnreadableImage, read_file_infos
from eyas_host.support.errors import DataError


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """300 files, some of them cut short, missing or of another mode."""
    random, files = np.random.default_rng(0), []
    for number in range(300):
        path = tmp_path / f"{number:03d}.png"
        shape = (8, 8 + number % 5, 4) if number % 7 == 0 else (8, 8 + number % 5)
        cv2.imwrite(str(path), random.integers(0, 256, shape, dtype=np.uint8))
        if number % 11 == 3:
            path.write_bytes(path.read_bytes()[:40])
        if number % 50 == 5:
            path.unlink()
        files.append(str(path))
    return files


@pytest.mark.parametrize("processes", [False, True])
def test_every_file_is_read_once_in_order(paths: list[str], processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_info, "MIN_FOR_PROCESSES", 1 if processes else len(paths) + 1)
    monkeypatch.setattr(file_info, "decoding_threads", lambda: 2)
    results = list(read_file_infos(paths))
    assert len(results) == len(paths)
    for number, (path, result) in enumerate(zip(paths, results, strict=True)):
        if number % 11 == 3 or number % 50 == 5:
            assert isinstance(result, UnreadableImage) and result.path == path and result.why
            assert ("No such file" in result.why) == (number % 50 == 5)
        else:
            assert not isinstance(result, UnreadableImage)
            digest, file = result
            assert digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()
            mode = "colour+alpha" if number % 7 == 0 else "grey"
            assert (file.width, file.height, file.mode, file.bits) == (8 + number % 5, 8, mode, 8)


def test_what_images_have_in_common_is_kept_once(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_info, "MIN_FOR_PROCESSES", 1)
    monkeypatch.setattr(file_info, "decoding_threads", lambda: 2)
    files = [result[1] for result in read_file_infos(paths) if isinstance(result[1], FileInfo)]
    assert len({id(file.values) for file in files}) == len({file.values for file in files}) < 5
    assert len({id(file.mode) for file in files}) == 2


def test_a_killed_process_is_one_line(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_info, "MIN_FOR_PROCESSES", 1)
    monkeypatch.setattr(file_info, "decoding_threads", lambda: 2)
    monkeypatch.setattr(file_info, "perceptual_hash", lambda _: os._exit(9))
    with pytest.raises(DataError, match="process that reads images was killed"):
        list(read_file_infos(paths))


def test_no_file_at_all() -> None:
    assert list(read_file_infos([])) == []
