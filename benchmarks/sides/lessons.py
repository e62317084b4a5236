"""The training benchmark's sides: the same student, batch and loss with cached answers and with the teacher at work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from eyas_host.data.index import build_index
from eyas_host.data.loader import BatchLoader, Rows, ordered_batches
from eyas_host.data.split import Split, split_index
from eyas_host.evaluation.inference import pick_device, to_tensor
from eyas_host.models.factory import PixelClassifier, build, build_student, build_teacher, move
from eyas_host.recipe import Recipe
from eyas_host.support.progress import meter
from eyas_host.train.feature_distillation import FeatureLoss
from eyas_host.train.losses import teacher_loss
from eyas_host.train.student import DistillationTask
from eyas_host.train.unfreeze import freeze_batch_norm, unfreeze
from eyas_host.train.view_cache import ViewCache
from eyas_host.train.view_reader import ViewBatch

WARM = 2
"""Steps of each turn that are not timed: a worker starts, and its first batches are drawn."""


class Turn(msgspec.Struct, frozen=True):
    """One turn of one side."""

    images: int
    wall_s: float
    cpu_s: float
    """Processor time of the training process; workers that draw are not in it."""


Side = Callable[[], Turn]


class OnlineLesson(DistillationTask):
    """The plain loop: fresh views at every step, and the teacher asked about each of them."""

    def __init__(self, recipe: Recipe, split: Split, cache: ViewCache, teacher: PixelClassifier) -> None:
        super().__init__(recipe, split, cache)
        self.stream = BatchLoader(recipe, split.train)
        self.asked = move(teacher, self.device).eval()

    def batches(self, epoch: int, first: int = 0) -> Iterator[ViewBatch]:
        """As `DistillationTask.batches`, nothing of it cached."""
        rows = [rows for _, rows in self._sample(epoch, first)]
        for some, views in zip(rows, self.stream.views(rows, (self.recipe.run.seed, 9, epoch)), strict=True):
            pixels = to_tensor(views, self.device)
            with torch.no_grad():
                pooled = self.asked.pooled(pixels)
                logits = self.asked.classify(pooled)
            labels = torch.eye(logits.shape[1])[self.targets[some]]
            yield ViewBatch(pixels, labels.to(self.device), logits.float(), pooled.float(), [])


class Bench:
    """A split, a teacher and a cache of two views, and the sides that train with them."""

    def __init__(self, recipe: Recipe, root: Path, *, steps: int) -> None:
        self.recipe, self.steps = recipe, steps
        self.device = pick_device(recipe.run.device)
        self.split = make_split(recipe, root)
        torch.manual_seed(recipe.run.seed)
        self.teacher = move(build_teacher(recipe.teacher, len(self.split.labels))[0], self.device).eval()
        self.cache = ViewCache.make(root, recipe, self.split, self.teacher)
        self.stream = BatchLoader(recipe, self.split.train)
        self.targets = torch.from_numpy(self.split.train.targets).to(self.device)

    def student(self, asked: PixelClassifier | None = None, workers: int | None = None) -> Side:
        """Steps of the student: KL to the teacher, the labels, and the hint.

        Without a teacher that is `asked` at every step, views and answers are the cached ones; `workers` other than
        the stream's own draw the views then.
        """
        task, channels = DistillationTask(self.recipe, self.split, self.cache), self.cache.features.shape[-1]
        if asked is not None:
            task, channels = OnlineLesson(self.recipe, self.split, self.cache, asked), asked.pooled_channels
            if workers is not None:
                task.stream = BatchLoader(with_workers(self.recipe, workers), self.split.train)
        model = move(build_student(self.recipe.student, len(self.split.labels))[0], self.device)
        hints = FeatureLoss(model, self.recipe.student, channels, None).to(self.device)
        optimizer = torch.optim.AdamW([*model.parameters(), *hints.parameters()], lr=1e-4)

        def losses() -> Iterator[Tensor]:
            for batch in _again(task.batches):
                with self.autocast():
                    pooled = model.pooled(batch.pixels)
                    loss = task.loss(model.classify(pooled), batch.logits, batch.labels)
                    yield loss + hints(pooled, batch.features, [], [])

        return self._side(model, optimizer, losses, self.recipe.student.batch)

    def larger_teacher(self, name: str) -> PixelClassifier:
        """Another teacher for the plain loop, untrained: it answers as fast."""
        return build(name, len(self.split.labels), "random")[0]

    def head(self, *, cached: bool) -> Side:
        """Steps of stage 1: the head on the frozen backbone's features, cached or from fresh views."""
        teacher = self.teacher
        loss_of = teacher_loss(self.recipe, self.targets, len(self.split.labels))
        head = move(build_teacher(self.recipe.teacher, len(self.split.labels))[0], self.device).classifier
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-4)
        features = torch.zeros(len(self.targets), teacher.pooled_channels, device=self.device)

        def losses() -> Iterator[Tensor]:
            for rows, pixels in self._views(None if cached else self.stream):
                if pixels is not None:
                    with torch.no_grad(), self.autocast():
                        features[rows] = teacher.pooled(pixels).float()
                yield loss_of(head(features[rows]), self.targets[rows])

        return self._side(head, optimizer, losses, self.recipe.teacher.batch)

    def blocks(self, *, synthetic: bool) -> Side:
        """Steps of stage 2, all blocks: on views, or on tensors that are there already."""
        model = move(build_teacher(self.recipe.teacher, len(self.split.labels))[0], self.device)
        optimizer = torch.optim.AdamW(unfreeze(model, self.recipe.teacher), lr=1e-5)
        loss_of = teacher_loss(self.recipe, self.targets, len(self.split.labels))
        size, batch = self.recipe.image.size, self.recipe.teacher.batch
        ready = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=self.device)
        ready = ready.contiguous(memory_format=torch.channels_last)

        def losses() -> Iterator[Tensor]:
            for rows, pixels in self._views(None if synthetic else self.stream):
                with self.autocast():
                    yield loss_of(model(ready if pixels is None else pixels), self.targets[rows])

        freeze_batch_norm(model)
        return self._side(model, optimizer, losses, batch)

    def autocast(self) -> torch.autocast:
        """Half precision on a GPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def _views(self, stream: BatchLoader | None) -> Iterator[tuple[Rows, Tensor | None]]:
        """Full batches of rows, with their views from `stream`."""
        count, batch = len(self.targets), self.recipe.teacher.batch
        order = np.random.default_rng(0).permutation(count)
        turns = [order[rows] for rows in ordered_batches(count, batch) if len(rows) == batch]
        batches = list(
            itertools.islice(itertools.cycle(turns), WARM + self.steps + 2)
        )  # a worker stays busy to the end
        if stream is None:
            yield from ((rows, None) for rows in batches)
            return
        for rows, views in zip(batches, stream.views(batches, (0, 9), mixed=False), strict=True):
            yield rows, to_tensor(views, self.device)

    def _side(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, losses: Callable[[], Iterator[Tensor]], batch: int
    ) -> Side:
        parameters = list(model.parameters())

        def turn() -> Turn:
            wall = cpu = 0.0
            for number, loss in enumerate(losses()):
                if number == WARM:
                    self._wait()
                    wall, cpu = time.perf_counter(), time.process_time()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                if number == WARM + self.steps - 1:
                    break
            self._wait()
            return Turn(self.steps * batch, time.perf_counter() - wall, time.process_time() - cpu)

        return turn

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def with_workers(recipe: Recipe, workers: int) -> Recipe:
    """The recipe with a number of loader processes."""
    return msgspec.structs.replace(recipe, run=msgspec.structs.replace(recipe.run, workers=workers))


def make_split(recipe: Recipe, root: Path) -> Split:
    """The images of the recipe, divided."""
    manifest = split_index(build_index(recipe.data), recipe.data, recipe.run.seed)
    return Split(manifest, root, recipe.image.preprocessing())


def take_turns(sides: Mapping[str, Side], rounds: int, title: str) -> dict[str, list[Turn]]:
    """All sides, one after the other in every round; the first round warms up."""
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    with meter(title, (rounds + 1) * len(sides)) as bar:
        for number in range(rounds + 1):
            for name, side in sides.items():
                one = side()
                if number:
                    turns[name].append(one)
                bar.advance()
    return turns


def rates(turns: Sequence[Turn]) -> list[float]:
    """Images a second of each turn."""
    return [one.images / one.wall_s for one in turns]


def _again(batches: Callable[[int], Iterator[ViewBatch]]) -> Iterator[ViewBatch]:
    """Batches of one epoch after the other."""
    return itertools.chain.from_iterable(batches(epoch) for epoch in itertools.count())
