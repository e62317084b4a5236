"""Jobs of the workstation's doctor that import libraries; each runs in a subprocess.

Arguments and results are plain JSON, as in `eyas_device.doctor.jobs`.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

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


def weights(*, models: list[str], timeout_s: float) -> dict[str, Any]:
    """Whether the hub can be reached, and for each model the local sources of its weights: `cache`, `packaged`."""
    quiet_libraries()
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    from eyas_host.models.factory import PACKAGED

    url = urlsplit(constants.ENDPOINT)
    unreachable, how = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "", "can be reached"
    if not unreachable and getproxies():
        how = "is behind a proxy, which was not tested"
    elif not unreachable:
        try:
            socket.create_connection((url.hostname or "", url.port or 443), timeout=timeout_s).close()
        except OSError as error:
            unreachable = error.strerror or str(error) or "no reply"
    sources: dict[str, Any] = {}
    for model in models:
        known = timm.get_pretrained_cfg(model)
        local = []
        if known is not None and known.hf_hub_id:
            names = ("model.safetensors", "pytorch_model.bin")
            with contextlib.suppress(ValueError):
                if any(isinstance(try_to_load_from_cache(known.hf_hub_id, name), str) for name in names):
                    local.append("cache")
        if model in PACKAGED and find_spec(PACKAGED[model]) is not None:
            local.append("packaged")
        sources[model] = {"hub": bool(known is not None and known.hf_hub_id), "places": local}
    return {"endpoint": url.hostname, "unreachable": unreachable, "how": how, "models": sources}


def int8_kernels() -> list[str]:
    """Kinds of NNCF's kernels that are compiled in this environment."""
    quiet_libraries()
    from eyas_host.quant.kernels import compiled

    return compiled()


def main(arguments: list[str]) -> None:
    """Run one job."""
    jobs.main(arguments, JOBS)


JOBS: dict[str, Callable[..., Any]] = {
    "libraries": libraries,
    "torch_build": torch_build,
    "weights": weights,
    "int8_kernels": int8_kernels,
}
"""Name -> function."""
