"""Pieces of small test bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from eyas_device.bundle import GOLDEN, MANIFEST, File, PredictionSettings, read_manifest, sha256
from eyas_device.errors import BundleError

TEMPERATURE = 1.5


def entry(path: Path) -> File:
    return File(path=path.name, sha256=sha256(path), size_bytes=path.stat().st_size)


def edit(root: Path, **fields: object) -> Path:
    """Edit the manifest by hand, as packing would not."""
    content = msgspec.json.decode((root / MANIFEST).read_bytes())
    (root / MANIFEST).write_bytes(msgspec.json.encode(content | fields))
    return root


def rewrite(root: Path, name: str, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Change the arrays of a file, and record its new hash."""
    with np.load(root / name) as data:
        arrays = dict(data)
    change(arrays)
    np.savez(root / name, **arrays)
    return edit(root, **{name.removesuffix(".npz"): msgspec.to_builtins(entry(root / name))})


def record_settings(root: Path) -> None:
    """Record the manifest's present settings with the golden images, as if the bundle had been packed with them."""
    try:
        manifest = read_manifest(root)
    except BundleError:
        return
    path = root / GOLDEN
    if manifest.golden is None or manifest.golden != entry(path):
        return
    try:
        with np.load(path) as data:
            arrays = dict(data)
    except Exception:
        return
    if "settings" not in arrays:
        return
    settings = np.frombuffer(msgspec.json.encode(PredictionSettings.of(manifest)), np.uint8)
    if arrays["settings"].tobytes() == settings.tobytes():
        return
    for name in [name for name in arrays if name.startswith("p.")]:
        rows, threshold = arrays[name], manifest.confidence.threshold
        if manifest.decision is None and rows.ndim == 2 and rows.shape[1] == len(manifest.labels):
            arrays[f"label.{name[2:]}"] = np.array([manifest.labels[row.argmax()] for row in rows])
            arrays[f"uncertain.{name[2:]}"] = rows.max(axis=1) < threshold
    np.savez_compressed(path, **(arrays | {"settings": settings}))
    content = msgspec.json.decode((root / MANIFEST).read_bytes())
    content["golden"] = msgspec.to_builtins(entry(path))
    (root / MANIFEST).write_bytes(msgspec.json.encode(content))
