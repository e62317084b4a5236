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
from timm.optim import param_groups_weight_decay
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
from eyas_host.train.engine import Hooks, Plan, fit
from eyas_host.train.losses import SoftLoss, mean_divergence
from eyas_host.train.schedule import Epoch, Schedule

_CROPS_PER_EPOCH = 6_400
"""Crops between two evaluations on the held-out images, where a training can pause."""
_MIN_EPOCHS = 10
"""Minimum number of evaluations."""
_VALIDATION_CROPS = 512
"""Crops of held-out images for evaluation."""
_SAVE_MINUTES = 5.0
"""Minutes between checkpoints inside an epoch."""
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


class _PretrainTask:
    """Crops with the teachers' predictions, and evaluation on crops of held-out images."""

    def __init__(
        self,
        settings: PretrainSettings,
        images: Sequence[Pixels],
        held_out: Sequence[Pixels],
        *,
        device: str,
        workers: int,
    ) -> None:
        self.settings = settings
        self.device = pick_device(device)
        self.workers = workers
        self.teachers = compiled_teachers(settings.teachers, self.device)
        self.loss = SoftLoss(temperature=settings.temperature)
        steps = max(1, min(_CROPS_PER_EPOCH, settings.crops // _MIN_EPOCHS) // settings.batch)
        self.crops_per_epoch = steps * settings.batch
        self.epochs = max(1, round(settings.crops / self.crops_per_epoch))
        self.small, self.large = (
            Crops(images, size=size, count=self.epochs * self.crops_per_epoch, seed=settings.seed)
            for size in (settings.size, settings.last_size)
        )
        unseen = Crops(held_out, size=settings.last_size, count=_VALIDATION_CROPS, seed=settings.seed + 1)
        self.validation = np.stack([unseen[number] for number in range(_VALIDATION_CROPS)])
        batches = torch.split(to_tensor(self.validation, self.device), settings.batch)
        self.reference = torch.cat([self.teachers(batch) for batch in batches]).cpu()

    def steps(self, student: nn.Module, epoch: int, first: int) -> Iterator[Tensor]:
        """The loss of each batch of an epoch from `first` on."""
        settings, start = self.settings, epoch * self.crops_per_epoch
        crops = self.small if epoch < self.epochs * (1 - settings.last) else self.large
        rest = Subset(crops, range(start + first * settings.batch, start + self.crops_per_epoch))
        loader = DataLoader(rest, settings.batch, num_workers=self.workers, pin_memory=self.device.type == "cuda")
        for number, batch in enumerate(loader, start // settings.batch + first):
            pixels = batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float()
            pixels = _cutmix(pixels, settings, number)
            yield self.loss(student(pixels), self.teachers(pixels))

    def evaluate(self, candidate: nn.Module) -> dict[str, float]:
        """Agreement with the teachers, and the negative divergence from them, on the held-out crops."""
        logits = torch.from_numpy(logits_of(candidate, self.validation, self.device))
        agreement = float((logits.argmax(1) == self.reference.argmax(1)).double().mean())
        return {"combined": -mean_divergence(logits, self.reference), "agreement": agreement}


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
    task = _PretrainTask(settings, images, held_out, device=device, workers=workers)
    until = None if minutes is None else time.monotonic() + 60 * minutes

    def pause(history: Sequence[Epoch]) -> str:
        if until is not None and history and time.monotonic() > until:
            raise _PauseError
        return "pretraining"

    plan = _plan(task, folder)
    torch.manual_seed(settings.seed)
    student = move(build(settings.student, CLASSES, "random")[0], task.device)
    with contextlib.suppress(_PauseError):
        fit(
            student,
            param_groups_weight_decay(student, settings.weight_decay),
            plan,
            steps=lambda epoch, first: task.steps(student, epoch, first),
            evaluate=task.evaluate,
            hooks=Hooks(stages=pause),
        )
    saved = torch.load(plan.checkpoint, map_location="cpu", weights_only=True)
    history = [msgspec.json.decode(line, type=Epoch) for line in saved["history"]]
    _write(saved["ema"] if settings.ema else saved["model"], folder / f"{settings.student}.safetensors")
    result = PretrainResult(
        crops=len(history) * task.crops_per_epoch,
        seconds=sum(epoch.seconds for epoch in history),
        agreement=history[-1].metrics["agreement"],
        divergence=-history[-1].metrics["combined"],
        held_out=len(task.validation),
        finished=len(history) == task.epochs,
    )
    if not result.finished:
        say(f"  paused after {result.crops:,} of {settings.crops:,} crops; the same command continues")
    return result


def _plan(task: _PretrainTask, folder: Path) -> Plan:
    settings = task.settings
    return Plan(
        title=f"pretraining {settings.student}",
        schedule=Schedule(
            epochs=task.epochs,
            rate=settings.rate,
            weight_decay=settings.weight_decay,
            warmup=0.02,
            ema=settings.ema,
            save_minutes=_SAVE_MINUTES,
            seed=settings.seed,
        ),
        images=task.crops_per_epoch,
        batch=settings.batch,
        checkpoint=folder / "pretrain.ckpt",
    )


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


def check_models(settings: PretrainSettings) -> None:
    """Raise `RecipeError` for a student unknown to timm, and `WeightsError` for a teacher without packaged weights."""
    if not known_model(settings.student):
        raise RecipeError(f"student {settings.student!r}: timm has no such network")
    for name in settings.teachers:
        if name not in PACKAGED:
            raise WeightsError(f"teacher {name!r}: no packaged ImageNet weights; there are: {', '.join(PACKAGED)}")


def check_settings(settings: PretrainSettings, folder: Path) -> None:
    """Store the settings in the folder, or compare them with the stored ones.

    Raises as `check_models` does, and `WeightsError` for a folder of a training with other settings.
    """
    check_models(settings)
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
