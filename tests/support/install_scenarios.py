"""What an installation finds and does: the scenarios that meet faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from eyas_device.bundle import GOLDEN, MANIFEST, Manifest
from eyas_device.updates.slots import Slots
from tests.support import tiny
from tests.support.bundles import entry
from tests.support.fault_matrix import Scenario
from tests.support.tiny_bundle import write_tiny_bundle

OLD, OLDER, NEW = "1.0.0", "0.9.0", "2.0.0"


def with_version(bundle: Path, folder: Path, version: str) -> Path:
    """A copy of a bundle with another version."""
    shutil.copytree(bundle, folder)
    _rewrite(folder, version=version)
    return folder


def install_scenarios(folder: Path) -> list[Scenario]:
    """Scenarios whose bundles and states lie in the new folder `folder`."""
    tiny_bundle = write_tiny_bundle(folder / "tiny")
    older, old, new = (with_version(tiny_bundle, folder / v, v) for v in (OLDER, OLD, NEW))
    empty, one, two, refused = (folder / f"state-{name}" for name in ("empty", "one", "two", "refused"))
    empty.mkdir()
    for state, bundles in ((one, (old,)), (two, (older, old)), (refused, (new, old))):
        for bundle in bundles:
            Slots(state).install(bundle)
    Slots(refused).refuse("a", "its predictions were wrong on real frames")
    config = folder / "device.toml"
    config.write_text('[model]\nruntime = "litert"\n')  # the others need not be imported
    settings = ("--config", str(config), "--state", "{state}")
    install = ("install", str(new), *settings)
    broken = ("install", str(_wrong(new, folder / "wrong")), *settings)
    return [
        Scenario(name="first install", state=empty, command=install, old=None, new=NEW),
        Scenario(name="second install", state=one, command=install, old=OLD, new=NEW),
        Scenario(name="install, both slots full", state=two, command=install, old=OLD, new=NEW),
        Scenario(name="install of what was refused", state=refused, command=install, old=OLD, new=NEW),
        Scenario(name="install of wrong predictions", state=two, command=broken, old=OLD, new=OLD, expected_code=1),
        Scenario(
            name="roll back",
            state=two,
            command=("slots", "--roll-back", "--state", "{state}"),
            old=OLD,
            new=OLDER,
            toggles=True,
        ),
    ]


def _wrong(bundle: Path, folder: Path) -> Path:
    """A bundle, hashes and all, of another model than its golden images were packed with."""
    with_version(bundle, folder, "3.0.0")
    weights, bias = tiny.fit()
    for kind in ("fp32", "int8"):
        tiny.write_tflite(
            folder / f"litert-{kind}.tflite", -weights, bias, **({} if kind == "fp32" else {"kind": "int8"})
        )
    tiny.write_openvino(folder / "openvino-fp32.xml", -weights, bias)
    tiny.write_onnx(folder / "onnx-fp32.onnx", -weights, bias)
    _rewrite(folder)
    return folder


def _rewrite(folder: Path, **changes: str) -> None:
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    artefacts = tuple(
        msgspec.structs.replace(artefact, files=tuple(entry(folder / file.path) for file in artefact.files))
        for artefact in manifest.artefacts
    )
    changed = msgspec.structs.replace(manifest, artefacts=artefacts, golden=entry(folder / GOLDEN), **changes)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(changed)))
