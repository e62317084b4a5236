"""Pretraining of a student: distillation of ImageNet teachers on crops of free images.

The student matches the teachers' 1,000 probabilities on strong crops, with the same view for both and a long schedule.
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
from eyas_host.pretrain.teachers import CLASSES, compiled_teachers
from eyas_host.support.errors import RecipeError, WeightsError
from eyas_host.support.files import write_bytes
from eyas_host.support.progress import say
from eyas_host.train.engine import fit
from eyas_host.train.losses import DistillationLoss, mean_divergence
from eyas_host.train.schedule import Epoch, Schedule

_CROPS_PER_EPOCH = 6_400
"""Crops between two evaluations on the held-out images, where a training can pause."""
_MIN_EPOCHS = 10
"""Minimum number of evaluations."""
_VALIDATION_CROPS = 512
"""Crops of held-out images for evaluation."""
_SETTINGS = "settings.json"


class PretrainSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings that determine the pretrained weights."""

    student: str = "mobilenetv3_small_100"
    teachers: tuple[str, ...] = ("tf_efficientnet_lite0",)
    crops: int = 2_000_000
    """Crops of the entire training."""
    size: int = 96
    """Side of a crop, pixels."""
    last_size: int = 128
    """Side at the end of the training and in evaluation, pixels."""
    last: float = 0.2
    """Fraction of the training with `last_size`."""
    batch: int = 64
    rate: float = 3e-3
    weight_decay: float = 0.02
    temperature: float = 3.0
    cutmix: float = 0.5
    """Fraction of the batches with CutMix."""
    ema: float = 0.999
    seed: int = 0
    images: str = ""
    """Fingerprint of the training images."""


def default_last_size(size: int) -> int:
    """Default of `last_size`: a third larger than `size`."""
    return size * 4 // 3


class PretrainResult(msgspec.Struct, frozen=True):
    """Progress and quality of a pretraining."""

    crops: int
    """Crops so far."""
    seconds: float
    """Training time so far."""
    agreement: float
    """Fraction of the held-out crops for which student and teachers predict the same of 1,000 classes."""
    divergence: float
    """Mean KL(teachers || student) on them, nats."""
    held_out: int
    """Number of held-out crops."""
    finished: bool


class _PauseError(Exception):
    """The time limit is reached."""


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
    """Train, or resume training, in `folder` for at most `minutes`; writes `NETWORK.safetensors`.

    The last weights are kept, not the best ones on the held-out images: quality follows the decay of the learning rate,
    and so few images cannot rank epochs. Raises as `check_settings` does.
    """
    check_settings(settings, folder)
    where = pick_device(device)
    teachers = compiled_teachers(settings.teachers, where)
    torch.manual_seed(settings.seed)
    student = move(build(settings.student, CLASSES, "random")[0], where)
    unseen = Crops(held_out, size=settings.last_size, count=_VALIDATION_CROPS, seed=settings.seed + 1)
    look = np.stack([unseen[number] for number in range(_VALIDATION_CROPS)])
    pieces = torch.split(to_tensor(look, where), settings.batch)
    wanted = torch.cat([teachers(some) for some in pieces]).cpu()
    follow = DistillationLoss(kd_ratio=1.0, temperature=settings.temperature)
    labels = torch.zeros(settings.batch, dtype=torch.int64, device=where)  # required by the loss, which ignores them
    steps_per_epoch = max(1, min(_CROPS_PER_EPOCH, settings.crops // _MIN_EPOCHS) // settings.batch)
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
            pixels = _cutmix(pixels, settings, epoch * steps_per_epoch + number)
            yield follow(student(pixels), teachers(pixels), labels)

    def evaluate(candidate: nn.Module) -> dict[str, float]:
        logits = torch.from_numpy(logits_of(candidate, look, where))
        agreement = float((logits.argmax(1) == wanted.argmax(1)).double().mean())
        return {"combined": -mean_divergence(logits, wanted), "agreement": agreement}

    def pause(history: Sequence[Epoch]) -> str:
        if until is not None and history and time.monotonic() > until:
            raise _PauseError
        return "pretraining"

    checkpoint = folder / "pretrain.ckpt"
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
            title=f"pretraining {settings.student}",
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
        say(f"  paused after {result.crops:,} of {settings.crops:,} crops; the same command continues")
    return result


def _cutmix(pixels: Tensor, settings: PretrainSettings, step: int) -> Tensor:
    """In some batches, a patch of each crop from its neighbour (Yun et al., "CutMix", 2019)."""
    rng = np.random.default_rng((settings.seed, 1, step))
    if rng.random() >= settings.cutmix:
        return pixels
    side = round(pixels.shape[-1] * float(rng.uniform()) ** 0.5)
    top, left = rng.integers(pixels.shape[-1] - side + 1, size=2)
    mixed = pixels.clone()
    mixed[:, :, top : top + side, left : left + side] = pixels.roll(1, 0)[:, :, top : top + side, left : left + side]
    return mixed


def check_settings(settings: PretrainSettings, folder: Path) -> None:
    """Store the settings in the folder, or compare them with the stored ones.

    Raises `RecipeError` for a student unknown to timm, `WeightsError` for a teacher without packaged weights and for a
    folder of a training with other settings.
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
        listed = ", ".join(f"{key} = {getattr(before, key)!r}" for key in other)
        raise WeightsError(f"{folder}: holds a pretraining with {listed}; use the same settings or another folder")


def _write(state: dict[str, Tensor], path: Path) -> None:
    """Write the network as fp16 with its normalisation, in the format of `weights_file`."""
    halves = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    normalisation = {key: state[key] for key in ("mean", "std")}
    write_bytes(path, safetensors.torch.save({k: v.contiguous() for k, v in (halves | normalisation).items()}))


def fingerprint(hashes: Sequence[str]) -> str:
    """One hash of the images' hashes."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()[:16]
