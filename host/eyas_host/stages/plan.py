"""The plan of a run: which stages will run, why, and about how long each takes on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from rich.markup import escape

from eyas_device.board.limits import usable_cores
from eyas_host.data.sources import list_images
from eyas_host.pipeline import distributed
from eyas_host.pipeline.clock import ChainClock, Step
from eyas_host.pipeline.runner import ASKED, NEW, Due, RunContext, StageRecord, read_stage_record
from eyas_host.pipeline.team import training_processes
from eyas_host.recipe import Recipe
from eyas_host.stages.estimate import Counts, Speed, estimate_stages
from eyas_host.stages.preflight import check_chain
from eyas_host.support.machine import machine
from eyas_host.support.progress import about, say

_LONG = ("teach", "distill", "prune", "qat", "compile", "verify")
"""Stages that take minutes."""
_BIAS = 4.0
"""Largest correction of an estimate by an earlier run's."""
_RESUMED = 0.05
"""Fraction of a step's time that it takes to find that it is done."""
_MAX_REASONS = 3


def show_plan(context: RunContext, stages: Sequence[Due], *, always: bool = False) -> ChainClock | None:
    """Print the plan, and return the clock of the run; None if only seconds of work are due, which are not worth one.

    Raises as the reading of the images' list and the building of the networks do, and as `check_chain` where a later
    stage could not end well.
    """
    due = [stage for stage in stages if stage.reasons]
    if not any(stage.name in _LONG for stage in due) and not always:
        return None
    if not due:
        say("[bold]plan[/bold]: nothing to do, all stages are up to date")
        return None
    check_chain(context, [stage.name for stage in due])
    steps = _steps(context, due)
    shown = {stage.name: f"{about(sum(step.seconds for step in steps[stage.name])):>7}" for stage in due}
    total = about(sum(step.seconds for own in steps.values() for step in own))
    say(f"[bold]plan[/bold]: about {total} on this machine; an estimate, from a short measurement")
    for stage in stages:
        say(f"  {stage.name:8} {shown.get(stage.name, 'done'):>7}   {escape(_reason(stage))}".rstrip())
    return ChainClock(steps)


def _reason(stage: Due) -> str:
    """Why a finished stage runs again; nothing for a new one."""
    if stage.spent:
        return "goes on where it was interrupted"
    if not stage.reasons or stage.reasons == (NEW,):
        return ""
    took = f" (took {about(stage.record.seconds)})" if stage.record is not None else ""
    if stage.reasons == (ASKED,):
        return f"runs again, as asked{took}"
    more = f" and {len(stage.reasons) - _MAX_REASONS} more" if len(stage.reasons) > _MAX_REASONS else ""
    what = ", ".join(stage.reasons[:_MAX_REASONS]) + more
    return f"runs again {what}{took}" if what.startswith("after ") else f"runs again: {what} changed{took}"


def _steps(context: RunContext, due: Sequence[Due]) -> dict[str, tuple[Step, ...]]:
    """Stage -> its steps: by a measurement of this machine, corrected by how earlier estimates did here."""
    counts, speed = _measured(context)
    processes = training_processes(context.recipe) if distributed.world_size() == 1 else distributed.world_size()
    estimates = estimate_stages(context.recipe, counts, speed, cores=usable_cores(), processes=processes)
    return {stage.name: _what_is_left(estimates[stage.name], _bias(context, stage), stage.spent) for stage in due}


def _what_is_left(steps: Sequence[Step], bias: float, spent: float) -> tuple[Step, ...]:
    """Steps whose estimates are corrected by a factor, without the seconds that are done already."""
    left = []
    for step in steps:
        seconds = step.seconds * bias
        left.append(msgspec.structs.replace(step, seconds=max(seconds - spent, _RESUMED * seconds)))
        spent = max(0.0, spent - seconds)
    return tuple(left)


def _measured(context: RunContext) -> tuple[Counts, Speed]:
    from eyas_host.stages.speed import measure_speed  # imports torch, which a split does without

    files, counts = _images(context)
    return counts, measure_speed(context.recipe, files)


def _images(context: RunContext) -> tuple[list[str], Counts]:
    """Some images, and how many each split has or will have."""
    images = list_images(context.recipe.data).images
    data = context.recipe.data
    total = min(len(images), data.limit or len(images))
    divided = Counter(image.split for image in images)
    if data.divided:  # what is not divided off is taken from the training images
        off = {split: divided[split] or round(divided["train"] * data.split[-1]) for split in ("validation", "test")}
        counts = Counts(sum(divided.values()) - sum(off.values()), off["validation"], off["test"])
    else:
        counts = Counts(*(round(total * fraction) for fraction in data.split))
    return [image.path for image in images], counts


def _bias(context: RunContext, stage: Due) -> float:
    """Measured over estimated duration of the stage's last run on this machine, in this run or one beside it."""
    records = [stage.record] if stage.record is not None else _beside(context, stage.name)
    here = machine()
    fitting = [r for r in records if r.estimated_s and r.machines == (here,) and _same_networks(r, context.recipe)]
    if not fitting:
        return 1.0
    last = max(fitting, key=lambda record: record.finished)
    return min(max(last.seconds / last.estimated_s, 1 / _BIAS), _BIAS)


def _beside(context: RunContext, stage: str) -> list[StageRecord]:
    """The stage's records of other runs."""
    folders = [path.parent for path in context.root.parent.glob(f"*/{stage}/stage.json")]
    return [record for folder in folders if (record := read_stage_record(folder)) is not None]


def _same_networks(record: StageRecord, recipe: Recipe) -> bool:
    sections = {"teacher": recipe.teacher.model, "student": recipe.student.model}
    return all(record.recipe[name]["model"] == model for name, model in sections.items() if name in record.recipe)
