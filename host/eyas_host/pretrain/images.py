"""The free images of a warm start: what installed packages ship, found where it lies and never copied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from eyas_device.bundle import sha256
from eyas_device.preprocess import Pixels
from eyas_host.support.errors import WeightsError
from eyas_host.support.progress import say, track

LONGEST = 1024
"""Images are kept with at most this longest side, pixels; no crop needs more."""
SHORTEST = 64
"""Images with a shorter side below this are left out, pixels."""
_ENOUGH = 20
"""Fewer images are not worth hours of training."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff"}
_HELD_OUT = 16
"""One image in so many is held out, to measure by."""


class Source(msgspec.Struct, frozen=True):
    """A package whose images may be learned from."""

    package: str
    pattern: str
    """Below the root for a package of Debian's, below the module's folder for one of the registry's."""
    licence: str
    """Of the images, as the package states it."""
    module: str = ""
    """Import name, where the package comes from the registry."""
    leave_out: tuple[str, ...] = ()
    """Folders without photographs."""


SOURCES = (
    Source("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps/**/*", "GPL-2", leave_out=("symbols",)),
    Source("mate-backgrounds", "usr/share/backgrounds/mate/**/*", "GPL-2+ and CC-BY-SA-4.0"),
    Source("plasma-workspace-wallpapers", "usr/share/wallpapers/*/contents/images*/*", "GPL-2+"),
    Source("lomiri-wallpapers-16.04", "usr/share/backgrounds/*_by_*", "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0 and CC0"),
    Source("ukui-wallpapers", "usr/share/backgrounds/*.png", "CC-BY-SA-3.0"),
    Source("scikit-learn", "datasets/images/*", "CC-BY-2.0", module="sklearn"),
    Source("scikit-image", "data/*", "CC0, CC-BY and public domain", module="skimage"),
)
APT = "apt-get install " + " ".join(source.package for source in SOURCES if not source.module)
"""What brings the images of Debian's packages."""


class Found(msgspec.Struct, frozen=True):
    """An image file."""

    path: str
    package: str
    sha256: str


def find_images(root: Path = Path("/")) -> list[Found]:
    """The images of all sources that are installed, in a fixed order; of one image in many sizes the largest file.

    `root` is where Debian's packages are unpacked. Raises `WeightsError` that names what to install if there are too
    few.
    """
    found = [
        Found(str(path), source.package, sha256(path))
        for source in SOURCES
        if (base := _base(source, root)) is not None
        for path in _largest(_files(base, source))
    ]
    unique = {one.sha256: one for one in found}
    if len(unique) < _ENOUGH:
        raise WeightsError(f"{len(unique)} images to learn from are installed, {_ENOUGH} are needed; {APT}")
    return sorted(unique.values(), key=lambda one: one.sha256)


def missing_packages(found: Sequence[Found]) -> list[str]:
    """The sources that no image came from, as their packages are called."""
    there = {one.package for one in found}
    return [source.package for source in SOURCES if source.package not in there]


def held_out(found: Sequence[Found]) -> tuple[list[Found], list[Found]]:
    """The images to learn from and those to measure by, one at least, told apart by their hashes."""
    out = {one.sha256 for one in found if int(one.sha256, 16) % _HELD_OUT == 0} or {found[0].sha256}
    return [one for one in found if one.sha256 not in out], [one for one in found if one.sha256 in out]


def read_images(found: Sequence[Found], title: str) -> list[Pixels]:
    """Their pixels, blue-green-red; what cannot be read or is too small is left out."""
    images = [image for one in track(found, title) if (image := _read(Path(one.path))) is not None]
    if len(images) < len(found):
        say(f"  {len(found) - len(images)} of {len(found)} images cannot be read or are too small: left out")
    return images


def _base(source: Source, root: Path) -> Path | None:
    if not source.module:
        return root
    spec = find_spec(source.module)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _files(base: Path, source: Source) -> list[Path]:
    return sorted(
        path
        for path in base.glob(source.pattern)
        if path.suffix.lower() in _SUFFIXES
        and path.is_file()
        and not set(path.relative_to(base).parts) & set(source.leave_out)
    )


def _largest(paths: Iterable[Path]) -> list[Path]:
    """One file of each image: names that differ in a resolution alone are the same one."""
    best: dict[str, Path] = {}
    for path in paths:
        name = re.sub(r"[_-]?\d{3,5}x\d{3,5}", "", str(path.with_suffix("")))
        if name not in best or path.stat().st_size > best[name].stat().st_size:
            best[name] = path
    return list(best.values())


def _read(path: Path) -> Pixels | None:
    image: Any = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is not None:
        image = _trimmed(image)
    if image is None or min(image.shape[:2]) < SHORTEST:
        return None
    if image.dtype != np.uint8:
        image = cv2.convertScaleAbs(image, alpha=255 / max(1, int(image.max())))
    height, width = image.shape[:2]
    if max(height, width) > LONGEST:
        share = LONGEST / max(height, width)
        size = (max(1, round(width * share)), max(1, round(height * share)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return _opaque(image)


def _trimmed(image: Any) -> Any:
    """Without the margin in which nothing is drawn."""
    if image.ndim < 3 or image.shape[2] != 4:
        return image
    left, top, width, height = cv2.boundingRect((image[:, :, 3] > 0).astype(np.uint8))
    return image[top : top + height, left : left + width]


def _opaque(image: Pixels) -> Pixels:
    """Three channels; what is transparent lies on grey."""
    if image.ndim == 2:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    if image.shape[2] == 3:
        return image
    if image.shape[2] != 4:
        return np.ascontiguousarray(np.repeat(image[:, :, :1], 3, axis=2))
    alpha = image[:, :, 3:].astype(np.float32) / 255
    return np.rint(image[:, :, :3] * alpha + 128 * (1 - alpha)).astype(np.uint8)
