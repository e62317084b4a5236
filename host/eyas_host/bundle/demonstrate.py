"""Run a packed bundle on the validation images, through the device's own command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from eyas_device.support.image_files import SUFFIXES
from eyas_host.data.image_bytes import file_name, parse_member, read_image_bytes
from eyas_host.data.label_rules import label_error
from eyas_host.data.split import Split
from eyas_host.pipeline.runner import BUNDLE, RunContext
from eyas_host.support.addresses import is_url
from eyas_host.support.errors import DataError, StageError


def demonstrate(context: RunContext) -> int:
    """Run `eyas-device run --accuracy` on the validation images and return its exit code."""
    command = [sys.executable, "-m", "eyas_device", "run", "--bundle", str(context.root / BUNDLE)]
    command += ["--camera", f"folder:{link_validation(context)}", "--accuracy"]
    return subprocess.run(command, check=False).returncode


def link_validation(context: RunContext) -> Path:
    """Link the validation images into one folder for each class, as frames for the folder camera.

    Images in tar shards and at addresses are copied, and all where the file system has no links. Raises `DataError` for
    a label that is no folder's name, and `StageError` if the folder cannot be written.
    """
    folder = context.root / "validation"
    images = Split.load(context.root).manifest.validation
    for label in sorted({image.label for image in images}):
        if why := label_error(label):
            raise DataError(f"{context.root}: label {label!r} {why}; run again with --from split")
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
        for number, image in enumerate(images):
            own = Path(file_name(image.path)).suffix
            suffix = own if own.lower() in SUFFIXES else ".png"  # decoders go by the first bytes
            link = folder / os.fsdecode(image.label.encode()) / f"{number:05d}{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            _link(link, image.path)
    except OSError as error:
        raise StageError(f"{folder}: cannot be written ({error.strerror}); the bundle itself is finished") from None
    return folder


def _link(link: Path, image: str) -> None:
    if parse_member(image) is not None or is_url(image):
        link.write_bytes(read_image_bytes(image))
        return
    target = Path(image).resolve()
    try:
        link.symlink_to(target)
    except OSError:  # not every file system has links
        if target.is_file():
            shutil.copyfile(target, link)
