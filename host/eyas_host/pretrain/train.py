"""A student's warm start: ImageNet teachers, asked about crops of free images.

The student follows the teachers' 1,000 probabilities on strong crops, the same view for both, on a long schedule.
Sources: Asano & Saeed, "Extrapolating from a single image to a thousand classes using distillation", 2021; Beyer et
al., "Knowledge distillation: a good teacher is patient and consistent", 2022.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from eyas_device.preprocess import Pixels
from eyas_host.evaluation.inference import logits_of, pick_device, to_tensor
from eyas_host.models.factory import PACKAGED, build, known_model, move
from eyas_host.pretrain.crops import Crops
from eyas_host.pretrain.teachers import CLASSES, answers_of
from eyas_host.support.errors import RecipeError, WeightsError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say
from eyas_host.train.engine import fit
from eyas_host.train.losses import DistillationLoss, mean_divergence
from eyas_host.train.schedule import Epoch, Schedule

_EPOCH = 6_400
"""Crops between two looks at the held-out images; a training pauses there."""
_LOOKS = 10
"""It is looked at so often at least."""
_LOOK = 512
"""Crops of held-out images by which it is judged."""
_SETTINGS = "settings.json"


class PretrainSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that decides what a warm start becomes."""

    student: str = "mobilenetv3_small_100"
    teachers: tuple[str, ...] = ("tf_efficientnet_lite0",)
    crops: int = 2_000_000
    """Of the whole training."""
    size: int = 96
    """Side of a crop, pixels."""
    last_size: int = 128
    """The same at the end, and of the crops that the network is judged by."""
    last: float = 0.2
    """Part of the training that is its end."""
    batch: int = 64
    rate: float = 3e-3
    weight_decay: float = 0.02
    temperature: float = 3.0
    cutmix: float = 0.5
    """Part of the batches in which a patch of each crop comes from another one."""
    ema: float = 0.999
    seed: int = 0
    images: str = ""
    """Fingerprint of the images that are learned from."""


def usual_last_size(size: int) -> int:
    """The side of the last crops where nobody says another: a third more."""
    return size * 4 // 3


class PretrainResult(msgspec.Struct, frozen=True):
    """How far a warm start has come."""

    crops: int
    """Seen so far."""
    seconds: float
    """Of training so far."""
    agreement: float
    """Part of the held-out crops for which student and teachers name the same of 1,000 classes."""
    divergence: float
    """Mean KL(teachers || student) on them, nats."""
    held_out: int
    """Those crops."""
    finished: bool


class _PauseError(Exception):
    """The time that was given is used up."""


def pretrain(
    settings: PretrainSettings,
    images: Sequence[Pixels],
    held_out: Sequence[Pixels],
    folder: Path,
    *,
    minutes: float | None = None,
    device: str = "auto",
    workers: int = 0,
) -> PretrainResult:
    """Train, or go on training, in `folder` for at most so many minutes; `NETWORK.safetensors` is where it stands.

    The last weights are kept, not those that answer best on the held-out images: a start is as good as its rate has
    fallen, and so few images cannot tell one epoch from the next.

    Raises as `begin` does.
    """
    begin(settings, folder)
    where = pick_device(device)
    teachers = answers_of(settings.teachers, where)
    torch.manual_seed(settings.seed)
    student = move(build(settings.student, CLASSES, "random")[0], where)
    unseen = Crops(held_out, size=settings.last_size, count=_LOOK, seed=settings.seed + 1)
    look = np.stack([unseen[number] for number in range(_LOOK)])
    pieces = torch.split(to_tensor(look, where), settings.batch)
    wanted = torch.cat([teachers(some) for some in pieces]).cpu()
    follow = DistillationLoss(kd_ratio=1.0, temperature=settings.temperature)
    labels = torch.zeros(settings.batch, dtype=torch.int64, device=where)  # the loss wants some and ignores them
    steps_per_epoch = max(1, min(_EPOCH, settings.crops // _LOOKS) // settings.batch)
    epochs = max(1, round(settings.crops / (steps_per_epoch * settings.batch)))
    an_epoch = steps_per_epoch * settings.batch
    small, large = (
        Crops(images, size=size, count=epochs * an_epoch, seed=settings.seed)
        for size in (settings.size, settings.last_size)
    )
    until = None if minutes is None else time.monotonic() + 60 * minutes

    def steps(epoch: int) -> Iterator[Tensor]:
        drawn = small if epoch < epochs * (1 - settings.last) else large
        part = Subset(drawn, range(epoch * an_epoch, (epoch + 1) * an_epoch))
        for number, batch in enumerate(DataLoader(part, settings.batch, num_workers=workers)):
            pixels = batch.to(where).permute(0, 3, 1, 2).float()
            pixels = _cut_and_mix(pixels, settings, epoch * steps_per_epoch + number)
            yield follow(student(pixels), teachers(pixels), labels)

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        logits = torch.from_numpy(logits_of(candidate, look, where))
        agreement = float((logits.argmax(1) == wanted.argmax(1)).double().mean())
        return {"combined": -mean_divergence(logits, wanted), "agreement": agreement}

    def pause(history: Sequence[Epoch]) -> str:
        if until is not None and history and time.monotonic() > until:
            raise _PauseError
        return "warm start"

    checkpoint = folder / "warm.ckpt"
    with contextlib.suppress(_PauseError):
        fit(
            student,
            [{"params": list(student.parameters())}],
            steps=steps,
            evaluate=evaluate,
            schedule=Schedule(
                epochs=epochs,
                rate=settings.rate,
                weight_decay=settings.weight_decay,
                warmup=0.02,
                ema=settings.ema,
                seed=settings.seed,
            ),
            steps_per_epoch=steps_per_epoch,
            checkpoint=checkpoint,
            title=f"warm start of {settings.student}",
            stages=pause,
        )
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    history = [msgspec.json.decode(line, type=Epoch) for line in saved["history"]]
    _write(saved["ema"] if settings.ema else saved["model"], folder / f"{settings.student}.safetensors")
    result = PretrainResult(
        crops=len(history) * an_epoch,
        seconds=sum(epoch.seconds for epoch in history),
        agreement=history[-1].metrics["agreement"],
        divergence=-history[-1].metrics["combined"],
        held_out=len(look),
        finished=len(history) == epochs,
    )
    if not result.finished:
        say(f"  paused after {result.crops:,} of {settings.crops:,} crops; the same command goes on")
    return result


def _cut_and_mix(pixels: Tensor, settings: PretrainSettings, step: int) -> Tensor:
    """In some batches, a patch of each crop from its neighbour (Yun et al., "CutMix", 2019)."""
    rng = np.random.default_rng((settings.seed, 1, step))
    if rng.random() >= settings.cutmix:
        return pixels
    side = round(pixels.shape[-1] * float(rng.uniform()) ** 0.5)
    top, left = rng.integers(pixels.shape[-1] - side + 1, size=2)
    mixed = pixels.clone()
    mixed[:, :, top : top + side, left : left + side] = pixels.roll(1, 0)[:, :, top : top + side, left : left + side]
    return mixed


def begin(settings: PretrainSettings, folder: Path) -> None:
    """Note the settings in the folder, or compare them with those that are there.

    Raises `RecipeError` for a student that timm does not have, `WeightsError` for a teacher without packaged weights
    and for a folder that holds a training with other settings.
    """
    if not known_model(settings.student):
        raise RecipeError(f"student {settings.student!r}: timm has no such network")
    for name in settings.teachers:
        if name not in PACKAGED:
            raise WeightsError(f"teacher {name!r}: no packaged ImageNet weights; there are: {', '.join(PACKAGED)}")
    path = folder / _SETTINGS
    if not path.exists():
        write_bytes(path, msgspec.json.format(msgspec.json.encode(settings), indent=1))
        return
    try:
        before = msgspec.json.decode(path.read_bytes(), type=PretrainSettings)
    except msgspec.DecodeError as error:
        raise WeightsError(f"{path}: cannot be read ({error}); take another folder") from None
    other = [key for key in PretrainSettings.__struct_fields__ if getattr(before, key) != getattr(settings, key)]
    if other:
        told = ", ".join(f"{key} = {getattr(before, key)!r}" for key in other)
        raise WeightsError(f"{folder}: a warm start with {told} is there; take the same, or another folder")


def _write(state: dict[str, Tensor], path: Path) -> None:
    """The network as fp16, with the normalisation that it was trained behind: what `weights_file` takes."""
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    normalisation = {key: state[key] for key in ("mean", "std")}
    write_bytes(path, safetensors.torch.save({k: v.contiguous() for k, v in (halves | normalisation).items()}))


def fingerprint(hashes: Sequence[str]) -> str:
    """One hash of the images' hashes."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()[:16]
