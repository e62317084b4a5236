"""The workstation's doctor: broken installs, unsupported GPUs, no network and full disks are findings."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from huggingface_hub import constants

from eyas_device.doctor import run_checks
from eyas_device.doctor.finding import Finding
from eyas_device.support.processes import JobError
from eyas_host.doctor import CHECKS, gpu, machine, software, work
from eyas_host.doctor.context import Context, SharedJobs
from eyas_host.doctor.gpu import runs_on
from eyas_host.recipe import Recipe
from eyas_host.recipe.run import RunSection
from eyas_host.recipe.training import StudentSection, TeacherSection
from eyas_host.support.files import private_caches
from tests.support.inside import eyas
from tests.support.shapes import SHAPES, draw_folder

BUILT = {"version": "2.13.0", "cuda": "13.0", "hip": None, "available": False, "built_for": [], "gpus": []}
CARD = "NVIDIA L4, 580.95.05, 23034\n"
SEEN = {
    "available": True,
    "built_for": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_120"],
    "gpus": [{"name": "NVIDIA L4", "capability": [8, 9]}],
}


def context(*, job: Any = None, smi: str | None = None, root: Path = Path("/nowhere"), **more: Any) -> Context:
    """A fake workstation."""

    def run(command: Sequence[str], timeout_s: float) -> str | None:
        return smi if command[0] == "nvidia-smi" else None

    def work(name: str, arguments: Mapping[str, object], timeout_s: float) -> Any:
        if isinstance(job, Exception):
            raise job
        return job(name, arguments) if callable(job) else job

    facts = {"which": lambda name: None, "environment": {}, "cpus": lambda: 8, "free": lambda path: 10**12}
    return Context(run=run, job=work, root=root, **(facts | more))


def recipe(**sections: Any) -> Recipe:
    return Recipe(run=sections.pop("run", RunSection(name="toy")), **sections)


# GPU, driver, torch


@pytest.mark.parametrize(
    ("built", "smi", "environment", "status", "words"),
    [
        ({}, None, {}, "green", "there is no GPU"),
        ({"cuda": None}, None, {}, "green", "CPUs only"),
        ({"cuda": None}, CARD, {}, "yellow", "there is a GPU"),
        (SEEN, CARD, {}, "green", "uses NVIDIA L4"),
        ({}, CARD.replace("580.95.05", "570.86.15"), {}, "red", "570.86.15 is too old"),
        ({"cuda": "12.8"}, CARD.replace("580.95.05", "520.61.05"), {}, "red", "520.61.05 is too old"),
        ({}, CARD, {}, "red", "cannot use the GPU"),
        ({}, CARD, {"CUDA_VISIBLE_DEVICES": ""}, "yellow", "hides the GPU"),
        (SEEN | {"gpus": [{"name": "GTX 1080", "capability": [6, 1]}]}, CARD, {}, "red", "GTX 1080 (sm_61)"),
        ({"hip": "6.4"}, None, {}, "yellow", "ROCm"),
    ],
)
def test_torch_against_driver_and_gpu(
    built: dict[str, Any], smi: str | None, environment: dict[str, str], status: str, words: str
) -> None:
    found = gpu.torch_build(context(job=BUILT | built, smi=smi, environment=environment))
    assert (found.status, words in found.text) == (status, True), found
    assert bool(found.fix) == (status != "green")


def test_driver(tmp_path: Path) -> None:
    assert gpu.driver(context()).status == "grey"
    found = gpu.driver(context(smi=CARD))
    assert found.status == "green" and "NVIDIA L4 (23034 MB), driver 580.95.05" in found.text
    assert gpu.driver(context(smi="Quadro P600, 580.95.05, 1998\n")).status == "yellow"
    assert gpu.driver(context(which=lambda name: "/usr/bin/nvidia-smi")).status == "red"
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text("NVRM version")
    assert gpu.driver(context(root=tmp_path)).status == "red"
    asked = gpu.driver(context(recipe=recipe(run=RunSection(name="toy", device="cuda"))))
    assert asked.status == "red" and "device = 'cuda'" in asked.text


@pytest.mark.parametrize(
    ("capability", "built_for", "expected"),
    [
        ([8, 9], ["sm_86"], True),
        ([8, 0], ["sm_86"], False),
        ([9, 0], ["sm_86"], False),
        ([12, 0], ["sm_90", "compute_90"], True),
        ([12, 0], ["sm_120"], True),
        ([9, 0], ["sm_90a"], True),
        ([6, 1], ["sm_75", "compute_75"], False),
        ([8, 6], [], False),
    ],
)
def test_code_runs_on_a_gpu(capability: list[int], built_for: list[str], expected: bool) -> None:
    assert runs_on(capability, built_for) is expected


# The install


def test_broken_and_crashing_libraries_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_one.py").write_text("raise ImportError('libfoo.so.1: cannot open shared object file')")
    (tmp_path / "crashing_one.py").write_text("import os; os.abort()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(software, "LIBRARIES", ("json", "broken_one", "crashing_one", "msgspec", "absent_one"))
    found = software.libraries(Context())
    assert found.status == "red" and "make install" in found.fix
    assert "broken_one: ImportError: libfoo.so.1" in found.text and "crashing_one: the process was killed" in found.text
    assert "absent_one: ModuleNotFoundError" in found.text and "json" not in found.text
    monkeypatch.setattr(software, "LIBRARIES", ("json", "msgspec"))
    assert software.libraries(Context()) == Finding("green", f"json 2.0.9, msgspec {msgspec.__version__}")


def test_extras_and_versions() -> None:
    here = context()
    assert software.extras(here).status == "green"
    missing = software.extras(context(version=lambda name: None if name == "torch" else here.version(name)))
    assert missing.status == "red" and "torch missing" in missing.text
    old = software.extras(context(version=lambda name: "0.4" if name == "timm" else here.version(name)))
    assert old.status == "red" and "timm 0.4" in old.text
    fleet = software.extras(context(version=lambda name: None if name == "amqtt" else here.version(name)))
    assert fleet.status == "yellow" and "amqtt missing" in fleet.text
    other = software.versions(context(version=lambda name: "0.0.1" if name == "timm" else here.version(name)))
    assert other.status == "yellow" and "timm 0.0.1 (tested: 1." in other.text


def test_without_packaging_the_extras_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    found = software.extras(context())
    assert found.status == "red" and "packaging" in found.text


def hub(
    *,
    unreachable: str = "",
    teacher: Sequence[str] = (),
    student: Sequence[str] = (),
    damaged: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    models = {
        "t": {"hub": True, "places": list(teacher), "damaged": damaged or {}},
        "s": {"hub": True, "places": list(student), "damaged": {}},
    }
    return {"endpoint": "huggingface.co", "unreachable": unreachable, "models": models, "files": files or {}}


@pytest.mark.parametrize(
    ("known", "teacher", "status", "words"),
    [
        (hub(), {}, "green", "(huggingface.co) answers; teacher t: from the hub; student s: from the hub"),
        (hub(unreachable="no route"), {}, "red", "teacher t: none available; student s: random"),
        (
            hub(unreachable="no route", teacher=["packaged"]),
            {},
            "yellow",
            "teacher t: packaged weights; student s: random",
        ),
        (hub(unreachable="no route", teacher=["cache"], student=["cache"]), {}, "green", "from the hub's cache here"),
        (hub(unreachable="no route", teacher=["packaged"]), {"weights": "hub"}, "red", "teacher t: none available"),
        (hub(), {"weights": "random"}, "green", "random, as set in the recipe"),
        (hub(unreachable="no route"), {"weights": "pretrained"}, "red", "teacher t: none available"),
        (hub(), {"weights": "file", "weights_file": "/nowhere.pt"}, "red", "/nowhere.pt is missing"),
        (hub(damaged={"cache": "/c: damaged"}), {}, "red", "teacher t: none available; student s: from the hub; /c: "),
        (
            hub(damaged={"cache": "/c: damaged"}, teacher=["packaged"]),
            {},
            "yellow",
            "teacher t: packaged weights; student s: from the hub; /c: damaged",
        ),
        (hub(files={__file__: "it is no weights"}), {"weights": "file", "weights_file": __file__}, "red", "no weights"),
        (hub(files={__file__: ""}), {"weights": "file", "weights_file": __file__}, "green", "from its file"),
    ],
)
def test_which_weights_would_be_used(known: dict[str, Any], teacher: dict[str, Any], status: str, words: str) -> None:
    settings = recipe(teacher=TeacherSection(model="t", **teacher), student=StudentSection(model="s"))
    found = software.weights(context(job=known, recipe=settings))
    assert (found.status, words in found.text) == (status, True), found


def test_jobs_share_a_process_unless_it_crashes() -> None:
    calls: list[str] = []
    crashes = True

    def run(job: str, arguments: Mapping[str, object], timeout_s: float) -> Any:
        calls.append(job)
        if job != "together":
            return f"{job} alone"
        if crashes:
            raise JobError("the process was killed by SIGSEGV", "killed")
        return {"a": {"result": 1}, "b": {"error": "no such library", "kind": "ImportError"}}

    jobs = SharedJobs({"a": {}, "b": {"x": 1}}, run)
    assert [jobs("a", {}, 1.0), jobs("b", {"x": 1}, 1.0)] == ["a alone", "b alone"]
    assert calls == ["together", "a", "b"]
    calls.clear()
    crashes = False
    jobs = SharedJobs({"a": {}, "b": {"x": 1}}, run)
    assert jobs("a", {}, 1.0) == 1
    with pytest.raises(JobError, match="no such library") as caught:
        jobs("b", {"x": 1}, 1.0)
    assert caught.value.kind == "ImportError" and calls == ["together"]
    assert jobs("b", {"x": 2}, 1.0) == "b alone"


def test_damaged_weights_are_found_by_the_real_job(
    tmp_path: Path, no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--timm--mobilenetv3_small_100.lamb_in1k/snapshots/x"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(b"cut")
    (snapshot / "../../refs").resolve().mkdir()
    (snapshot / "../../refs/main").write_text("x")
    rubbish = tmp_path / "rubbish.pt"
    rubbish.write_bytes(b"rubbish")
    found = work.weights(models=["mobilenetv3_small_100", "tf_efficientnet_lite0"], files=[str(rubbish)])
    assert found["unreachable"] == "HF_HUB_OFFLINE is set"
    assert str(snapshot / "model.safetensors") in found["models"]["mobilenetv3_small_100"]["damaged"]["cache"]
    assert found["models"]["tf_efficientnet_lite0"]["places"] == ["packaged"]
    assert str(rubbish) in found["files"][str(rubbish)]


def test_programs() -> None:
    found = software.programs(context(which=lambda name: None if name.endswith("rsync") else f"/usr/bin/{name}"))
    assert found.status == "yellow" and "rsync (for eyas flash)" in found.text and found.fix == "apt install rsync"


def shim(folder: Path, name: str, script: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_gpu_without_nvcc_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, toolkit = tmp_path / "bin", tmp_path / "cuda"
    monkeypatch.setenv("PATH", str(path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)

    def look(*, compiled: bool = False, folder: object = "/k", **more: Any) -> Finding:
        absent = {"which": lambda name: None if name.startswith("/usr/local/cuda") else shutil.which(name)}
        return software.int8_kernels(
            Context(job=lambda *work: {"compiled": compiled, "folder": str(folder)}, **(absent | more))
        )

    without = look()  # a GPU
    assert without.status == "green" and "none needed" in without.text
    shim(path, "nvidia-smi", f"echo '{CARD.strip()}'")
    without = look()
    assert without.status == "yellow" and "no nvcc" in without.text and "slower" in without.text
    assert "CUDA toolkit" in without.fix and "CUDA_HOME" in without.fix
    assert look(recipe=recipe(run=RunSection(name="toy", device="cpu"))).status == "green"
    assert look(compiled=True).status == "green"
    kept_elsewhere = look(compiled=True, folder=private_caches() / "torch_extensions/k")
    assert kept_elsewhere.status == "yellow" and "the home cannot be written to" in kept_elsewhere.text
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert f"no nvcc in CUDA_HOME ({toolkit})" in look().text
    shim(toolkit / "bin", "nvcc", "exit 0")
    assert look().status == "green"
    monkeypatch.delenv("CUDA_HOME")
    shim(path, "nvcc", "exit 0")
    assert look().status == "green"


# The machine


def kernel(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_max", ".max").replace("_current", ".current")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


_GROUP = {"proc__self__cgroup": "0::/\n"}
"""This process's control group, as a container shows it."""


def test_memory_of_the_machine_and_of_a_container(tmp_path: Path) -> None:
    root = kernel(tmp_path, proc__meminfo="MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n", **_GROUP)
    assert machine.memory(context(root=root)).status == "green"
    kernel(root, sys__fs__cgroup__memory_max="8000000000", sys__fs__cgroup__memory_current="3000000000")
    found = machine.memory(context(root=root))
    assert found.status == "yellow" and "17.2 GB available, of which this container may take 5.0 GB" in found.text
    kernel(root, sys__fs__cgroup__memory_current="7500000000")
    assert machine.memory(context(root=root)).status == "red"
    kernel(root, sys__fs__cgroup__memory_max="max")
    assert machine.memory(context(root=root)).status == "green"


def test_cores(tmp_path: Path) -> None:
    root = kernel(tmp_path, sys__fs__cgroup__cpu_max="150000 100000", **_GROUP)
    assert "8 cores, of which this container may use 2" in machine.cores(context(root=root)).text
    busy = kernel(tmp_path, proc__pressure__cpu="some avg10=90.00 avg60=80.00 avg300=70.00 total=1\n")
    assert machine.cores(context(root=busy)).status == "yellow"
    assert machine.cores(context(environment={"OMP_NUM_THREADS": "64"})).status == "yellow"


def test_space_for_the_views(tmp_path: Path) -> None:
    draw_folder(tmp_path / "images", count=10, labels=SHAPES[:2])
    path = tmp_path / "recipe.toml"
    path.write_text('[run]\nname = "toy"\n[data]\npath = "images"\n[student]\nviews = 100000\ncache_gb = 0.0\n')
    from eyas_host.recipe.load import load_recipe

    settings = {"recipe": load_recipe(path), "recipe_path": path, "runs": tmp_path / "runs"}
    need = 20 * 100_000 * 3 * 128**2
    for free, status in ((need + 20 * 10**9, "green"), (need + 5 * 10**9, "yellow"), (need, "red")):
        found = machine.disk(context(free=lambda place, free=free: free, **settings))
        assert found.status == status and f"{need / 1e9:.2f} GB" in found.text
    bounded = settings | {"recipe": load_recipe(path, ["student.cache_gb=20.0"])}
    assert "cache_gb" in machine.disk(context(**bounded)).text
    assert machine.recipe(context(**settings)).text.endswith("20 images")
    assert machine.shared_memory(context(root=tmp_path, **settings)).status == "yellow"


# All of it


def test_no_check_raises_when_nothing_works() -> None:
    dead = context(job=JobError("the process was killed by SIGSEGV", "killed"), version=lambda name: None)
    found = list(run_checks(dead, CHECKS))
    assert len(found) == len(CHECKS) == len({row.check for row in found})
    assert not [row for row in found if "the check failed" in row.finding], found
    assert {row.check for row in found if row.status == "red"} >= {"libraries", "torch build", "weights", "extras"}


def quick(monkeypatch: pytest.MonkeyPatch, *checks: Callable[[Context], Finding]) -> None:
    monkeypatch.setattr("eyas_host.doctor.CHECKS", checks)


def test_doctor_prints_the_fix_and_exits_with_1_if_a_check_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick(monkeypatch, machine.recipe, software.python)
    assert eyas(tmp_path, "doctor").code == 0
    (tmp_path / "recipe.toml").write_text('[run]\nname = "toy"\n[data]\npath = "absent"\n')
    done = eyas(tmp_path, "doctor", "recipe.toml")
    assert done.code == 1 and "no such folder" in done.out and "-> see [data]" in done.out and not done.err
    assert done.out.splitlines()[-1] == "1 green, 0 yellow, 1 red, 0 not checked"
    done = eyas(tmp_path, "doctor", "recipe.toml", "--set", "teacher.rat=1")
    assert done.code == 1 and "unknown key" in done.out
    assert "No such file" in eyas(tmp_path, "doctor", "absent.toml").out
    report = json.loads(eyas(tmp_path, "doctor", "recipe.toml", "--json").out)
    assert report["worst"] == "red" and [row["status"] for row in report["findings"]] == ["red", "green"]
