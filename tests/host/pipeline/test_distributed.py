"""Several processes: one run of them through the command line against one process, and the arithmetic of shares."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eyas_host.data.index import build_index
from eyas_host.data.split import split_index
from eyas_host.pipeline import distributed
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.load import load_recipe
from tests.support.inside import eyas

RECIPE = """
[run]
name = "toy"
device = "cpu"
workers = 0
[data]
path = "images"
[image]
size = 32
[augment]
horizontal_flip = false
rotate_degrees = 0.0
crop_scale = 1.0
brightness = 0.0
contrast = 0.0
[teacher]
model = "mobilenetv3_small_050"
weights = "random"
head_epochs = 2
epochs = 2
batch = {batch}
accumulate = 2
ema = 0.9
unfreeze = "3"
[student]
model = "mobilenetv3_small_050"
weights = "random"
views = 1
epochs = 1
batch = 9
[prune]
method = "none"
"""


@pytest.fixture
def place(tmp_path: Path, shape_images: Path) -> Path:
    """A folder with a recipe of three batches and one image, and with fewer images of one class."""
    images = shutil.copytree(shape_images, tmp_path / "images")
    data, recipe = DataSection(path=str(images)), tmp_path / "recipe.toml"
    for path in sorted((images / "circle").iterdir())[:8]:
        path.unlink()
        counts = split_index(build_index(data), data, 0).counts["train"]
        batch, left = divmod(sum(counts.values()), 3)
        if left == 1 and len(set(counts.values())) > 1:
            recipe.write_text(RECIPE.format(batch=batch))
            return tmp_path
    raise AssertionError("no split leaves one image")


def taught(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    record = json.loads((run / "teach" / "stage.json").read_bytes())
    return record["facts"]["histories"], torch.load(run / "teach" / "teacher.pt", weights_only=True)


def one_of_two(rank: int, port: int, place: Path, pipe: Connection) -> None:
    """What a launcher starts."""
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    pipe.send(eyas(place, "prune", "recipe.toml", "--runs", "two"))


def test_two_processes_teach_as_one_and_distil_together(place: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # nothing is imported again
    pipes = [multiprocessing.Pipe(duplex=False) for _ in range(2)]
    two = [
        context.Process(target=one_of_two, args=(rank, port, place, pipes[rank][1]), daemon=True) for rank in range(2)
    ]
    for process in two:
        process.start()
    try:
        assert eyas(place, "teach", "recipe.toml", "--runs", "one").code == 0
        assert all(pipe.poll(120) for pipe, _ in pipes)
        main, other = (pipe.recv() for pipe, _ in pipes)
    finally:
        for process in two:
            process.kill()
    assert main.code == other.code == 0
    assert main.err.splitlines()[-1].startswith("prune ")
    assert not other.err and not other.out
    counts = json.loads((place / "two/toy/split/stage.json").read_bytes())["facts"]["counts"]["train"]
    batch = load_recipe(place / "recipe.toml").teacher.batch
    assert sum(counts.values()) == 3 * batch + 1 and len(set(counts.values())) > 1

    (histories, state), (expected, wanted) = taught(place / "two/toy"), taught(place / "one/toy")
    for title, history in expected.items():
        for one, other in zip(history, histories[title], strict=True):
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
            assert other["metrics"] == pytest.approx(one["metrics"], abs=1e-5)
    assert {len(history) for history in expected.values()} == {2}
    for name, value in wanted.items():
        assert torch.allclose(state[name], value, atol=1e-5, rtol=0), name
    assert eyas(place, "prune", "recipe.toml", "--runs", "two").err.count("unchanged") == 4


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_shares_make_the_batch(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(count))
    for rows in range(8):
        batch, shares = np.arange(rows), []
        for rank in range(count):
            monkeypatch.setenv("RANK", str(rank))
            shares.append(distributed.local_shard(batch))
        assert [part.tolist() for part in shares] == [part.tolist() for part in np.array_split(batch, count)]


def test_a_stage_of_the_main_process_alone_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.world_size() == 2
    with distributed.single_process():
        assert distributed.world_size() == 1
        assert distributed.from_main("word") == "word"
        assert len(distributed.local_shard(np.arange(5))) == 5
    assert distributed.world_size() == 2
