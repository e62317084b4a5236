"""A flash sends what the device runs, over a real SSH server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from eyas_device.bundle import MANIFEST, Bundle, read_manifest, sha256
from eyas_device.errors import BundleError
from eyas_device.updates.slots import Slots
from eyas_host.fleet.connect.preflight import DeviceFacts, Layout, inspect_device
from eyas_host.fleet.connect.ssh import FleetError, Remote, Target
from eyas_host.fleet.connect.wheels import build_wheel, fetch
from eyas_host.fleet.deploy.plan import InstallPlan
from eyas_host.fleet.deploy.sending import Sending
from tests.support.bundles import edit, entry
from tests.support.ssh_board import Board

MOST = 5_000_000
"""Bytes of a flash beside the wheels that eyas-device depends on."""
_LARGE = 8_000_000
_SIZES = {"litert-int8": 1_900_000, "onnx-fp32": _LARGE}


@pytest.fixture
def large_bundle(bundle_root: Path) -> Path:
    """A bundle whose artefacts are as large as those of a MobileNetV3-small: nothing that can be compressed away."""
    artefacts = msgspec.to_builtins(read_manifest(bundle_root).artefacts)
    for artefact in artefacts:
        if size := _SIZES.get(artefact["name"]):
            path = bundle_root / artefact["files"][0]["path"]
            path.write_bytes(path.read_bytes() + os.urandom(size))
            artefact["files"] = [msgspec.to_builtins(entry(path))]
    return edit(bundle_root, artefacts=artefacts)


def artefacts(state: Path) -> list[str]:
    current = Slots(state).current()
    assert current is not None
    return [artefact.name for artefact in Bundle.open(current).manifest.artefacts]


def test_only_what_the_runtime_needs_is_sent(board: Board, large_bundle: Path) -> None:
    [planned] = board.flash(large_bundle, runtimes=("litert",), dry_run=True)
    assert "litert-int8 (--runtime), at most 1.9 MB" in planned.detail
    [first] = board.flash(large_bundle, runtimes=("litert",))
    assert first.status == "flashed" and first.sent_bytes < MOST, first
    assert artefacts(board.state) == ["litert-int8"]
    [state] = [state for state in Slots(board.state).states() if state.current]
    assert state.identity == sha256(large_bundle / MANIFEST) != state.manifest_sha256
    [again] = board.flash(large_bundle, runtimes=("litert",))
    assert (again.status, again.sent_bytes) == ("unchanged", 0)
    [whole] = board.flash(large_bundle, runtimes=("all",))
    assert whole.status == "flashed" and whole.sent_bytes > _LARGE
    assert artefacts(board.state) == ["litert-fp32", "litert-int8", "openvino-fp32", "onnx-fp32"]
    assert not any("had another" in line for line in board.lines), "the whole bundle is not another model"
    [held] = board.flash(large_bundle, runtimes=("litert",))
    assert held.status == "unchanged", "the whole bundle holds what was asked for"


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(("runtime", "offline"), [("onnx", True), ("litert", False)])
def test_an_environment_has_the_runtime(board: Board, bundle_root: Path, runtime: str, offline: bool) -> None:
    """Wheels that were sent are unpacked; where the device asks its index, pip runs without being installed."""
    [first] = board.flash(bundle_root, python=None, runtimes=(runtime,), offline=offline)
    assert first.status == "flashed", (first, board.lines)
    assert first.sent_bytes - first.dependency_bytes < MOST - _SIZES["litert-int8"], "with a real network's size"
    assert (first.dependency_bytes > MOST) == offline
    environment = board.root / "opt/eyas/venv"
    code = f"import {'onnxruntime' if runtime == 'onnx' else 'ai_edge_litert'} as found; print(found.__file__)"
    command = [environment / "bin/python", "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve().is_relative_to(environment.resolve())
    assert not list(environment.glob("lib/python3*/site-packages/pip"))
    agent = subprocess.run([environment / "bin/eyas-device", "--version"], capture_output=True, text=True, check=False)
    assert agent.stdout.startswith("eyas-device ")
    [again] = board.flash(bundle_root, python=None, runtimes=(runtime,), offline=offline)
    assert (again.status, again.sent_bytes) == ("unchanged", 0)


@pytest.mark.usefixtures("index")
def test_a_folder_of_wheels_is_resolved_here(board: Board, bundle_root: Path, tmp_path: Path) -> None:
    """A wheel that is missing is noticed before anything is sent; one that the device does not need stays here."""
    (wheels := tmp_path / "wheels").mkdir()
    with Remote(Target.parse(board.name), board.access) as remote:
        fetch(wheels, build_wheel(wheels), inspect_device(remote, Layout(str(board.root))))
    other = next(wheels.glob("tqdm-*.whl"))
    shutil.copy(other, wheels / other.name.replace("tqdm", "unneeded"))
    [numpy] = wheels.glob("numpy-*.whl")
    numpy = numpy.rename(tmp_path / numpy.name)
    options: dict[str, object] = {"python": None, "offline": True, "wheel_dir": wheels}
    [refused] = board.flash(bundle_root, **options)
    assert refused.status == "failed" and "numpy" in refused.detail and refused.sent_bytes == 0, refused
    assert board.version() is None and not (board.root / "opt/eyas/incoming").exists()
    numpy.rename(wheels / numpy.name)
    [first] = board.flash(bundle_root, **options)
    assert first.status == "flashed", (first, board.lines)
    assert first.dependency_bytes == sum(
        wheel.stat().st_size for wheel in wheels.iterdir() if not wheel.name.startswith(("eyas_device", "unneeded"))
    )
    assert board.flash(bundle_root, **options)[0].status == "unchanged"


def test_the_configuration_on_the_device_decides(
    board: Board,
    bundle_root: Path,
    tmp_path: Path,
) -> None:
    (board.root / "etc/eyas").mkdir(parents=True)
    (board.root / "etc/eyas/device.toml").write_text('[camera]\nsource = "fake:"\n[model] # ours\n  runtime = "onnx"\n')
    [result] = board.flash(bundle_root)
    assert result.ok and artefacts(board.state) == ["onnx-fp32"], result
    assert any("of the bundle it gets onnx-fp32 ([model] runtime)" in line for line in board.lines)
    sent = tmp_path / "device.toml"
    sent.write_text('[camera]\nsource = "fake:"\n[model]\nartefact = "litert-fp32"\n')
    [result] = board.flash(bundle_root, config=sent)
    assert result.ok and artefacts(board.state) == ["litert-fp32"], result
    [result] = board.flash(bundle_root, config=sent, runtimes=("openvino",))
    assert result.ok and artefacts(board.state) == ["litert-fp32", "openvino-fp32"], result
    sent.write_text('[camera]\nsource = "fake:"\n[model]\nruntime = "litert"\n')
    [result] = board.flash(bundle_root, config=sent, runtimes=("openvino",))
    assert result.status == "failed"
    assert result.detail == f"--runtime openvino: [model] runtime is litert in {sent}"


def test_a_mistake_touches_no_device(bundle_root: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a runtime; allowed are litert"):
        Sending(bundle_root, tmp_path, ("hailo",))
    kept = msgspec.to_builtins(read_manifest(bundle_root).artefacts[:2])
    edit(bundle_root, artefacts=kept, use={"litert": "litert-int8"})
    with pytest.raises(BundleError, match="no artefact '' for runtime 'onnx'"):
        Sending(bundle_root, tmp_path, ("onnx",))


def plan(root: Path, **fields: object) -> InstallPlan:
    values: dict[str, object] = {"model": "m 1", "manifest_sha256": sha256(root / MANIFEST), "bundle_bytes": 1}
    return InstallPlan(bundle=root, **(values | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("facts", "asked", "names", "extras"),
    [
        ({}, (), ["litert-int8"], ()),
        ({"model_runtime": "openvino"}, (), ["openvino-fp32"], ("openvino",)),
        ({"model_runtime": "tflite"}, (), ["litert-int8"], ("tflite",)),
        ({"model_runtime": "nonsense"}, (), ["litert-int8"], ()),
        ({"model_artefact": "onnx-fp32"}, (), ["onnx-fp32"], ("onnx",)),
        ({}, ("onnx", "litert"), ["litert-int8", "onnx-fp32"], ("onnx",)),
    ],
)
def test_what_the_environment_of_eyas_gets(
    pristine_bundle: Path,
    tmp_path: Path,
    facts: dict[str, str],
    asked: tuple[str, ...],
    names: list[str],
    extras: tuple,
) -> None:
    got, _ = Sending(pristine_bundle, tmp_path, asked).for_device(plan(pristine_bundle), DeviceFacts(**facts))
    assert [artefact.name for artefact in Bundle.open(got.bundle).manifest.artefacts] == names
    assert got.extras == extras and got.bundle_bytes < 60_000


def test_a_pin_that_the_configuration_drives_brings_its_library(pristine_bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "device.toml"
    config.write_text(
        '[camera]\nsource = "fake:"\n[[output]]\nkind = "gpio"\npin = 17\nlabels = ["disc"]\nsafe = "off"\n'
    )
    got, _ = Sending(pristine_bundle, tmp_path).for_device(plan(pristine_bundle, config=config), DeviceFacts())
    assert got.extras == ("gpio",)


def test_an_interpreter_of_ones_own_gets_what_it_can_import(pristine_bundle: Path, tmp_path: Path) -> None:
    sending = Sending(pristine_bundle, tmp_path)
    ready = plan(pristine_bundle, python="/usr/bin/python3")
    got, why = sending.for_device(ready, DeviceFacts(runtimes="tflite onnx"))
    assert why == "litert-int8, onnx-fp32 (installed for /usr/bin/python3)" and got.extras == ()
    got, why = sending.for_device(ready, DeviceFacts())
    assert got == ready and why == "all 4 artefacts (no runtime of its artefacts was found)"


@pytest.mark.parametrize(
    ("text", "runtime", "artefact"),
    [
        ('[model]\nruntime = "onnx"\n', "onnx", ""),
        ('[camera]\nsource = "fake:"\n[model]\n artefact="litert-fp32" # here\n[loop]\nfps = 5\n', "", "litert-fp32"),
        ('[camera]\nruntime = "onnx"\n[model]\nthreads = 2\n[loop]\n', "", ""),
        ('[model]\n# runtime = "onnx"\nruntime = "$(reboot)"\n', "", ""),
        ('[telemetry]\npassword = "S3cret"\n', "", ""),
    ],
)
def test_the_inspection_reads_the_model_section_alone(
    board: Board,
    text: str,
    runtime: str,
    artefact: str,
) -> None:
    (board.root / "etc/eyas").mkdir(parents=True)
    (board.root / "etc/eyas/device.toml").write_text(text)
    with Remote(Target.parse(board.name), board.access) as remote:
        facts = inspect_device(remote, Layout(str(board.root)))
    assert (facts.model_runtime, facts.model_artefact) == (runtime, artefact)
    assert "S3cret" not in repr(facts)


def test_a_conflict_is_named_before_anything_is_sent(pristine_bundle: Path, tmp_path: Path) -> None:
    sending = Sending(pristine_bundle, tmp_path, ("litert",))
    with pytest.raises(FleetError, match=r"\[model\] runtime is onnx in /etc/eyas/device.toml"):
        sending.for_device(plan(pristine_bundle), DeviceFacts(model_runtime="onnx"))
