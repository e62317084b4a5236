"""The workstation's doctor: whether a recipe can be trained, compiled and flashed from here, and if not, what to do.

It has the form of the device's: each check is a function from a `Context` to a `Finding`, and what may hang or crash
(importing libraries, asking the GPU) happens in a process of its own, so that a half-broken install is a finding.
"""

from __future__ import annotations

from collections.abc import Callable

from eyas_device.doctor.finding import Finding
from eyas_host.doctor import gpu, machine, software
from eyas_host.doctor.context import Context

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
"""In the order in which they are run and shown; a check's name is its function's."""
