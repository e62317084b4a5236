"""Jobs of the workstation's doctor that import libraries; each runs in a subprocess.

Arguments and results are plain JSON, as in `eyas_device.doctor.jobs`.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eyas_device.doctor import jobs
from eyas_host.support.quiet import quiet_libraries


def libraries(*, names: list[str]) -> dict[str, dict[str, str]]:
    """Import libraries and return the `version` or `error` of each."""
    quiet_libraries()
    results = {}
    for name in names:
        try:
            version = getattr(importlib.import_module(name), "__version__", "")
            results[name] = {"version": str(version).split("-")[0]}
        except Exception as error:  # any exception of a broken package is a finding
            results[name] = {"error": f"{type(error).__name__}: {error}"}
    return results


def torch_build() -> dict[str, Any]:
    """What torch is built for, and the GPUs that it finds."""
    import torch

    available = torch.cuda.is_available()
    gpus = [
        {"name": torch.cuda.get_device_name(number), "capability": list(torch.cuda.get_device_capability(number))}
        for number in range(torch.cuda.device_count() if available else 0)
    ]
    if available:
        torch.ones(8, device="cuda").sum().item()  # an unsupported GPU fails here, not after an hour
    hip = getattr(torch.version, "hip", None)
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": hip,
        "available": available,
        "built_for": torch.cuda.get_arch_list() if available else [],
        "gpus": gpus,
    }


def weights(*, models: list[str], files: list[str]) -> dict[str, Any]:
    """Whether the hub answers, what of each model's weights is here, and which files are damaged.

    `models` has for each model whether it is on the `hub` and its `places`: `cache` and `packaged`, and why one is
    `damaged`. `files` are further files of weights, returned with what is wrong with them.
    """
    quiet_libraries()
    from eyas_host.models import factory, hub
    from eyas_host.models.weights import check_whole
    from eyas_host.support.errors import WeightsError

    def problem(path: Path) -> str:
        try:
            check_whole(path)
        except WeightsError as error:
            return str(error)
        return ""

    unreachable, found = "", {}
    for model in models:
        where = hub.repository(model)
        places: dict[str, Path] = {}
        if where is not None:
            unreachable = hub.unreachable(where)
            if (cached := hub.cached_weights(where)) is not None:
                places["cache"] = cached
        with contextlib.suppress(WeightsError, KeyError):
            places["packaged"] = factory.packaged_file(model)
        problems = {place: text for place, path in places.items() if (text := problem(path))}
        found[model] = {"hub": where is not None, "places": sorted({*places} - {*problems}), "damaged": problems}
    damaged = {file: problem(Path(file)) for file in files}
    return {"endpoint": hub.host(), "unreachable": unreachable, "models": found, "files": damaged}


def int8_kernels() -> dict[str, Any]:
    """Whether NNCF's kernels for a GPU are compiled in this environment, and the folder for them."""
    quiet_libraries()
    from eyas_host.quant.kernels import build_folder, compiled

    return {"compiled": compiled(), "folder": str(build_folder())}


def together(*, plan: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run several jobs (name -> arguments) in this process, which imports their libraries once.

    Returns for each its `result`, or its `error` and the `kind` of that.
    """
    return {name: jobs.reply(JOBS[name], arguments) for name, arguments in plan.items()}


def main(arguments: list[str]) -> None:
    """Run one job."""
    jobs.main(arguments, JOBS)


JOBS: dict[str, Callable[..., Any]] = {
    "libraries": libraries,
    "torch_build": torch_build,
    "weights": weights,
    "int8_kernels": int8_kernels,
    "together": together,
}
"""Name -> function."""
