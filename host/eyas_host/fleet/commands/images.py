"""The image of a snapshot: saved if the device sent one, else why it did not."""

from __future__ import annotations

import base64
import binascii
import time
from pathlib import Path

from eyas_device.errors import EyasError
from eyas_device.support.files import atomic_write
from eyas_device.support.logs import clean
from eyas_device.telemetry.messages import Event
from eyas_host.fleet.commands.send import Outcome

_MODE = 0o600
"""An image may show people: only who asked for it can read it."""
_JPEG = b"\xff\xd8\xff"
_SETTINGS = {
    "privacy.images": "set images = true under [privacy] in its configuration, if images may leave it",
    "governance": "the model's recipe forbids images whatever the device allows",
    "a day are allowed": "max_images_per_day under [privacy] in its configuration",
}
"""Words of a device's reason -> what would have to change."""


class ImageNotSaved(EyasError):  # noqa: N818 - reads as the outcome it is
    """An image cannot be saved."""


def save(outcome: Outcome, folder: Path) -> Path | None:
    """Write the image of a snapshot into a folder, which is created if missing; None if there is none.

    The file has the device's name, the time of day here and the first digits of the command's id, so that no other one
    is replaced. Raises `ImageNotSaved`.
    """
    event = outcome.event
    if event is None or not event.image:
        return None
    try:
        image = base64.b64decode(event.image, validate=True)
    except (binascii.Error, ValueError):
        image = b""
    if not image.startswith(_JPEG):
        raise ImageNotSaved("what it sent is no JPEG, and was not saved")
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = folder / f"{outcome.site}-{outcome.device}-{stamp}-{event.command[:8]}.jpg"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, image, mode=_MODE)
    except OSError as error:
        raise ImageNotSaved(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def describe(event: Event, path: Path | None) -> str:
    """Where the image is and how it was processed, or why there is none and what decides that."""
    policy = event.image_policy
    if path is None:
        reason = clean(str(policy.get("image", "none")), 200).removeprefix("none: ")
        fix = next((fix for words, fix in _SETTINGS.items() if words in reason), "")
        return f"no image: {reason}" + (f"; {fix}" if fix else "")
    facts = []
    if isinstance(policy.get("width"), int) and isinstance(policy.get("height"), int):
        facts.append(f"{policy['width']}x{policy['height']}")
    if policy.get("blur") not in (None, "none"):
        facts.append("unrecognisable")
    if isinstance(policy.get("retention_days"), int):
        facts.append(f"may be kept {policy['retention_days']} days")
    return f"{path}" + (f" ({', '.join(facts)})" if facts else "")
