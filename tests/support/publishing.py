"""Bundles of some megabytes, changed as people change them, and what a device fetches of each."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import GOLDEN, MANIFEST, Manifest, PredictionSettings
from eyas_device.predict import labels_of
from eyas_device.updates.release import Release, blob_path
from tests.support.bundles import entry
from tests.support.tiny_bundle import write_tiny_bundle

PADDED = ("litert-fp32.tflite", "litert-int8.tflite", "openvino-fp32.bin", "onnx-fp32.onnx")


def write_large_bundle(folder: Path, *, litert_mb: float = 10.0) -> Path:
    """A tiny bundle whose LiteRT int8 model has as many bytes as a large network: what follows it is not read."""
    write_tiny_bundle(folder)
    _pad(folder / "litert-int8.tflite", int(litert_mb * 1e6), seed=1)
    return rewrite(folder, "1.0.0")


def with_card(bundle: Path, folder: Path, version: str) -> Path:
    """The same model with another card."""
    shutil.copytree(bundle, folder)
    (folder / "CARD.md").write_text(f"# Solar cells {version}\n\n" + "What changed, for people.\n" * 40)
    return rewrite(folder, version)


def with_threshold(bundle: Path, folder: Path, version: str, threshold: float) -> Path:
    """The same model with another threshold: its golden images record the settings, so they are packed again."""
    shutil.copytree(bundle, folder)
    return rewrite(folder, version, threshold=threshold)


def retrained(bundle: Path, folder: Path, version: str) -> Path:
    """A network that was trained again: none of its weights is as it was."""
    shutil.copytree(bundle, folder)
    size = (folder / "litert-int8.tflite").stat().st_size
    shutil.copy(write_tiny_bundle(folder / "again") / "litert-int8.tflite", folder / "litert-int8.tflite")
    shutil.rmtree(folder / "again")
    _pad(folder / "litert-int8.tflite", size, seed=2)
    return rewrite(folder, version)


def rewrite(folder: Path, version: str, *, threshold: float | None = None) -> Path:
    """Give a bundle another version, and its files' hashes and golden images what follows from other changes."""
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    if threshold is not None:
        confidence = msgspec.structs.replace(manifest.confidence, threshold=threshold)
        manifest = msgspec.structs.replace(manifest, confidence=confidence)
        _record_settings(folder / GOLDEN, manifest)
    artefacts = tuple(
        msgspec.structs.replace(artefact, files=tuple(entry(folder / file.path) for file in artefact.files))
        for artefact in manifest.artefacts
    )
    manifest = msgspec.structs.replace(manifest, version=version, artefacts=artefacts, golden=entry(folder / GOLDEN))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return folder


def _record_settings(golden: Path, manifest: Manifest) -> None:
    with np.load(golden) as stored:
        arrays = {name: stored[name] for name in stored.files}
    for artefact in manifest.artefacts:
        labels, uncertain = labels_of(arrays[f"p.{artefact.name}"], manifest)
        arrays[f"label.{artefact.name}"], arrays[f"uncertain.{artefact.name}"] = np.array(labels), np.array(uncertain)
    arrays["settings"] = np.frombuffer(msgspec.json.encode(PredictionSettings.of(manifest)), np.uint8)
    with golden.open("wb") as stream:
        np.savez_compressed(stream, **arrays)


def _pad(path: Path, size: int, *, seed: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content + random.Random(seed).randbytes(max(0, size - len(content))))


def blob_names(release: Release) -> dict[str, str]:
    """Path of a blob -> the files that it is."""
    names: dict[str, str] = {}
    for file in (file for variant in release.variants for file in variant.files):
        path = blob_path(file.sha256)
        names[path] = ", ".join(filter(None, {*names.get(path, "").split(", "), file.path}))
    return names
