"""Reduce a bundle to what one kind of device runs: of each runtime, the artefact that it would load there.

The reduced bundle is a bundle like any other: its manifest lists the files that are there, with their hashes, and
`origin` names the manifest of the whole bundle, so that reports, telemetry and devices speak of the same model. It is
the same to the byte whenever and wherever it is made.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, Artefact, Bundle
from eyas_device.errors import BundleError
from eyas_device.runtimes import RUNTIMES, artefact_runtime
from eyas_host.support.files import sync_files

ALL = "all"
TARGETS: dict[str, tuple[str, ...]] = {
    "pi3": ("litert",),
    "pi4": ("litert",),
    "pi5": ("litert",),
    "jetson": ("litert", "onnx"),
    "x86": ("litert", "openvino", "onnx"),
    ALL: (),
}
"""Kind of device -> the runtimes that docs/boards.md installs there; of `all`, whatever the bundle has."""


def runtimes_of(names: Sequence[str]) -> tuple[str, ...] | None:
    """Check names of runtimes and return them without repetitions; None for `all`. Raises `BundleError` for others."""
    allowed = (*RUNTIMES, ALL)
    for name in names:
        if name not in allowed:
            raise BundleError(f"--runtime {name}: not a runtime; allowed are {', '.join(allowed)}")
    return None if ALL in names else tuple(dict.fromkeys(names))


def needed_artefacts(bundle: Bundle, runtimes: Iterable[str], artefact: str = "") -> list[Artefact]:
    """The artefacts that a device loads: of each runtime the one that its configuration names, or the preferred one.

    Raises `BundleError` if the bundle has none for one of `runtimes`, or none called `artefact`.
    """
    entries = bundle.manifest.artefacts
    named = next((entry for entry in entries if entry.name == artefact), None)
    if artefact and named is None:
        available = ", ".join(entry.name for entry in entries)
        raise BundleError(f"{bundle.root}: no artefact {artefact!r}, which [model] artefact names; it has: {available}")
    names = {name: bundle.artefact(name).name for name in map(artefact_runtime, runtimes)}
    if named is not None:
        names[named.runtime] = named.name
    return [entry for entry in entries if entry.name in names.values()]


def reduce_bundle(bundle: Bundle, folder: Path, kept: Sequence[Artefact]) -> Path:
    """Write the bundle with the artefacts `kept` alone to `folder`, which must not exist, and return it.

    A bundle that has no others is not copied: its own folder is returned.
    """
    names = {artefact.name for artefact in kept}
    if names == {artefact.name for artefact in bundle.manifest.artefacts}:
        return bundle.root
    content = msgspec.json.decode((bundle.root / MANIFEST).read_bytes())  # with what later versions add
    content["artefacts"] = [entry for entry in content["artefacts"] if entry["name"] in names]
    runtimes = {artefact.runtime for artefact in kept}
    use = {runtime: name for runtime, name in content["use"].items() if runtime in runtimes}
    for artefact in kept:
        if use.get(artefact.runtime) not in names:
            use[artefact.runtime] = artefact.name
    content["use"] = use
    for field, keys in (("reasons", runtimes), ("evidence", names)):
        content[field] = {key: value for key, value in content.get(field, {}).items() if key in keys}
    content["origin"] = bundle.identity
    dropped = {file.path for artefact in bundle.manifest.artefacts for file in artefact.files}
    dropped -= {file.path for artefact in kept for file in artefact.files}
    shutil.copytree(bundle.root, folder, ignore=lambda at, found: _ignored(bundle.root, Path(at), found, dropped))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1))
    reduced = Bundle.open(folder)
    reduced.golden()
    return folder


def check_target(target: str) -> None:
    """Raise `BundleError` unless `target` is one of `TARGETS`."""
    if target not in TARGETS:
        raise BundleError(f"--target {target}: not a kind of device; allowed are {', '.join(TARGETS)}")


def pack_target(root: Path, target: str) -> Path:
    """Write the bundle in `root`, reduced to what `target` runs, beside it as `NAME-TARGET`, and return that folder.

    Raises `BundleError` for an unknown target, a bundle without an artefact for it, or a folder there that is no
    bundle.
    """
    check_target(target)
    bundle = Bundle.open(root)
    here = [runtime for runtime in TARGETS[target] if artefact_runtime(runtime) in bundle.runtimes()]
    if target == ALL:
        return root
    if not here:
        raise BundleError(f"{root}: no artefact for {' or '.join(TARGETS[target])}, which {target} runs")
    final = root.resolve().with_name(f"{root.resolve().name}-{target}")
    if final.exists() and not (final / MANIFEST).is_file():
        raise BundleError(f"{final}: is there and not a bundle; move it away")
    folder = final.with_name(f".{final.name}.new")
    shutil.rmtree(folder, ignore_errors=True)
    if reduce_bundle(bundle, folder, needed_artefacts(bundle, here)) == root:
        return root
    sync_files((path for path in folder.rglob("*") if path.is_file()), folder)
    shutil.rmtree(final, ignore_errors=True)
    folder.rename(final)
    return final


def _ignored(root: Path, at: Path, found: Sequence[str], dropped: set[str]) -> list[str]:
    """Files that are not copied: those of other artefacts, and links, which are no part of a bundle."""
    return [name for name in found if (at / name).is_symlink() or (at / name).relative_to(root).as_posix() in dropped]
