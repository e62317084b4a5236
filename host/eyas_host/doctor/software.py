"""Checks of Python, packages and their versions, imports, weights, int8 kernels and system programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import eyas_host
from eyas_device.config import Config
from eyas_device.doctor import software
from eyas_device.doctor.finding import CheckStatus, Finding, green, grey, red, yellow
from eyas_device.doctor.finding import Context as DeviceContext
from eyas_device.support.processes import JobError
from eyas_host.doctor import gpu
from eyas_host.doctor.context import Context
from eyas_host.models import pretrained
from eyas_host.recipe import Recipe
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.support.extras import install_line
from eyas_host.support.files import private_caches
from eyas_host.support.machine import cuda_compiler

CONSTRAINTS = Path(eyas_host.__file__).parents[2] / "constraints" / "host.txt"
"""The tested versions, if Eyas runs from its source tree."""
LIBRARIES = (
    *("numpy", "cv2", "sklearn", "torch", "torchvision", "timm", "accelerate", "optuna", "nncf", "torch_pruning"),
    *("openvino", "onnx", "onnxruntime", "ai_edge_litert.interpreter", "ai_edge_quantizer", "litert_torch"),
)
_PYTHON = ((3, 11), (3, 13))
"""Oldest and newest tested version."""
_EXTRAS: Mapping[str, tuple[CheckStatus, str]] = {
    "train": ("red", "training and compiling"),
    "fleet": ("yellow", "broker kit, collector and live view"),
}
_PROGRAMS = {"ssh": "eyas flash", "rsync": "eyas flash", "mosquitto": "make broker"}
_IMPORTS_S, _ONE_IMPORT_S, _WEIGHTS_S = 240.0, 60.0, 90.0
_SHOWN = 6
_INSTALL = f"make install, or {install_line('train,fleet')}"


def python(context: Context) -> Finding:
    """Check that this Python version is tested."""
    return software.tested_python(*_PYTHON)


def extras(context: Context) -> Finding:
    """Check that all packages of the extras are installed in allowed versions."""
    try:
        needed = {extra: list(_requirements(extra)) for extra in _EXTRAS}
    except metadata.PackageNotFoundError:
        return yellow("eyas is not installed as a package: its extras are unknown", _INSTALL)
    except ImportError as error:
        return red(f"{error.name} is not installed", _INSTALL)
    worst, problems = "green", []
    for extra, (status, what) in _EXTRAS.items():
        wrong = [name for name, allowed in needed[extra] if not allowed(context.version(name))]
        if wrong:
            worst = max(worst, status, key=("green", "yellow", "red").index)
            packages = ", ".join(f"{name} {context.version(name) or 'missing'}" for name in wrong)
            problems.append(f"{extra} ({what}): {packages}")
    if not problems:
        return green(", ".join(f"{extra} ({len(needed[extra])} packages)" for extra in _EXTRAS))
    return red("; ".join(problems), _INSTALL) if worst == "red" else yellow("; ".join(problems), _INSTALL)


def versions(context: Context) -> Finding:
    """Check that the installed versions are the tested ones."""
    try:
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return grey("the tested versions (constraints/host.txt) are not part of this installation")
    pins = [line.partition(";")[0].strip().split("==") for line in lines if "==" in line and ";" not in line]
    other = [
        f"{name} {found} (tested: {pin})"
        for name, pin in pins
        if (found := context.version(name)) is not None and found.partition("+")[0] != pin
    ]
    if not other:
        return green(f"as tested ({len(pins)} pins)")
    more = f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else ""
    return yellow(", ".join(other[:_SHOWN]) + more, "make install")


def libraries(context: Context) -> Finding:
    """Check that the libraries for training and compiling can be imported."""
    try:
        found: dict[str, Any] = context.job("libraries", libraries_job(), _IMPORTS_S)
    except JobError:  # one of them crashes the process: find out which
        found = {}
        for name in LIBRARIES:
            try:
                found |= context.job("libraries", {"names": [name]}, _ONE_IMPORT_S)
            except JobError as error:
                found[name] = {"error": str(error)}
    errors = [f"{name}: {one['error']}" for name, one in found.items() if "error" in one]
    if errors:
        return red("; ".join(errors), f"{_INSTALL}; a missing .so is in a system package: apt-file search NAME")
    return green(", ".join(f"{name.partition('.')[0]} {one['version']}".strip() for name, one in found.items()))


def conflicts(context: Context) -> Finding:
    """Check for installed packages that conflict with each other."""
    return software.conflicts(DeviceContext(config=Config(), version=context.version))


def weights(context: Context) -> Finding:
    """Check the hub, and which initial weights teacher and student would get."""
    recipe = context.recipe
    if recipe.student.checkpoint:
        return green("none needed: the student comes from a checkpoint")
    try:
        known = context.job("weights", weights_job(recipe), _WEIGHTS_S)
    except JobError as error:
        return red(f"unknown: {error}", "see the check `libraries`")
    why = known["unreachable"]
    lines, worst = [f"the hub ({known['endpoint']}) {why or 'answers'}"], "green"
    for name, section in (("teacher", recipe.teacher), ("student", recipe.student)):
        status, origin = _origin(section, known, reachable=not why, trained=name == "teacher")
        worst = max(worst, status, key=("green", "yellow", "red").index)
        lines.append(f"{name} {section.model}: {origin}")
    damaged = [*(text for model in known["models"].values() for text in model["damaged"].values())]
    damaged += [text for file, text in known["files"].items() if text and file not in _own_files(recipe)]
    text = "; ".join([*lines, *damaged])
    fix = "use a mirror (HF_ENDPOINT), a filled cache (HF_HOME), a weights_file, or a teacher with packaged weights"
    if damaged:
        fix = f"remove the damaged file, or install its package again; {fix}"
    if worst == "red":
        return red(text, fix)
    return yellow(text, fix) if worst == "yellow" or damaged else green(text)


def weights_job(recipe: Recipe) -> dict[str, object]:
    """Arguments of the job `weights` for a recipe."""
    models = [recipe.teacher.model, recipe.student.model]
    shipped = [str(path) for model in models if (path := pretrained.weights_file(model)) is not None]
    return {"models": models, "files": sorted({*shipped, *_own_files(recipe)})}


def libraries_job() -> dict[str, object]:
    """Arguments of the job `libraries`."""
    return {"names": list(LIBRARIES)}


def _own_files(recipe: Recipe) -> set[str]:
    """Files of weights that the recipe names and that exist."""
    files = {recipe.teacher.weights_file, recipe.student.weights_file}
    return {file for file in files if file and Path(file).is_file()}


def int8_kernels(context: Context) -> Finding:
    """Check that NNCF's int8 kernels for the GPU are compiled or can be; a processor needs none."""
    if context.recipe.run.device == "cpu" or not gpu.gpu_names(context):
        return green("none needed: int8 training on a processor takes torch operations")
    try:
        found = context.job("int8_kernels", {}, _ONE_IMPORT_S)
    except JobError as error:
        return red(f"unknown: {error}", "see the check `libraries`")
    folder = found["folder"]
    if not found["compiled"] and cuda_compiler(context.environment, context.which) is None:
        home = context.environment.get("CUDA_HOME") or context.environment.get("CUDA_PATH")
        where = f"no nvcc in CUDA_HOME ({home})" if home else "no nvcc"
        return yellow(
            f"{where}: int8 training on the GPU uses torch operations, with the same results but slower",
            "install the CUDA toolkit of torch's CUDA version, or set CUDA_HOME to the folder with bin/nvcc",
        )
    text = f"compiled in {folder}"
    if not found["compiled"]:
        text = f"not compiled yet: the first int8 training on the GPU does so once, in a minute or more, in {folder}"
    if Path(folder).is_relative_to(private_caches()):
        fix = "set XDG_CACHE_HOME to a folder that stays"
        return yellow(f"{text}, which may be emptied at the next start: the home cannot be written to", fix)
    return green(text)


def programs(context: Context) -> Finding:
    """Check for the system programs that the fleet's verbs need."""
    missing = [name for name in _PROGRAMS if not (context.which(name) or context.which(f"/usr/sbin/{name}"))]
    if not missing:
        return green(", ".join(_PROGRAMS))
    names = ", ".join(f"{name} (for {_PROGRAMS[name]})" for name in missing)
    packages = {"ssh": "openssh-client"}
    return yellow(f"missing: {names}", f"apt install {' '.join(packages.get(name, name) for name in missing)}")


def _origin(
    section: TeacherSection | StudentSection, known: Mapping[str, Any], *, reachable: bool, trained: bool
) -> tuple[CheckStatus, str]:
    """Where initial weights come from, in the order of `eyas_host.models.factory.build`."""
    source, model, files = section.weights, known["models"][section.model], known["files"]
    places, damaged = model["places"], model["damaged"]
    if source in ("auto", "hub") and model["hub"] and "cache" not in damaged and (reachable or "cache" in places):
        return "green", "from the hub's cache here" if "cache" in places else "from the hub"
    if source in ("auto", "packaged") and "packaged" in places:
        return "green", "packaged weights"
    if source in ("auto", "file") and section.weights_file:
        if not Path(section.weights_file).is_file():
            return "red", f"{section.weights_file} is missing"
        return ("red", why) if (why := files[section.weights_file]) else ("green", "from its file")
    shipped = pretrained.pretrained_file(section.model, source, trained=trained)
    if shipped is not None and not files.get(str(shipped)):
        return "green", "pretrained weights, which ship with Eyas"
    if source == "random":
        return "green", "random, as set in the recipe"
    if source == "auto" and not trained:
        return "yellow", "random: needs more epochs"
    return "red", "none available"


def _requirements(extra: str) -> Iterator[tuple[str, Any]]:
    """Yield each package of an extra, with a function that tells whether a version (or None) is allowed."""
    from packaging.requirements import Requirement

    for line in metadata.requires("eyas") or ():
        one = Requirement(line)
        if one.marker is not None and one.marker.evaluate({"extra": extra}) and not one.marker.evaluate({"extra": ""}):
            yield one.name, lambda version, one=one: version is not None and one.specifier.contains(version, True)
