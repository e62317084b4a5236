"""`eyas pretrain`: find the images, train, and write the card beside the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import cv2
import msgspec
import torch

from eyas_device.board.limits import usable_cores
from eyas_host.evaluation.inference import pick_device
from eyas_host.pipeline.distributed import SINGLE_THREAD_SIZE
from eyas_host.pipeline.lock import RunLock
from eyas_host.pretrain.card import Record, weights_card
from eyas_host.pretrain.images import APT, find_images, missing_packages, read_images, split_held_out
from eyas_host.pretrain.train import PretrainSettings, check_models, check_settings, fingerprint, pretrain
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
    """Train in `folder` from the images that packages under `root` ship; returns a one-line summary.

    Raises `WeightsError` for too few images, `StageError` for a full disk or a folder in use, and as
    `check_models` and `check_settings` do.
    """
    gpu = pick_device(device).type == "cuda"
    cores = usable_cores()
    torch.set_num_threads(1 if settings.size <= SINGLE_THREAD_SIZE else cores)
    cv2.setNumThreads(1)
    files = find_images(root)
    if missing := missing_packages(files):
        warn(f"{len(files)} images; none of {', '.join(missing)}: few images give poor weights; {APT}")
    training, held_out = split_held_out(files)
    settings = msgspec.structs.replace(settings, images=fingerprint([file.sha256 for file in training]))
    check_models(settings)  # fail before anything is written or read
    with RunLock(folder) as lock:
        lock.require()
        check_settings(settings, folder)
        result = pretrain(
            settings,
            read_images(training, "images"),
            read_images(held_out, "held-out images"),
            folder,
            minutes=minutes,
            device=device,
            workers=cores - 1 if gpu else 0,  # one core cannot feed a GPU; without a GPU the cores are busy training
        )
        record = Record(settings, result, machine()["processor"], {file.sha256: file.package for file in training})
        path = folder / f"{settings.student}.safetensors"
        write_bytes(path.with_suffix(".json"), msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        write_bytes(path.with_suffix(".md"), weights_card(record).encode())
    state = "finished" if result.finished else f"{result.crops / settings.crops:.0%} done, run again to continue"
    return f"{path}: agrees with the teacher on {result.agreement:.1%} of held-out crops; {state}"
