"""Checks of the recipe, and of the workstation's cores, memory and disk."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import msgspec

from eyas_device.board import read_pressure
from eyas_device.board.limits import usable_cores, usable_memory
from eyas_device.doctor.finding import Finding, green, grey, red, yellow
from eyas_host.data.manifest import MANIFEST
from eyas_host.doctor.context import Context
from eyas_host.support.errors import DataError

_GB = 1e9
MEMORY_GB = (3.0, 6.0)
"""Available memory below which training fails, or may fail; the demonstration takes 4.5 GB."""
DISK_GB = (2.0, 10.0)
"""Free space beside the cached views below which a run fails, or may fail (checkpoints, artefacts, kernels)."""
SHARED_GB = 0.5
"""Data loader workers pass batches through /dev/shm; containers often have 64 MB."""
PRESSURE = 60.0
"""CPU pressure above which times are unreliable: per cent of the last minute with a process waiting."""


def recipe(context: Context) -> Finding:
    """Check the recipe and that its images exist."""
    if context.recipe_error:
        lines = [line.strip() for line in context.recipe_error.splitlines()]
        return red(
            f"{lines[0]} {'; '.join(lines[1:])}".strip(),
            "correct it; see models/template/recipe.toml",
        )
    if context.recipe_path is None:
        return grey("no recipe given: checking the defaults", "eyas doctor models/NAME/recipe.toml")
    count, error = _images(context)
    if error:
        return red(f"{context.recipe_path}: {error}", "see [data] of the recipe")
    return green(f"{context.recipe_path}: {count:,} images")


def cores(context: Context) -> Finding:
    """Check the cores and whether other processes use them."""
    count = context.cpus()
    usable = usable_cores(context.root, count)
    text = f"{count} cores" + (f", of which this container may use {usable}" if usable < count else "")
    threads = context.environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable:
        return yellow(f"{text}; OMP_NUM_THREADS = {threads} is more", "unset OMP_NUM_THREADS")
    pressure = read_pressure(context.root)
    if pressure is None:
        return green(text)
    text += f", pressure {pressure.avg60:.0f} % of the last minute"
    if pressure.avg60 >= PRESSURE:
        return yellow(text, "other processes slow down training and distort times: see top")
    return green(text)


def memory(context: Context) -> Finding:
    """Check that there is memory to train and compile."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", context.read("proc/meminfo") or "", re.MULTILINE)
    if match is None:
        return grey("unknown: no MemAvailable in /proc/meminfo")
    available, free = int(match[1]) * 1024, usable_memory(context.root)
    text = f"{available / _GB:.1f} GB available"
    if free < available:
        text += f", of which this container may take {free / _GB:.1f} GB"
    fix = "close other programs; a smaller [image] size, [teacher] batch or [run] workers need less"
    if free < MEMORY_GB[0] * _GB:
        return red(text, fix)
    return yellow(text, fix) if free < MEMORY_GB[1] * _GB else green(text)


def shared_memory(context: Context) -> Finding:
    """Check the shared memory of data loader workers."""
    folder = context.root / "dev/shm"
    if context.recipe.run.workers == 0 or (context.recipe.run.workers == "auto" and context.cpus() == 1):
        return green("not needed without data loader workers")
    if not folder.is_dir():
        return yellow("/dev/shm does not exist", "set [run] workers = 0")
    free = context.free(folder)
    text = f"/dev/shm: {free / _GB:.2f} GB free"
    if free < SHARED_GB * _GB:
        return yellow(text, "docker run --shm-size 2g, or set [run] workers = 0")
    return green(text)


def disk(context: Context) -> Finding:
    """Check that the run's folder has space for cached views, checkpoints and artefacts."""
    folder = context.runs.absolute()
    free = context.free(next(path for path in (folder, *folder.parents) if path.exists()))
    text = f"{context.runs}: {free / _GB:.1f} GB free"
    count, _ = _images(context)
    student, size = context.recipe.student, context.recipe.image.size
    views = 0 if student.checkpoint else count * student.views * 3 * size**2
    if views:
        text += f"; {student.views} views of {count:,} images at {size} px need up to {views / _GB:.2f} GB"
    if student.cache_gb and views > student.cache_gb * _GB:
        return red(f"{text}, more than cache_gb = {student.cache_gb:g}", "use fewer [student] views, or raise cache_gb")
    fix = "free some space or put --runs on another disk; fewer [student] views and a smaller [image] size need less"
    if free < views + DISK_GB[0] * _GB:
        return red(text, fix)
    return yellow(text, fix) if free < views + DISK_GB[1] * _GB else green(text)


def _images(context: Context) -> tuple[int, str]:
    """Count the training images (all images before a split), or return why they cannot be listed."""
    from eyas_host.data.sources import list_images
    from eyas_host.support.addresses import is_url

    if context.recipe_path is None or context.recipe_error:
        return 0, ""
    path: Path = context.runs / context.recipe.run.name / MANIFEST
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return len(msgspec.json.decode(path.read_bytes(), type=_TrainImages).train), ""
    if any(is_url(source.path) for source in context.recipe.data.sources):
        return 0, ""  # listing would download them
    try:
        return len(list_images(context.recipe.data).images), ""
    except (DataError, ImportError, OSError) as error:
        return 0, str(error)


class _TrainImages(msgspec.Struct, frozen=True):
    """The training images in the split's manifest."""

    train: tuple[msgspec.Raw, ...]
