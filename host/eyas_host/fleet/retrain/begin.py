"""Begin a retraining that is due, or go on with it: write its images, and say who allowed it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from msgspec.structs import replace

from eyas_device.support.files import sync_folder
from eyas_host.fleet.retrain.due import Plan
from eyas_host.fleet.retrain.usable import Usable
from eyas_host.fleet.samples.exchange import write_images
from eyas_host.recipe.data import Source
from eyas_host.retrain.state import Retraining, Terms
from eyas_host.support.errors import RunError
from eyas_host.support.files import sync_files
from eyas_host.versions.record import VersionRecord
from eyas_host.versions.registry import Registry


def begin(
    registry: Registry,
    parent: VersionRecord,
    plan: Plan,
    terms: Terms,
    *,
    runs: Path,
    approved_by: str,
    now: Callable[[], float],
    say: Callable[[str], None],
) -> Retraining:
    """Train, judge and register what is due, as `eyas_host.retrain.run.retrain` does; hold `only_one` meanwhile.

    The images lie in `MODEL-VERSION-images` beside the run. They come whole or not at all; one that goes on takes those
    that are there, whatever people have said since.
    """
    from eyas_host.retrain.run import retrain  # imports torch, which the fleet does without

    folder = images_of(runs, parent, plan.version)
    if not plan.goes_on:
        shutil.rmtree(folder, ignore_errors=True)  # of one that was killed before it began
        _write(plan.images, folder)
    elif not folder.is_dir():
        raise RunError(f"{folder}: the images of {parent.model}@{plan.version} are gone; remove its run to begin again")
    return retrain(
        registry,
        parent,
        [Source(path=str(folder.resolve()), source="folder")],
        terms,
        runs=runs,
        version=plan.version,
        reason=replace(plan.reason, approved_by=approved_by),
        now=now,
        say=say,
    )


def images_of(runs: Path, parent: VersionRecord, version: str) -> Path:
    """Folder of the new images of a retraining."""
    return runs / f"{parent.model}-{version}-images"


def _write(images: Iterable[Usable], folder: Path) -> None:
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    content = {f"{one.label}/{one.name}": one.image for one in images}
    write_images(content, part)
    sync_files((part / name for name in content), part)
    part.rename(folder)
    sync_folder(folder.parent)
