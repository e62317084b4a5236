"""The training loop: epochs with a schedule, the best weights kept, and a checkpoint after each to go on from.

Everything random in an epoch is seeded by (seed, epoch), so a run that was killed and resumed ends with the same
numbers as one that was not.
"""

from __future__ import annotations

import copy
import io
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from eyas_host.data.views import Batch
from eyas_host.errors import TrainError
from eyas_host.files import write_bytes
from eyas_host.progress import meter
from eyas_host.train.metrics import Floats, Ints, auc, softmax

Groups = list[dict[str, Any]]
"""AdamW parameter groups; `lr_scale` multiplies the rate (timm's name for it)."""


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """How long and how fast to train."""

    epochs: int
    rate: float
    weight_decay: float = 0.02
    warmup: float = 0.1
    """Part of the steps in which the rate rises from zero; a cosine to zero follows."""
    patience: int | None = None
    """Stop after this many epochs without a better validation."""
    ema: float = 0.0
    """Decay of the moving average of the weights that is evaluated and kept (0: none)."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    seed: int = 0


class Epoch(msgspec.Struct, frozen=True):
    """What one epoch gave."""

    epoch: int
    loss: float
    seconds: float
    metrics: dict[str, float]


def fit(
    model: nn.Module,
    groups: Groups,
    *,
    steps: Callable[[int], Iterable[Tensor]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    schedule: Schedule,
    steps_an_epoch: int,
    checkpoint: Path,
    title: str,
    prepare: Callable[[nn.Module], object] = nn.Module.train,
    after_step: Callable[[], None] | None = None,
    beside: nn.Module | None = None,
) -> list[Epoch]:
    """Train `model` and leave the best weights in it.

    `steps(epoch)` yields the loss of each batch; `evaluate` returns figures of which `objective` chooses the best
    epoch; `prepare` puts the model into its training mode before each epoch. What `groups` holds besides the model is
    `beside` it, and goes into the checkpoint too. With a checkpoint on disk, training goes on behind its last epoch.
    Raises `TrainError` when a loss is not a number.
    """
    for group in groups:
        group["lr"] = schedule.rate * group.get("lr_scale", 1.0)
    optimizer = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay)
    ema = ModelEmaV3(model, decay=schedule.ema, use_warmup=True) if schedule.ema else None
    history: list[Epoch] = []
    best = -math.inf
    best_state: dict[str, Tensor] = {}
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if beside is not None:
            beside.load_state_dict(saved["beside"])
        if ema is not None:
            ema.module.load_state_dict(saved["ema"])
        history = [msgspec.json.decode(line, type=Epoch) for line in saved["history"]]
        best, best_state = saved["best"], saved["best_state"]
    total = schedule.epochs * steps_an_epoch
    with meter(title, total, done=len(history) * steps_an_epoch) as bar:
        for epoch in range(len(history), schedule.epochs):
            if _out_of_patience(history, schedule.patience):
                break
            started = time.monotonic()
            torch.manual_seed(schedule.seed * 100_003 + epoch)
            prepare(model)
            losses = []
            for number, loss in enumerate(steps(epoch)):
                step = epoch * steps_an_epoch + number
                factor = rate_factor(step, total, schedule.warmup)
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate * group.get("lr_scale", 1.0) * factor
                losses.append(
                    _step(model, optimizer, loss, schedule, where=f"{title}, epoch {epoch + 1}, step {number + 1}")
                )
                if after_step is not None:
                    after_step()
                if ema is not None:
                    ema.update(model, step=step)
                bar.advance(f"loss {np.mean(losses):.3f}  " + _words(history))
            kept = ema.module if ema is not None else model
            kept.eval()
            figures = evaluate(kept)
            history.append(Epoch(epoch + 1, float(np.mean(losses)), time.monotonic() - started, figures))
            if figures["objective"] > best:
                best, best_state = figures["objective"], copy.deepcopy(kept.state_dict())
            save_tensors(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "beside": beside.state_dict() if beside is not None else {},
                    "ema": ema.module.state_dict() if ema is not None else {},
                    "history": [msgspec.json.encode(e) for e in history],
                    "best": best,
                    "best_state": best_state,
                },
            )
    if best_state:
        model.load_state_dict(best_state)
    model.eval()
    return history


def save_tensors(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values to a file that `torch.load(weights_only=True)` reads, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_bytes(path, buffer.getvalue())


def rate_factor(step: int, total: int, warmup: float) -> float:
    """Linear rise over the first part of the steps, then half a cosine to zero; 0..1."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, schedule: Schedule, *, where: str) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainError(f"{where}: the loss is {value}; a lower rate or a longer warm-up usually helps")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], schedule.clip)
    optimizer.step()
    return value


def _out_of_patience(history: list[Epoch], patience: int | None) -> bool:
    if patience is None or not history:
        return False
    values = [e.metrics["objective"] for e in history]
    return len(values) - 1 - int(np.argmax(values)) >= patience


def _words(history: list[Epoch]) -> str:
    if not history:
        return ""
    figures: Mapping[str, float] = history[-1].metrics
    return f"balanced accuracy {figures['balanced_accuracy']:.3f}  AUC {figures['auc']:.3f}"


def to_tensor(pixels: Batch, device: torch.device) -> Tensor:
    """uint8 [n, s, s, 3] pixels as a uint8 [n, 3, s, s] tensor (channels last in memory)."""
    return torch.from_numpy(pixels).to(device, non_blocking=True).permute(0, 3, 1, 2)


@torch.inference_mode()
def logits_of(
    model: nn.Module, pixels: Batch, device: torch.device, batch: int = 64
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits float32 [n, classes] of prepared pixels uint8 [n, s, s, 3]; the model is put into evaluation mode."""
    model.eval()
    parts = [model(to_tensor(pixels[i : i + batch], device).float()) for i in range(0, len(pixels), batch)]
    return np.asarray(torch.cat(parts).float().cpu().numpy())


def validation_figures(logits: Floats, targets: Ints) -> dict[str, float]:
    """What an epoch is judged by: balanced accuracy, with the AUC deciding between near-equals."""
    p = softmax(logits)
    answers = p.argmax(axis=1)
    balanced = float(np.mean([(answers[targets == c] == c).mean() for c in np.unique(targets)]))
    area = auc(p, targets)
    loss = float(-np.log(np.maximum(p[np.arange(len(targets)), targets], 1e-12)).mean())
    objective = balanced + (0.5 * area if math.isfinite(area) else 0.0)
    return {"objective": objective, "balanced_accuracy": balanced, "auc": area, "loss": loss}


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda` or `cpu` as a torch device. Raises `TrainError` where no GPU is to be had."""
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainError("[run] device = 'cuda', but torch sees no GPU here; take 'auto' or 'cpu'")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def end_with_parent(seconds: float = 2.0) -> None:
    """Make this child process end soon after its parent did, however that one ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        while parent.is_alive():
            time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
