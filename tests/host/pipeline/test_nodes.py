"""Two nodes that `torchrun` brings together through its rendezvous on loopback train the weights of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.inside import eyas
from tests.support.shapes import draw_folder

RECIPE = """
[run]
name = "toy"
device = "cpu"
workers = 0
threads = 1
trackers = []
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
head_epochs = 1
epochs = 2
batch = 9
ema = 0.9
unfreeze = "3"
"""


def node(place: Path, port: int) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "eyas"]
    command = [*launcher, "--local-addr", "127.0.0.1", "-m", "eyas_host", "teach", "recipe.toml", "--runs", "nodes"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_nodes_train_the_weights_of_one(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", count=11, width=40, height=36, labels=("ring", "square", "cross"))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [node(tmp_path, port) for _ in range(2)]
    try:
        assert eyas(tmp_path, "teach", "recipe.toml", "--runs", "one").code == 0
        outputs = [process.communicate(timeout=500)[0] for process in nodes]
    finally:
        for process in nodes:
            process.kill()
    assert [process.returncode for process in nodes] == [0, 0], outputs
    assert sum("teach " in output for output in outputs) == 1, "one of them speaks"
    records = [json.loads((tmp_path / runs / "toy/teach/stage.json").read_bytes()) for runs in ("one", "nodes")]
    for title, history in records[0]["facts"]["histories"].items():
        for epoch, other in zip(history, records[1]["facts"]["histories"][title], strict=True):
            assert other["loss"] == pytest.approx(epoch["loss"], abs=1e-5)
    one, two = (torch.load(tmp_path / runs / "toy/teach/teacher.pt", weights_only=True) for runs in ("one", "nodes"))
    assert set(one) == set(two)
    assert all(torch.allclose(two[name], value, atol=1e-5, rtol=0) for name, value in one.items())
