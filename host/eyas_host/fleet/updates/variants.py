"""What a release of a bundle consists of: the bundle whole, and reduced to what one kind of device loads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.errors import EyasError
from eyas_device.updates.copying import list_files
from eyas_device.updates.release import MAX_BLOB_BYTES, MAX_FILES, ReleaseFile, Variant
from eyas_host.bundle.reduce import TARGETS, check_target, needed_artefacts, reduce_bundle


class PublishError(EyasError, ValueError):
    """Something cannot be published, withdrawn or changed as asked."""


class Content(msgspec.Struct, frozen=True):
    """The variants of a release, and where their files are now."""

    variants: tuple[Variant, ...]
    """The smallest first."""
    blobs: Mapping[str, Path]
    """sha256 -> file."""


def bundle_content(bundle: Bundle, targets: Sequence[str], scratch: Path) -> Content:
    """Reduce a bundle for each kind of device and describe the results.

    Args:
        bundle: The whole bundle.
        targets: Kinds of devices (`pi5`, `jetson`, ...) that the release is for; none: a variant for each runtime,
            and the whole bundle.
        scratch: Empty folder for the reduced bundles, which has to stay until the blobs are stored.

    Raises:
        PublishError: The bundle has nothing for one of the kinds, or is too large.
        BundleError: The bundle is damaged.

    """
    variants: dict[str, Variant] = {}
    blobs: dict[str, Path] = {}
    for number, runtimes in enumerate(_runtime_sets(bundle, targets)):
        root = reduce_bundle(bundle, scratch / str(number), needed_artefacts(bundle, runtimes))
        files = tuple(_describe(root, blobs))
        manifest = next(file.sha256 for file in files if file.path == MANIFEST)
        here = tuple(runtime for runtime in bundle.runtimes() if runtime in runtimes)
        variants.setdefault(manifest, Variant(runtimes=here, manifest_sha256=manifest, files=files))
        _check_size(bundle.root, files)
    return Content(tuple(sorted(variants.values(), key=_size_bytes)), blobs)


def _runtime_sets(bundle: Bundle, targets: Sequence[str]) -> Iterable[tuple[str, ...]]:
    """The runtimes of each variant."""
    available = bundle.runtimes()
    if not targets:
        yield from ((runtime,) for runtime in available)
        yield tuple(available)
    for target in targets:
        check_target(target)
        wanted = TARGETS[target] or tuple(available)
        runtimes = tuple(runtime for runtime in wanted if runtime in available)
        if not runtimes:
            raise PublishError(f"{bundle.root}: no artefact for {' or '.join(wanted)}, which {target} runs")
        yield runtimes


def _describe(root: Path, blobs: dict[str, Path]) -> Iterable[ReleaseFile]:
    for path in sorted(list_files(root)):
        digest = sha256(root / path)
        blobs[digest] = root / path
        yield ReleaseFile(path=path, sha256=digest, size_bytes=(root / path).stat().st_size)


def _check_size(root: Path, files: Sequence[ReleaseFile]) -> None:
    size = sum(file.size_bytes for file in files)
    if len(files) > MAX_FILES or size > MAX_BLOB_BYTES:
        raise PublishError(
            f"{root}: {len(files)} files of {size / 1e6:.0f} MB; {MAX_FILES} of {MAX_BLOB_BYTES / 1e6:.0f} MB are "
            "allowed"
        )


def _size_bytes(variant: Variant) -> int:
    return sum(file.size_bytes for file in variant.files)
