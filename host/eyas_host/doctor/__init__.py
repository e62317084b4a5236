"""The workstation's doctor: can a recipe be trained, compiled and flashed from here, and what to do if not.

It is built like the device's: each check is a function from a `Context` to a `Finding`. Anything that may hang or crash
(importing libraries, querying the GPU) runs in a subprocess, so that a half-broken installation is a finding.
"""

from __future__ import annotations

from collections.abc import Callable

from eyas_device.doctor.finding import Finding
from eyas_host.doctor import gpu, machine, software
from eyas_host.doctor.context import Context, SharedJobs
from eyas_host.recipe import Recipe

CHECKS: tuple[Callable[[Context], Finding], ...] = (
    machine.recipe,
    software.python,
    software.extras,
    software.versions,
    software.libraries,
    software.conflicts,
    gpu.driver,
    gpu.torch_build,
    software.weights,
    software.int8_kernels,
    machine.cores,
    machine.memory,
    machine.shared_memory,
    machine.disk,
    software.programs,
)
"""All checks, in order; a check is named after its function."""


def shared_jobs(recipe: Recipe) -> SharedJobs:
    """The jobs of all checks of a recipe, in one subprocess: four would import torch four times."""
    return SharedJobs(
        {
            "torch_build": {},
            "weights": software.weights_job(recipe),
            "int8_kernels": {},
            "libraries": software.libraries_job(),
        }
    )
