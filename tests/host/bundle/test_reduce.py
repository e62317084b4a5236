"""A bundle with only what a kind of device runs: verified like any other, and traceable to the whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.config import ModelSection
from eyas_device.errors import BundleError
from eyas_device.updates.judge import prove
from eyas_host.bundle.reduce import TARGETS, needed_artefacts, pack_target, reduce_bundle, runtimes_of
from eyas_host.cli import stages


def reduced(root: Path, folder: Path, *runtimes: str, artefact: str = "") -> Bundle:
    bundle = Bundle.open(root)
    return Bundle.open(reduce_bundle(bundle, folder, needed_artefacts(bundle, runtimes, artefact)))


def test_only_the_preferred_artefact_is_kept_and_the_golden_check_holds(pristine_bundle: Path, tmp_path: Path) -> None:
    small = reduced(pristine_bundle, tmp_path / "small", "litert")
    assert [artefact.name for artefact in small.manifest.artefacts] == ["litert-int8"]
    assert small.manifest.use == {"litert": "litert-int8"} and set(small.manifest.reasons) == {"litert"}
    assert {path.name for path in small.root.iterdir()} == {
        "manifest.json",
        "litert-int8.tflite",
        "golden.npz",
        "reference.npz",
    }
    assert prove(small.root, ModelSection(), tmp_path / "state").good.startswith("tiny-shapes 1.2.3")
    whole = Bundle.open(pristine_bundle)
    assert small.identity == whole.identity == sha256(pristine_bundle / MANIFEST) != sha256(small.root / MANIFEST)
    again = reduced(pristine_bundle, tmp_path / "again", "tflite")
    assert (again.root / MANIFEST).read_bytes() == (small.root / MANIFEST).read_bytes()
    twice = reduced(reduced(pristine_bundle, tmp_path / "two", "litert", "onnx").root, tmp_path / "one", "litert")
    assert twice.identity == whole.identity


def test_float_where_the_bundle_prefers_it_and_what_the_configuration_names(
    pristine_bundle: Path, tmp_path: Path
) -> None:
    small = reduced(pristine_bundle, tmp_path / "small", "openvino", artefact="litert-fp32")
    assert [artefact.name for artefact in small.manifest.artefacts] == ["litert-fp32", "openvino-fp32"]
    assert small.manifest.use == {"litert": "litert-fp32", "openvino": "openvino-fp32"}
    with pytest.raises(BundleError, match=r"no artefact 'x', which \[model\] artefact names; it has: litert-fp32"):
        reduced(pristine_bundle, tmp_path / "other", "litert", artefact="x")


def test_fields_of_later_versions_stay(bundle_root: Path, edit_manifest: Callable[..., None], tmp_path: Path) -> None:
    edit_manifest(signatures=[{"key": "k"}])
    small = reduced(bundle_root, tmp_path / "small", "litert")
    assert msgspec.json.decode((small.root / MANIFEST).read_bytes())["signatures"] == [{"key": "k"}]


@given(runtimes=st.sets(st.sampled_from(["litert", "tflite", "openvino", "onnx", "onnx-cuda"]), min_size=1))
@settings(max_examples=12, deadline=None)
def test_any_choice_is_a_valid_bundle(
    runtimes: set[str], pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    small = reduced(pristine_bundle, tmp_path_factory.mktemp("any") / "small", *runtimes)
    assert small.identity == sha256(pristine_bundle / MANIFEST)
    listed = {file.path for file in small.manifest.files()} | {MANIFEST}
    assert {path.name for path in small.root.iterdir()} == listed
    small.golden()


def test_names_that_are_not_known(pristine_bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"--runtime tensorrt: not a runtime; allowed are litert, .*, all"):
        runtimes_of(["litert", "tensorrt"])
    assert runtimes_of(["litert", "all"]) is None
    with pytest.raises(BundleError, match="--target pi6: not a kind of device; allowed are pi3, pi4, pi5, jetson"):
        pack_target(pristine_bundle, "pi6")


@pytest.mark.parametrize("origin", ["x", "0" * 63, "../" * 22, "\x1b[2J"])
def test_an_origin_that_is_no_digest(bundle_root: Path, edit_manifest: Callable[..., None], origin: str) -> None:
    edit_manifest(origin=origin)
    with pytest.raises(BundleError, match="the sha256 of a manifest is needed"):
        Bundle.open(bundle_root)


def test_pack_for_a_target(bundle_root: Path) -> None:
    app = typer.Typer()
    app.command()(stages.pack)
    done = CliRunner().invoke(app, [str(bundle_root), "--target", "pi5"])
    assert done.exit_code == 0, done.output
    final = bundle_root.with_name("bundle-pi5")
    assert done.stdout.strip() == str(final)
    assert [artefact.name for artefact in Bundle.open(final).manifest.artefacts] == ["litert-int8"]
    assert pack_target(bundle_root, "pi5") == final and pack_target(bundle_root, "all") == bundle_root
    assert not list(bundle_root.parent.glob(".*")), "a temporary folder was left behind"
    for target in TARGETS:
        Bundle.open(pack_target(bundle_root, target))
    (bundle_root.with_name("bundle-pi4") / MANIFEST).unlink()
    with pytest.raises(BundleError, match="bundle-pi4: is there and not a bundle; move it away"):
        pack_target(bundle_root, "pi4")
