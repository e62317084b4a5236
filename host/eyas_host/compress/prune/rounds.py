"""Iterative channel pruning to a latency target, each round followed by recovery through distillation.

The goals of the rounds are a geometric series from the dense latency to the target: each round saves the same fraction
of what is left. The plan so far and the weights are saved after every cut and every recovery, so that a killed run
resumes there and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from eyas_host.compress.prune.channels import MAX_PRUNED, channel_groups, least_important_cuts
from eyas_host.compress.prune.importance import Step, cheapest_cuts, taylor_importance
from eyas_host.compress.prune.latency_model import LatencyModel, layer_shapes
from eyas_host.compress.prune.magnitude import count_costs
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.models.pruned import Cut, cut_channels
from eyas_host.models.weights import UNREADABLE
from eyas_host.support.errors import CompressError
from eyas_host.support.progress import say
from eyas_host.train.checkpoint import discard_checkpoint, read_checkpoint, save_tensors
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import DistillationTask

TOLERANCE = 0.03
"""A network at most this fraction below the goal is accepted."""
_AIM = 0.01
"""Fraction below the goal that a corrected prediction aims at."""
_TRIES = 6
_VIEWS = 320
"""Training views that channel importance is estimated on."""

MeasureFraction = Callable[[PixelClassifier], float]
"""Latency of a network as a fraction of the dense one's, both measured in the same minute."""


class FrontPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One network on the accuracy-latency front."""

    round: int
    """0: the dense student."""
    predicted_ms: float
    measured_ms: float | None
    """None: only predicted, from a table measured elsewhere."""
    fraction: float
    """Fraction of the dense latency: measured where it was, else predicted."""
    macs: float
    """Multiply-accumulates per image."""
    balanced_accuracy: float | None = None
    """On validation, after recovery."""
    auc: float | None = None


class _State(msgspec.Struct, frozen=True):
    """State of a round besides its weights."""

    cuts: tuple[Cut, ...] = ()
    """All cuts so far, in terms of the dense network."""
    correction: float = 1.0
    """Measured / predicted latency fraction."""
    front: tuple[FrontPoint, ...] = ()
    history: tuple[Epoch, ...] = ()
    """Epochs of the round's recovery."""


class _Network(NamedTuple):
    """A network on the training device, in evaluation mode, and the state of its round."""

    model: PixelClassifier
    state: _State


@dataclass(frozen=True)
class PruningResult:
    """A network that meets its target."""

    model: PixelClassifier
    cuts: tuple[Cut, ...]
    front: tuple[FrontPoint, ...]
    history: tuple[Epoch, ...]
    """Epochs of the last recovery."""


@dataclass(frozen=True)
class SearchResult:
    """The step chosen for a goal; latencies are fractions of the dense one."""

    step: Step
    predicted: float
    measured: float | None
    correction: float


class IterativePruner:
    """Prunes `student` to at most `fraction` of its dense latency, with recovery after each round.

    Without `measure` the predicted latency decides. The last round recovers for `[prune] epochs`. `*.ckpt` in
    `folder` may be removed once the result is stored.
    """

    def __init__(
        self,
        student: PixelClassifier,
        task: DistillationTask,
        latency: LatencyModel,
        fraction: float,
        *,
        folder: Path,
        measure: MeasureFraction | None,
    ) -> None:
        self.student, self.task, self.latency, self.fraction = student, task, latency, fraction
        self.settings, self.folder, self.measure = task.recipe.prune, folder, measure
        self.size = task.recipe.image.size
        self.dense = layer_shapes(student, size=self.size)

    def run(self) -> PruningResult:
        """Run all rounds that are not finished yet. Raises `CompressError` if the target cannot be reached."""
        network = self._load(self._file(0)) or self._dense(self._file(0))
        rounds = self.settings.rounds
        for number in range(1, rounds + 1):
            cut, done = self._file(number, "-cut"), self._file(number)
            network = self._load(done) or self._recover(
                number, self._load(cut) or self._cut(number, network, cut), done
            )
            say(f"  pruning, round {number} of {rounds}: {_summary(network.state.front[-1])}")
        model, state = network
        return PruningResult(model, state.cuts, state.front, state.history)

    def _dense(self, path: Path) -> _Network:
        """The student as it is, evaluated."""
        dense_ms = self.latency.dense_ms
        point = FrontPoint(
            round=0,
            predicted_ms=dense_ms,
            measured_ms=None if self.measure is None else dense_ms,
            fraction=1.0,
            macs=self._macs(self.student),
        )
        return self._save(path, self.student, _State(front=(self._evaluated(point, self.student),)))

    def _cut(self, number: int, before: _Network, path: Path) -> _Network:
        """Cut the previous round's network down to this round's goal."""
        model, state = before
        last, dense_ms = number == self.settings.rounds, self.latency.dense_ms
        widths = {name: int(count) for name, count in zip(self.dense.names, self.dense.outputs, strict=True)}
        groups = channel_groups(model, size=self.size, dense=widths)
        importance = taylor_importance(model, groups, self._batch_losses(model, number))
        model = model.cpu()
        steps = list(cheapest_cuts(groups, importance, layer_shapes(model, size=self.size), self.latency))
        check_floor(steps, self.fraction, dense_ms, correction=state.correction, exact=self.measure is None)

        def cuts_of(step: Step) -> list[Cut]:
            return least_important_cuts(groups, importance, step.kept)

        def measured(step: Step) -> float:
            assert self.measure is not None
            return self.measure(cut_channels(model, cuts_of(step), size=self.size))

        reached = search_step(
            steps,
            self.fraction ** (number / self.settings.rounds),
            dense_ms,
            correction=state.correction,
            measure=None if self.measure is None else measured,
            exact=last,
        )
        smaller = cut_channels(model, cuts_of(reached.step), size=self.size)
        point = FrontPoint(
            round=number,
            predicted_ms=reached.predicted * dense_ms,
            measured_ms=None if reached.measured is None else reached.measured * dense_ms,
            fraction=reached.predicted if reached.measured is None else reached.measured,
            macs=self._macs(smaller),
        )
        cuts = (*state.cuts, *cuts_of(reached.step))
        return self._save(path, smaller, _State(cuts, reached.correction, (*state.front, point)))

    def _recover(self, number: int, cut: _Network, done: Path) -> _Network:
        """Fine-tune the pruned network by distillation."""
        model, state = cut
        rounds, settings = self.settings.rounds, self.settings
        epochs = settings.epochs if number == rounds else settings.round_epochs
        history: list[Epoch] = []
        if epochs:
            history = self.task.train(
                model,
                epochs=epochs,
                rate=settings.rate,
                ema=self.task.recipe.student.ema,
                checkpoint=self._file(number, "-recovery"),
                title=f"pruned student, round {number} of {rounds}",
                keep_start=True,
            )
        front = (*state.front[:-1], self._evaluated(state.front[-1], model))
        return self._save(done, model, msgspec.structs.replace(state, front=front, history=tuple(history)))

    def _batch_losses(self, model: PixelClassifier, number: int) -> Iterator[Tensor]:
        """The distillation loss of one batch after the other, on about `_VIEWS` training views."""
        batches = self.task.batches(number)
        for batch in islice(batches, -(-_VIEWS // self.task.recipe.student.batch)):
            yield self.task.loss(model(batch.pixels.float()), batch.logits, batch.labels)

    def _evaluated(self, point: FrontPoint, model: PixelClassifier) -> FrontPoint:
        """The point with the accuracy on validation."""
        figures = self.task.evaluate(move(model, self.task.device))
        return msgspec.structs.replace(point, balanced_accuracy=figures["balanced_accuracy"], auc=figures["auc"])

    def _macs(self, model: PixelClassifier) -> float:
        return count_costs(model, size=self.size)[0]

    def _file(self, number: int, suffix: str = "") -> Path:
        return self.folder / f"round-{number}{suffix}.ckpt"

    def _save(self, path: Path, model: PixelClassifier, state: _State) -> _Network:
        """Write the network; returns it as a resumed run would load it."""
        saved = {"model": model.state_dict(), "state": msgspec.json.encode(state)}
        save_tensors(path, saved)
        return self._rebuilt(saved)

    def _load(self, path: Path) -> _Network | None:
        """The network of a file; None if it is missing or damaged."""
        saved = read_checkpoint(path)
        if saved is None:
            return None
        try:
            return self._rebuilt(saved)
        except UNREADABLE as error:
            discard_checkpoint(path, error)
            return None

    def _rebuilt(self, saved: Mapping[str, Any]) -> _Network:
        """The network on the training device, in evaluation mode, and the state of its round."""
        state = msgspec.json.decode(saved["state"], type=_State)
        model = cut_channels(self.student, state.cuts, size=self.size)
        model.load_state_dict(saved["model"])
        return _Network(move(model, self.task.device), state)


def search_step(
    steps: Sequence[Step],
    goal: float,
    dense_ms: float,
    *,
    correction: float = 1.0,
    measure: Callable[[Step], float] | None = None,
    exact: bool = True,
) -> SearchResult:
    """The first of `steps` (in order of falling latency) that takes at most `goal`, a fraction of the dense latency.

    With `measure` the loop is closed: each measurement corrects the prediction, and the search moves on or back until
    a network is at most `TOLERANCE` below the goal, or the next larger one would miss it. Unless `exact`, the first
    try is accepted as it is. Raises `CompressError` if no step reaches the goal.
    """
    predicted = [step.ms / dense_ms for step in steps]
    above, below = -1, len(steps)
    measured: dict[int, float] = {}
    wanted = goal / correction
    while below - above > 1 and len(measured) < _TRIES:
        first = next((index for index, fraction in enumerate(predicted) if fraction <= wanted), len(steps) - 1)
        index = min(max(first, above + 1), below - 1)
        if measure is None:
            check_floor(steps, goal, dense_ms, correction=correction, exact=True)
            return SearchResult(steps[index], predicted[index], None, correction)
        measured[index] = measure(steps[index])
        correction = measured[index] / predicted[index]
        if not exact or goal * (1 - TOLERANCE) <= measured[index] <= goal:
            return SearchResult(steps[index], predicted[index], measured[index], correction)
        above, below = (index, below) if measured[index] > goal else (above, index)
        wanted = goal * (1 - _AIM) / correction
    if above == len(steps) - 1:
        raise CompressError(_below_floor(goal, measured[above], dense_ms))
    if below == len(steps):
        raise CompressError(
            f"[prune] target = 'latency': not reached in {_TRIES} measured attempts; the last one took "
            f"{measured[above]:.2f} of the dense latency, {goal:.2f} was asked for; measure on a quieter machine"
        )
    return SearchResult(steps[below], predicted[below], measured[below], measured[below] / predicted[below])


def check_floor(steps: Sequence[Step], fraction: float, dense_ms: float, *, correction: float, exact: bool) -> None:
    """Raise `CompressError` if even the last step does not reach `fraction` of the dense latency.

    A prediction that is yet to be measured (not `exact`) must miss it by a clear margin.
    """
    floor = correction * steps[-1].ms / dense_ms
    if floor * (1.0 if exact else 1 - 2 * TOLERANCE) > fraction:
        raise CompressError(_below_floor(fraction, floor, dense_ms))


def _below_floor(fraction: float, floor: float, dense_ms: float) -> str:
    return (
        f"[prune] target = 'latency': {fraction * dense_ms:.3f} ms ({fraction:.2f} of the dense student's "
        f"{dense_ms:.3f}) is out of reach: {floor * dense_ms:.3f} ms ({floor:.2f}) is left with {MAX_PRUNED:.0%} of "
        "every layer's channels removed; allow more time, or take a smaller [student] model or [image] size"
    )


def _summary(point: FrontPoint) -> str:
    """`0.43 ms measured, 0.50 of the dense latency, balanced accuracy 0.871`."""
    latency = (
        f"{point.predicted_ms:.3f} ms predicted"
        if point.measured_ms is None
        else f"{point.measured_ms:.3f} ms measured"
    )
    return f"{latency}, {point.fraction:.2f} of the dense latency, balanced accuracy {point.balanced_accuracy:.3f}"
