"""A bundle is opened complete and unaltered, or rejected with a `BundleError` that gives the reason."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eyas_device.bundle import GOLDEN, MANIFEST, Bundle, read_manifest
from eyas_device.errors import BundleError
from tests.support import tiny
from tests.support.bundles import entry

Edit = Callable[..., None]
JPEG = cv2.imencode(".jpg", np.full((24, 32, 3), 90, np.uint8))[1].ravel()


def test_an_intact_bundle(bundle_root: Path) -> None:
    bundle = Bundle.open(bundle_root)
    assert bundle.manifest.labels == tiny.LABELS
    assert bundle.path(bundle.artefact("openvino")) == bundle_root / "openvino-fp32.xml"
    golden = bundle.golden()
    assert len(golden.frames) == 6
    assert all(frame.shape == (48, 64, 3) for frame in golden.frames)
    assert set(golden.probabilities) == {a.name for a in bundle.manifest.artefacts}


@pytest.mark.parametrize("name", ["litert-int8.tflite", "openvino-fp32.bin", "onnx-fp32.onnx", GOLDEN])
def test_one_changed_byte(name: str, bundle_root: Path) -> None:
    path = bundle_root / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=f"{name}: differs from what the manifest records"):
        Bundle.open(bundle_root)


def test_a_cut_and_a_missing_file(bundle_root: Path) -> None:
    path = bundle_root / "onnx-fp32.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="differs"):
        Bundle.open(bundle_root)
    path.unlink()
    with pytest.raises(BundleError, match=r"onnx-fp32\.onnx: there is no such file"):
        Bundle.open(bundle_root)
    path.mkdir()
    with pytest.raises(BundleError, match="there is no such file"):
        Bundle.open(bundle_root)


def test_a_folder_that_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is .* a bundle"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match=r"is .* a bundle"):
        Bundle.open(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"schema": 2}, "schema 2; .* reads schema 1"),
        ({"schema": ...}, "schema None"),
        ({"schema": "1"}, "schema '1'"),
        ({"min_agent_version": "99.0"}, r"needs eyas 99\.0 or newer"),
        ({"min_agent_version": "9" * 5000}, "or newer"),
        ({"labels": ["one"]}, "two or more different"),
        ({"labels": ["one", "one"]}, "two or more different"),
        ({"labels": ...}, "labels"),
        ({"preprocessing": {"size": 4}}, "8 to 2048"),
        ({"preprocessing": {"size": 16, "crop_fraction": 0}}, "crop_fraction"),
        ({"preprocessing": {"size": 16, "sharpen": True}}, "sharpen"),
        ({"preprocessing": {"size": 16, "fit": "squeeze"}}, "squeeze"),
        ({"confidence": {"temperature": 0}}, "temperature"),
        ({"confidence": {"threshold": 2}}, "threshold"),
        ({"confidence": {"bias": [0.5, -0.5]}}, r"confidence\.bias has 2 values; 3, one for each label, or none"),
        ({"confidence": {"bias": [0.5, "inf", 0]}}, "bias"),
        ({"decision": {"costs": [[0, 1], [1, 0]]}}, "decision: costs for 2 labels"),
        ({"decision": {"costs": [[0, 1, 1], [1, 0, 1], [1, -1, 0]]}}, "not negative"),
        ({"decision": {"costs": [[0] * 3] * 3, "label": "disc", "threshold": 0.5}}, "needs two labels"),
        ({"golden_tolerance": -1}, "golden_tolerance"),
        ({"artefacts": []}, "at least one"),
        ({"artefacts": [{"name": "x", "runtime": "onnx", "precision": "fp32", "files": []}], "use": {}}, "no files"),
        ({"artefacts": [{"name": "x", "runtime": "caffe", "precision": "fp32", "files": []}]}, "caffe"),
        ({"use": {"litert": "onnx-fp32"}}, "use.litert is 'onnx-fp32'"),
    ],
)
def test_rejected_manifests(fields: dict[str, object], message: str, bundle_root: Path, edit_manifest: Edit) -> None:
    edit_manifest(**fields)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle_root)
    assert str(bundle_root / MANIFEST) in str(caught.value)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "", ".", "nul\0byte", "line\nbreak"])
def test_files_outside_of_the_bundle(path: str, bundle_root: Path, edit_manifest: Edit) -> None:
    edit_manifest(golden={"path": path, "sha256": "0" * 64, "size_bytes": 1})
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        Bundle.open(bundle_root)


def test_unknown_fields_are_ignored(bundle_root: Path, edit_manifest: Edit) -> None:
    edit_manifest(signed_by="somebody", confidence={"temperature": 2.0, "method": "newer"})
    assert Bundle.open(bundle_root).manifest.confidence.temperature == 2.0


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"junk",
        b"[]",
        b"null",
        b'"schema"',
        b'{"schema":1',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"schema":1,"name":"\xff"}',
        b'{"schema":1,"x":' + b"[" * 100_000,
    ],
)
def test_junk_instead_of_a_manifest(junk: bytes, bundle_root: Path) -> None:
    (bundle_root / MANIFEST).write_bytes(junk)
    with pytest.raises(BundleError):
        read_manifest(bundle_root)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes_give_a_bundle_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_field_gives_a_bundle_error_or_a_bundle(
    data: st.DataObject, bundle_root: Path, pristine_bundle: Path
) -> None:
    content = msgspec.json.decode((pristine_bundle / MANIFEST).read_bytes())
    node = content
    for _ in range(data.draw(st.integers(0, 4))):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        inner = [key for key in keys if isinstance(node[key], (dict, list)) and node[key]]
        if not inner:
            break
        node = node[data.draw(st.sampled_from(inner))]
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    node[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    (bundle_root / MANIFEST).write_bytes(msgspec.json.encode(content))
    try:
        bundle = Bundle.open(bundle_root)
        bundle.golden()
    except BundleError:
        return
    assert len(bundle.manifest.labels) >= 2


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"image_00": JPEG},
        {"image_00": np.zeros((4, 4, 3), np.uint8), "p.onnx-fp32": np.zeros((1, 3), np.float32)},
        {"image_00": JPEG.astype(np.float32), "p.onnx-fp32": np.zeros((1, 3), np.float32)},
        {"image_00": JPEG[:-40], "p.onnx-fp32": np.zeros((1, 3), np.float32)},
        {"image_00": JPEG, "p.onnx-fp32": np.zeros((2, 3), np.float32)},
        None,
    ],
    ids=["nothing", "no-probabilities", "pixels", "floats", "cut", "wrong-shape", "no-archive"],
)
def test_golden_images_that_do_not_match(
    arrays: dict[str, np.ndarray] | None, bundle_root: Path, edit_manifest: Edit
) -> None:
    path = bundle_root / GOLDEN
    if arrays is None:
        path.write_bytes(b"PK\x03\x04 no archive")
    else:
        np.savez(path, **arrays)
    edit_manifest(golden=msgspec.to_builtins(entry(path)))
    with pytest.raises(BundleError, match="golden"):
        Bundle.open(bundle_root).golden()


def test_a_bundle_without_golden_images(bundle_root: Path, edit_manifest: Edit) -> None:
    edit_manifest(golden=None)
    with pytest.raises(BundleError, match="no golden images"):
        Bundle.open(bundle_root).golden()


def test_golden_images_that_unpack_to_too_much_are_rejected(
    bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    """Zeros pack a thousandfold: a small file must not fill a camera's memory."""
    with (
        zipfile.ZipFile(bundle_root / GOLDEN, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("image_00.npy", "w") as member,
    ):
        for _ in range(20):
            member.write(bytes(1 << 20))
    edit_manifest(golden=msgspec.to_builtins(entry(bundle_root / GOLDEN)))
    with pytest.raises(BundleError, match="unpacks to more than 16 MiB"):
        Bundle.open(bundle_root).golden()
