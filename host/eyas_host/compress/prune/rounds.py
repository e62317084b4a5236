"""Channels cut in rounds to a latency, each round followed by recovery with the teacher's answers.

The goals of the rounds are a geometric series from the dense network's time to the target: each round saves the same
part of what is left. The plan so far and the weights are kept in the stage's folder after each cut and each recovery,
so that a killed run goes on from there and ends with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from eyas_host.compress.prune.channels import MAX_PRUNED, channel_groups, least_important
from eyas_host.compress.prune.importance import Step, channel_losses, cheapest_cuts
from eyas_host.compress.prune.latency_model import LatencyModel, layers_of
from eyas_host.compress.prune.magnitude import count_costs
from eyas_host.models.factory import PixelClassifier, move
from eyas_host.models.pruned import Cut, cut_channels
from eyas_host.recipe.compress import PruneSection
from eyas_host.support.errors import CompressError
from eyas_host.support.progress import say
from eyas_host.train.checkpoint import save_tensors
from eyas_host.train.schedule import Epoch
from eyas_host.train.student import DistillationTask

TOLERANCE = 0.03
"""A network this part below the goal is near enough."""
_AIM = 0.01
"""How far below the goal a corrected prediction is aimed."""
_TRIES = 6
_VIEWS = 320
"""Training views that the loss of a channel is estimated on."""

Measure = Callable[[PixelClassifier], float]
"""Milliseconds of a network, as a part of the dense one's in the same minute."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One network of the accuracy-latency front."""

    round: int
    """0: the dense student."""
    predicted_ms: float
    measured_ms: float | None
    """None: only predicted, from a table that was measured elsewhere."""
    part: float
    """Of the dense milliseconds, measured where that was done."""
    macs: float
    """Multiply-accumulates an image."""
    balanced_accuracy: float | None = None
    """On validation, after recovery."""
    auc: float | None = None


class _State(msgspec.Struct, frozen=True):
    """What is known of a round beside its weights."""

    cuts: tuple[Cut, ...] = ()
    """All so far, in the dense network."""
    correction: float = 1.0
    """Of the prediction: measured part / predicted part."""
    front: tuple[Point, ...] = ()
    history: tuple[Epoch, ...] = ()
    """The round's recovery."""


@dataclass(frozen=True)
class Pruned:
    """A network at its target."""

    model: PixelClassifier
    cuts: tuple[Cut, ...]
    front: tuple[Point, ...]
    history: tuple[Epoch, ...]
    """The last recovery."""


@dataclass(frozen=True)
class Reached:
    """The step that was taken towards a goal; parts are of the dense milliseconds."""

    step: Step
    predicted: float
    measured: float | None
    correction: float


class Rounds:
    """Cuts `student` until it takes at most `part` of its dense milliseconds, and lets it recover.

    Without `measure` the prediction decides. The last round recovers for `settings.epochs`. `*.ckpt` in `folder` may be
    removed once the result is stored.
    """

    def __init__(
        self,
        student: PixelClassifier,
        lesson: DistillationTask,
        latency: LatencyModel,
        part: float,
        *,
        settings: PruneSection,
        folder: Path,
        measure: Measure | None,
    ) -> None:
        self.student, self.lesson, self.latency, self.part = student, lesson, latency, part
        self.settings, self.folder, self.measure = settings, folder, measure
        self.size = lesson.recipe.image.size
        self.dense = layers_of(student, size=self.size)

    def run(self) -> Pruned:
        """All rounds, those of a killed run left out. Raises `CompressError` if the target cannot be reached."""
        dense_ms = self.latency.dense_ms
        if not self._file(0).exists():
            point = Point(
                round=0,
                predicted_ms=dense_ms,
                measured_ms=None if self.measure is None else dense_ms,
                part=1.0,
                macs=self._macs(self.student),
            )
            self._save(self._file(0), self.student, _State(front=(self._judged(point, self.student),)))
        rounds = self.settings.rounds
        for number in range(1, rounds + 1):
            cut, done = self._file(number, "-cut"), self._file(number)
            if not done.exists():
                if not cut.exists():
                    self._cut(number, cut)
                self._recover(number, cut, done)
            say(f"  pruning, round {number} of {rounds}: {_words(self._load(done)[1].front[-1])}")
        model, state = self._load(self._file(rounds))
        return Pruned(model, state.cuts, state.front, state.history)

    def _cut(self, number: int, path: Path) -> None:
        """Cut the network of the round before to this round's goal."""
        model, state = self._load(self._file(number - 1))
        last, dense_ms = number == self.settings.rounds, self.latency.dense_ms
        widths = {name: int(count) for name, count in zip(self.dense.names, self.dense.outputs, strict=True)}
        groups = channel_groups(model, size=self.size, dense=widths)
        losses = channel_losses(model, groups, self._losses(model, number))
        model = model.cpu()
        steps = list(cheapest_cuts(groups, losses, layers_of(model, size=self.size), self.latency))
        check_floor(steps, self.part, dense_ms, correction=state.correction, exact=self.measure is None)

        def cuts_of(step: Step) -> list[Cut]:
            return least_important(groups, losses, step.kept)

        def measured(step: Step) -> float:
            assert self.measure is not None
            return self.measure(cut_channels(model, cuts_of(step), size=self.size))

        reached = reach(
            steps,
            self.part ** (number / self.settings.rounds),
            dense_ms,
            correction=state.correction,
            measure=None if self.measure is None else measured,
            exact=last,
        )
        smaller = cut_channels(model, cuts_of(reached.step), size=self.size)
        point = Point(
            round=number,
            predicted_ms=reached.predicted * dense_ms,
            measured_ms=None if reached.measured is None else reached.measured * dense_ms,
            part=reached.predicted if reached.measured is None else reached.measured,
            macs=self._macs(smaller),
        )
        cuts = (*state.cuts, *cuts_of(reached.step))
        self._save(path, smaller, _State(cuts, reached.correction, (*state.front, point)))

    def _recover(self, number: int, cut: Path, done: Path) -> None:
        """Train what was cut with the teacher's answers."""
        model, state = self._load(cut)
        rounds, settings = self.settings.rounds, self.settings
        epochs = settings.epochs if number == rounds else settings.round_epochs
        history: list[Epoch] = []
        if epochs:
            history = self.lesson.train(
                model,
                epochs=epochs,
                rate=settings.rate,
                ema=self.lesson.recipe.student.ema,
                checkpoint=self._file(number, "-recovery"),
                title=f"pruned student, round {number} of {rounds}",
            )
        front = (*state.front[:-1], self._judged(state.front[-1], model))
        self._save(done, model, msgspec.structs.replace(state, front=front, history=tuple(history)))

    def _losses(self, model: PixelClassifier, number: int) -> Iterator[Tensor]:
        """The lesson's loss, batch by batch, over some of its views."""
        batches = self.lesson.batches(number)
        for pixels, teacher, _, labels in islice(batches, -(-_VIEWS // self.lesson.recipe.student.batch)):
            yield self.lesson.loss(model(pixels.float()), teacher, labels)

    def _judged(self, point: Point, model: PixelClassifier) -> Point:
        """The point with its accuracy."""
        figures = self.lesson.evaluate(move(model, self.lesson.device))
        return msgspec.structs.replace(point, balanced_accuracy=figures["balanced_accuracy"], auc=figures["auc"])

    def _macs(self, model: PixelClassifier) -> float:
        return count_costs(model, torch.zeros(1, 3, self.size, self.size))[0]

    def _file(self, number: int, part: str = "") -> Path:
        return self.folder / f"round-{number}{part}.ckpt"

    def _save(self, path: Path, model: PixelClassifier, state: _State) -> None:
        save_tensors(path, {"model": model.state_dict(), "state": msgspec.json.encode(state)})

    def _load(self, path: Path) -> tuple[PixelClassifier, _State]:
        """The network on the lesson's device, in evaluation mode, and what is known of it."""
        saved = torch.load(path, map_location="cpu", weights_only=True)
        state = msgspec.json.decode(saved["state"], type=_State)
        model = cut_channels(self.student, state.cuts, size=self.size)
        model.load_state_dict(saved["model"])
        return move(model, self.lesson.device), state


def reach(
    steps: Sequence[Step],
    goal: float,
    dense_ms: float,
    *,
    correction: float = 1.0,
    measure: Callable[[Step], float] | None = None,
    exact: bool = True,
) -> Reached:
    """The first of `steps` (milliseconds falling) that takes at most `goal` of the dense time.

    With `measure` the loop is closed: what was measured corrects the prediction, and the search goes on or steps back
    until a network at most `TOLERANCE` below the goal is found, or the next larger one would miss it. Unless `exact`,
    the first try is taken as it is. Raises `CompressError` if no step reaches the goal.
    """
    predicted = [step.ms / dense_ms for step in steps]
    above, below = -1, len(steps)
    found: dict[int, float] = {}
    wanted = goal / correction
    while below - above > 1 and len(found) < _TRIES:
        first = next((place for place, part in enumerate(predicted) if part <= wanted), len(steps) - 1)
        place = min(max(first, above + 1), below - 1)
        if measure is None:
            check_floor(steps, goal, dense_ms, correction=correction, exact=True)
            return Reached(steps[place], predicted[place], None, correction)
        found[place] = measure(steps[place])
        correction = found[place] / predicted[place]
        if not exact or goal * (1 - TOLERANCE) <= found[place] <= goal:
            return Reached(steps[place], predicted[place], found[place], correction)
        above, below = (place, below) if found[place] > goal else (above, place)
        wanted = goal * (1 - _AIM) / correction
    if above == len(steps) - 1:
        raise CompressError(_below_the_floor(goal, found[above], dense_ms))
    if below == len(steps):
        raise CompressError(
            f"[prune] target = 'latency': not reached in {_TRIES} measured tries, the last one took "
            f"{found[above]:.2f} of the dense time for {goal:.2f}; measure on a quieter machine"
        )
    return Reached(steps[below], predicted[below], found[below], found[below] / predicted[below])


def check_floor(steps: Sequence[Step], part: float, dense_ms: float, *, correction: float, exact: bool) -> None:
    """Raise `CompressError` if all steps together do not reach `part` of the dense time.

    A prediction that will be measured (not `exact`) has to be missed clearly.
    """
    floor = correction * steps[-1].ms / dense_ms
    if floor * (1.0 if exact else 1 - 2 * TOLERANCE) > part:
        raise CompressError(_below_the_floor(part, floor, dense_ms))


def _below_the_floor(part: float, floor: float, dense_ms: float) -> str:
    return (
        f"[prune] target = 'latency': {part * dense_ms:.3f} ms ({part:.2f} of the dense student's {dense_ms:.3f}) is "
        f"below what pruning reaches: {floor * dense_ms:.3f} ms ({floor:.2f}) with {MAX_PRUNED:.0%} of every layer's "
        "channels gone; ask for more or take a smaller [student] model or [image] size"
    )


def _words(point: Point) -> str:
    """`0.43 ms measured, 0.50 of the dense time, balanced accuracy 0.871`."""
    took = f"{point.predicted_ms:.3f} ms predicted" if point.measured_ms is None else f"{point.measured_ms:.3f} ms here"
    return f"{took}, {point.part:.2f} of the dense time, balanced accuracy {point.balanced_accuracy:.3f}"
