"""Damaged checkpoints: one line names the file, and the training ends as an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from eyas_host.support.errors import StageError
from eyas_host.train.checkpoint import read_checkpoint, save_tensors
from tests.support.toy_training import Toy


def _lose_page(data: bytes) -> bytes:
    """A block in the middle of the weights is zero, as after a torn write: the archive's index is intact."""
    start = data.index(b"data/0") + 200
    return data[:start] + bytes(64) + data[start + 64 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "zeros from the middle": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "a lost page": _lose_page,
    "text": lambda data: b"not a checkpoint\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_line_and_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    path = tmp_path / "some.ckpt"
    save_tensors(path, {"model": {"weight": torch.arange(5000.0)}})
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert read_checkpoint(path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "damaged" in line
    assert not path.exists()
    assert read_checkpoint(path) is None and not capsys.readouterr().err  # nothing more to report


def test_a_file_that_may_not_be_read_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    path.mkdir()  # root may read any file
    with pytest.raises(StageError, match=r"some\.ckpt: cannot be read .*; see to its permissions, or remove it"):
        read_checkpoint(path)
    assert path.exists()


@pytest.mark.parametrize("damage", [*DAMAGE, "another optimizer", "no history"])
def test_the_training_ends_as_an_undisturbed_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Also when the weights fit and only a later part of the file does not: nothing of it is left in the network."""
    whole = Toy(tmp_path / "whole.ckpt", ema=0.9)
    expected = whole.fit()
    killed = Toy(tmp_path / "killed.ckpt", ema=0.9)
    killed.stop_at = (3, 0)
    with pytest.raises(KeyboardInterrupt):
        killed.fit()
    path = killed.checkpoint
    if damage in DAMAGE:
        path.write_bytes(DAMAGE[damage](path.read_bytes()))
    else:
        saved = torch.load(path, weights_only=True)
        saved |= {"optimizer": {"state": {}, "param_groups": []}} if damage == "another optimizer" else {"history": 3}
        torch.save(saved, path)
    capsys.readouterr()
    resumed = Toy(path, ema=0.9)
    history = resumed.fit()
    assert [line for line in capsys.readouterr().err.splitlines() if "damaged" in line and str(path) in line]
    assert resumed.made[0] == (0, 0)
    assert [epoch.loss for epoch in history] == [epoch.loss for epoch in expected]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
