"""Run a packed bundle on the validation images, through the device's own command."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from eyas_host.data.label_rules import label_error
from eyas_host.data.split import Split
from eyas_host.pipeline.runner import BUNDLE, RunContext
from eyas_host.support.errors import DataError


def demonstrate(context: RunContext) -> int:
    """Run `eyas-device run --accuracy` on the validation images and return its exit code."""
    command = [sys.executable, "-m", "eyas_device", "run", "--bundle", str(context.root / BUNDLE)]
    command += ["--camera", f"folder:{link_validation(context)}", "--accuracy"]
    return subprocess.run(command, check=False).returncode


def link_validation(context: RunContext) -> Path:
    """Link the validation images into one folder for each class, as frames for the folder camera."""
    folder = context.root / "validation"
    shutil.rmtree(folder, ignore_errors=True)
    for number, image in enumerate(Split.load(context.root).manifest.validation):
        if why := label_error(image.label):
            raise DataError(f"{context.root}: label {image.label!r} {why}; run again with --from split")
        link = folder / image.label / f"{number:05d}{Path(image.path).suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(image.path).resolve())
    return folder
