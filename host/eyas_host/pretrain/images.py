"""Free images for pretraining, read from installed packages and never copied."""

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
from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, check_encoded, imdecode
from eyas_host.support.errors import WeightsError
from eyas_host.support.progress import say, track

MAX_SIDE = 1024
"""Larger images are shrunk to this longer side, pixels; no crop needs more."""
MIN_SIDE = 64
"""Images with a shorter side below this are skipped, pixels."""
_MIN_IMAGES = 20
"""Minimum number of images worth hours of training."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff"}
_HELD_OUT = 16
"""One of this many images is held out for evaluation."""


class Source(msgspec.Struct, frozen=True):
    """A package whose images may be used for training."""

    package: str
    pattern: str
    """Relative to the root for a Debian package, to the module's folder for a Python package."""
    licence: str
    """Licence of the images, as the package states it."""
    module: str = ""
    """Import name of a Python package."""
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
"""Command that installs the Debian packages."""


class ImageFile(msgspec.Struct, frozen=True):
    """An image file."""

    path: str
    package: str
    sha256: str


def find_images(root: Path = Path("/")) -> list[ImageFile]:
    """Images of all installed sources in a fixed order, the largest file of an image in several sizes.

    `root` is where Debian packages are unpacked. Raises `WeightsError` with the packages to install if there are too
    few images.
    """
    found = [
        ImageFile(str(path), source.package, sha256(path))
        for source in SOURCES
        if (base := _source_root(source, root)) is not None
        for path in _largest_versions(_files(base, source))
    ]
    unique = {one.sha256: one for one in found}
    if len(unique) < _MIN_IMAGES:
        raise WeightsError(f"{len(unique)} images are installed, {_MIN_IMAGES} are needed; {APT}")
    return sorted(unique.values(), key=lambda one: one.sha256)


def missing_packages(files: Sequence[ImageFile]) -> list[str]:
    """Packages of `SOURCES` without any image among `files`."""
    present = {file.package for file in files}
    return [source.package for source in SOURCES if source.package not in present]


def split_held_out(files: Sequence[ImageFile]) -> tuple[list[ImageFile], list[ImageFile]]:
    """Split into training and held-out images by their hashes; at least one is held out."""
    held_out = {file.sha256 for file in files if int(file.sha256, 16) % _HELD_OUT == 0} or {files[0].sha256}
    return [f for f in files if f.sha256 not in held_out], [f for f in files if f.sha256 in held_out]


def read_images(files: Sequence[ImageFile], title: str) -> list[Pixels]:
    """Pixels uint8 [h, w, 3] BGR of the files; unreadable and too small ones are skipped."""
    images = [image for file in track(files, title) if (image := _read(Path(file.path))) is not None]
    if len(images) < len(files):
        say(f"  {len(files) - len(images)} of {len(files)} images cannot be read or are too small: skipped")
    return images


def _source_root(source: Source, root: Path) -> Path | None:
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


def _largest_versions(paths: Iterable[Path]) -> list[Path]:
    """One file per image: names that differ only in a resolution are the same image."""
    best: dict[str, Path] = {}
    for path in paths:
        name = re.sub(r"[_-]?\d{3,5}x\d{3,5}", "", str(path.with_suffix("")))
        if name not in best or path.stat().st_size > best[name].stat().st_size:
            best[name] = path
    return list(best.values())


def _read(path: Path) -> Pixels | None:
    try:
        data = path.read_bytes()
        check_encoded(data, where=str(path))
        image: Any = _crop_transparent(imdecode(data, cv2.IMREAD_UNCHANGED, str(path)))
    except (OSError, ImageError):
        return None
    if min(image.shape[:2]) < MIN_SIDE:
        return None
    if image.dtype != np.uint8:
        image = cv2.convertScaleAbs(image, alpha=255 / max(1, int(image.max())))
    height, width = image.shape[:2]
    if max(height, width) > MAX_SIDE:
        scale = MAX_SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return _to_bgr(image)


def _crop_transparent(image: Any) -> Any:
    """Crop the fully transparent margin."""
    if image.ndim < 3 or image.shape[2] != 4:
        return image
    left, top, width, height = cv2.boundingRect((image[:, :, 3] > 0).astype(np.uint8))
    return image[top : top + height, left : left + width]


def _to_bgr(image: Pixels) -> Pixels:
    """Three channels; transparent pixels are blended with grey."""
    if image.ndim == 2:
        return np.asarray(cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
    if image.shape[2] == 3:
        return image
    if image.shape[2] != 4:
        return np.ascontiguousarray(np.repeat(image[:, :, :1], 3, axis=2))
    alpha = image[:, :, 3:].astype(np.float32) / 255
    return np.rint(image[:, :, :3] * alpha + 128 * (1 - alpha)).astype(np.uint8)
