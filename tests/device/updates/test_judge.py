"""`check`, `install`, the doctor and the agent prove the same: files, settings, reference and predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from eyas_device.bundle import GOLDEN, MANIFEST, REFERENCE, Bundle, Manifest, read_manifest
from eyas_device.cli import main as cli
from eyas_device.config import Config, ModelSection
from eyas_device.doctor import probes
from eyas_device.doctor.finding import Context
from eyas_device.doctor.jobs import JOBS
from eyas_device.errors import BundleError, CheckFailed, EyasError
from eyas_device.reference import reference_arrays
from eyas_device.support.processes import JobError
from eyas_device.updates.golden import check_contents
from eyas_device.updates.slots import Slots
from tests.support import tiny
from tests.support.bundles import edit, entry, rewrite

COVERED: dict[str, tuple[Any, ...]] = {
    "labels": (["disc", "cross", "stripes"], ["stripes", "cross", "disc"], ["cross", "disc", "Stripes"]),
    "preprocessing": (
        {"size": 16, "fit": "stretch"},
        {"size": 16, "fit": "pad"},
        {"size": 16, "interpolation": "linear"},
        {"size": 16, "crop_fraction": 0.99},
        {"size": 16, "decode": "reduced"},
        {"size": 17},
    ),
    "confidence": (
        {"temperature": 1.501, "threshold": 0.9},
        {"temperature": 1.5, "threshold": 0.89},
        {"temperature": 1.5, "threshold": 0.9, "bias": [0, 1e-6, 0]},
    ),
    "decision": ({"costs": [[0, 1, 1], [1, 0, 1], [1.01, 1, 0]]},),
    "golden_tolerance": (1.0, 0.06),
    "governance": ({"images": "never"},),
    "reference": (None,),
}
"""Field of the manifest -> changes that the golden images notice, however small."""
PROVEN = {
    "schema": "another one is not read",
    "artefacts": "each file has its hash, each model its recorded predictions",
    "use": "whatever it prefers gives the recorded predictions",
    "golden": "its file has the hash",
    "min_agent_version": "a newer one is refused",
}
FREE = {"name", "version", "reasons", "lineage", "evidence", "notices", "created", "origin"}
"""Fields that change no prediction: identity and documentation."""


def test_every_field_of_the_manifest_is_covered_proven_or_changes_no_prediction() -> None:
    fields = set(Manifest.__struct_fields__)
    assert fields == set(COVERED) | set(PROVEN) | FREE
    assert len(COVERED) + len(PROVEN) + len(FREE) == len(fields)


@pytest.mark.parametrize(("field", "value"), [(f, value) for f, values in COVERED.items() for value in values])
def test_a_field_that_was_edited_by_hand(field: str, value: object, bundle_root: Path) -> None:
    edit(bundle_root, **{field: value})
    with pytest.raises(CheckFailed, match=f"not what the golden images were packed with: (another )?{field}"):
        check_contents(Bundle.open(bundle_root))


def test_the_reference_of_another_model(bundle_root: Path) -> None:
    """Whole, with its right hash, and of other images."""
    others = [np.full((16, 16, 3), n, np.uint8) for n in range(90)]
    np.savez(bundle_root / REFERENCE, **reference_arrays(tiny.reference_of(others[:60], others[60:])))
    edit(bundle_root, reference=msgspec.to_builtins(entry(bundle_root / REFERENCE)))
    with pytest.raises(CheckFailed, match="another reference"):
        check_contents(Bundle.open(bundle_root))


@pytest.mark.parametrize("field", sorted(FREE))
def test_a_field_that_changes_no_prediction(field: str, bundle_root: Path) -> None:
    values: dict[str, object] = {"reasons": {}, "lineage": {"data": "1"}, "evidence": {}, "notices": ["Mine."]}
    values["origin"] = "ab" * 32
    edit(bundle_root, **{field: values.get(field, "7.7.7")})
    check_contents(Bundle.open(bundle_root))


def test_an_agent_that_derives_other_labels(bundle_root: Path) -> None:
    """The recorded probabilities, with the same settings, give other labels or flags than were recorded."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays["uncertain.onnx-fp32"] = ~arrays["uncertain.onnx-fp32"]

    rewrite(bundle_root, GOLDEN, change)
    with pytest.raises(CheckFailed, match=r"derives other predictions .* for onnx-fp32"):
        check_contents(Bundle.open(bundle_root))


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.update(settings=np.frombuffer(b'{"labels": 3}', np.uint8)),
        lambda arrays: arrays.update(settings=np.frombuffer(b"\xff", np.uint8)),
        lambda arrays: arrays.pop("label.onnx-fp32"),
        lambda arrays: arrays.update({"uncertain.onnx-fp32": np.zeros(3, np.bool_)}),
        lambda arrays: arrays.update({"label.onnx-fp32": np.array("cross")}),
        lambda arrays: arrays.update(image_x=arrays.pop("image_00")),
    ],
)
def test_malformed_records(change: Callable[[dict[str, np.ndarray]], object], bundle_root: Path) -> None:
    rewrite(bundle_root, GOLDEN, change)
    with pytest.raises(BundleError, match=r"golden\.npz: .*pack the bundle again"):
        check_contents(Bundle.open(bundle_root))


# --- the same verdict everywhere -------------------------------------------------------------------------------------


def _garbage(root: Path) -> None:
    for artefact in read_manifest(root).artefacts:
        (root / artefact.files[0].path).write_bytes(b"no model")
    artefacts = msgspec.json.decode((root / MANIFEST).read_bytes())["artefacts"]
    for artefact in artefacts:
        artefact["files"] = [msgspec.to_builtins(entry(root / file["path"])) for file in artefact["files"]]
    edit(root, artefacts=artefacts)


def _no_archive(root: Path) -> None:
    (root / REFERENCE).write_bytes(b"PK\x03\x04 no archive")
    edit(root, reference=msgspec.to_builtins(entry(root / REFERENCE)))


def _flipped(root: Path) -> None:
    data = bytearray((root / "onnx-fp32.onnx").read_bytes())
    data[40] ^= 1
    (root / "onnx-fp32.onnx").write_bytes(data)


CORRUPTIONS: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "labels swapped": (
        lambda root: edit(root, labels=["disc", "cross", "stripes"]),
        1,
        'labels ["disc","cross","stripes"] in place of ["cross","disc","stripes"]',
    ),
    "threshold": (
        lambda root: edit(root, confidence={"temperature": 1.5, "threshold": 0.1}),
        1,
        "packed with: confidence",
    ),
    "reference not finite": (
        lambda root: rewrite(root, REFERENCE, lambda arrays: arrays["mean"].__setitem__(3, np.nan)),
        2,
        "reference.npz: malformed",
    ),
    "reference of other shapes": (
        lambda root: rewrite(root, REFERENCE, lambda arrays: arrays.update(spread=arrays["spread"][:-1])),
        2,
        "reference.npz: malformed",
    ),
    "reference no archive": (_no_archive, 2, "reference.npz: cannot be read"),
    "golden image cut": (
        lambda root: rewrite(root, GOLDEN, lambda arrays: arrays.update(image_03=arrays["image_03"][:-60])),
        2,
        "golden image 3",
    ),
    "no golden images": (lambda root: edit(root, golden=None), 2, "no golden images"),
    "a changed byte": (_flipped, 2, "onnx-fp32.onnx: differs from what the manifest records"),
    "other probabilities": (
        lambda root: rewrite(
            root, GOLDEN, lambda arrays: arrays.update({k: 1 - v for k, v in arrays.items() if k.startswith("p.")})
        ),
        1,
        "derives other predictions",
    ),
}


def _check(root: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return _cli(capsys, "check", root)


def _install(root: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    result = _cli(capsys, "install", root, "--state", state)
    assert Slots(state).current() is None, "a refused bundle became current"
    return result


def _agent(root: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return _cli(capsys, "run", "--bundle", root, "--camera", "fake:?frames=2&size=64x48")


def _doctor(root: Path, state: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def job(name: str, arguments: Any, limit_s: float) -> Any:
        try:
            return JOBS[name](**arguments)
        except EyasError as error:
            raise JobError(str(error), type(error).__name__) from None

    context = Context(config=Config(model=ModelSection(bundle=str(root))), job=job)
    finding = probes.golden(context)
    assert finding.status == "red", finding
    return -1, finding.text


def _cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    capsys.readouterr()
    code = cli([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize("verb", [_check, _install, _agent, _doctor])
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_one_verdict_and_one_reason(
    corruption: str,
    verb: Callable[..., tuple[int, str]],
    bundle_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, code, reason = CORRUPTIONS[corruption]
    spoil(bundle_root)
    (tmp_path / "state").mkdir()
    actual, text = verb(bundle_root, tmp_path / "state", capsys)
    assert actual in (code, -1), text
    assert reason in text


def test_a_real_doctor_sees_a_malformed_reference(bundle_root: Path) -> None:
    spoil, _, reason = CORRUPTIONS["reference not finite"]
    spoil(bundle_root)
    finding = probes.golden(Context(config=Config(model=ModelSection(bundle=str(bundle_root)))))
    assert finding.status == "red" and reason in finding.text


def test_a_malformed_reference_in_the_current_slot_leads_to_the_other_one(
    pristine_bundle: Path, bundle_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = Slots(tmp_path / "state")
    slots.install(pristine_bundle)
    CORRUPTIONS["reference of other shapes"][0](edit(bundle_root, version="9.0.0"))
    slots.install(bundle_root, check=lambda root: None)  # as an agent did that did not look
    config = tmp_path / "device.toml"
    config.write_text(f'[device]\nstate = "{tmp_path / "state"}"\n[camera]\nsource = "fake:?frames=2&size=64x48"\n')
    code, text = _cli(capsys, "run", "--config", config)
    assert code == 0 and "tiny-shapes 1.2.3" in text
    assert "tiny-shapes 9.0.0 was refused" in text and "reference.npz: malformed" in text


def test_check_goes_on_after_a_model_that_cannot_be_loaded(
    bundle_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every artefact gets its short line; what is missing names the command for this machine."""
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, "eyas_device.runtimes.onnx", raising=False)
    _garbage(bundle_root)
    code, text = _cli(capsys, "check", bundle_root)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert code == 1
    assert set(lines) >= {"litert-fp32", "litert-int8", "openvino-fp32", "onnx-fp32"}
    for name in ("litert-fp32", "litert-int8", "openvino-fp32"):
        assert "FAILED" in lines[name] and "cannot be loaded" in lines[name]
    assert "not checked" in lines["onnx-fp32"] and "pip install 'eyas-device[onnx]'" in lines["onnx-fp32"]
    assert "JetPack" not in text and len(lines["onnx-fp32"].replace(sys.executable, "python")) < 160


# --- early bundles, and one version twice ----------------------------------------------------------------------------


def early(root: Path) -> Path:
    """A bundle whose golden images recorded probabilities alone."""

    def strip(arrays: dict[str, np.ndarray]) -> None:
        for name in [name for name in arrays if not name.startswith(("p.", "image_"))]:
            del arrays[name]

    return rewrite(root, GOLDEN, strip)


def test_an_early_bundle_is_good_with_a_notice(
    bundle_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early(bundle_root)
    notice = "packed by an early version"
    code, text = _cli(capsys, "check", bundle_root)
    assert code == 0 and text.count(notice) == 1
    code, text = _cli(capsys, "install", bundle_root, "--state", tmp_path / "state")
    assert code == 0 and notice in text
    finding = probes.golden(
        Context(config=Config(model=ModelSection(bundle=str(bundle_root))), job=lambda n, a, s: JOBS[n](**a))
    )
    assert finding.status == "yellow" and notice in finding.text
    code, _ = _cli(capsys, "run", "--bundle", bundle_root, "--camera", "fake:?frames=2&size=64x48")
    assert code == 0


def test_another_bundle_of_the_same_name_and_version(
    bundle_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install = ("install", bundle_root, "--state", tmp_path / "state")
    assert "notice" not in _cli(capsys, *install)[1]
    assert "notice" not in _cli(capsys, *install)[1], "the same again is nothing to notice"
    old = Slots(tmp_path / "state").states()[0].manifest_sha256[:12]
    edit(bundle_root, notices=["Trained again."])
    code, text = _cli(capsys, *install)
    new = Slots(tmp_path / "state").states()[1].manifest_sha256[:12]
    assert code == 0
    assert f"notice: slot a had another tiny-shapes 1.2.3: digest {old}, now {new}" in text
    edit(bundle_root, notices=["And again."])
    code, text = _cli(capsys, *install, "--json")
    [notice] = msgspec.json.decode(text)["notices"]
    assert "another tiny-shapes 1.2.3" in notice
    edit(bundle_root, version="1.2.4")
    assert "notice" not in _cli(capsys, *install)[1]
