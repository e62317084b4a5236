"""`eyas pretrain`: find the images, train, and write the card beside the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import cv2
import msgspec
import torch

from eyas_host.evaluation.inference import pick_device
from eyas_host.pipeline.distributed import SINGLE_THREAD_SIZE
from eyas_host.pretrain.card import Record, weights_card
from eyas_host.pretrain.images import APT, find_images, held_out, missing_packages, read_images
from eyas_host.pretrain.train import PretrainSettings, begin, fingerprint, pretrain
from eyas_host.support.files import write_bytes
from eyas_host.support.machine import machine
from eyas_host.support.progress import warn


def make_pretrained(
    settings: PretrainSettings,
    root: Path,
    folder: Path,
    *,
    minutes: float | None,
    device: Literal["auto", "cuda", "cpu"],
) -> str:
    """Train in `folder` from the images that packages under `root` ship; returns a line that says how far it came.

    Raises `WeightsError` for too few images, `StageError` for a full disk, and as `begin` does.
    """
    gpu = pick_device(device).type == "cuda"
    cores = os.cpu_count() or 1
    torch.set_num_threads(1 if settings.size <= SINGLE_THREAD_SIZE else cores)
    cv2.setNumThreads(1)
    found = find_images(root)
    if missing := missing_packages(found):
        warn(f"{len(found)} images to learn from; none of {', '.join(missing)}: few images make a poor start; {APT}")
    learned, out = held_out(found)
    settings = msgspec.structs.replace(settings, images=fingerprint([one.sha256 for one in learned]))
    begin(settings, folder)  # mistakes show before the images are read
    result = pretrain(
        settings,
        read_images(learned, "images"),
        read_images(out, "images held out"),
        folder,
        minutes=minutes,
        device=device,
        workers=cores - 1 if gpu else 0,  # a GPU waits for one core's crops; without one, the core has enough to do
    )
    record = Record(settings, result, machine()["processor"], {one.sha256: one.package for one in learned})
    path = folder / f"{settings.student}.safetensors"
    write_bytes(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
    write_bytes(path.with_suffix(".md"), weights_card(record).encode())
    how = "finished" if result.finished else f"{result.crops / settings.crops:.0%} done, run again to go on"
    return f"{path}: agrees with the teacher on {result.agreement:.1%} of held-out crops; {how}"
