"""The check of signed updates: whether a root of trust is pinned, and the repository can be read."""

from __future__ import annotations

from pathlib import Path

from eyas_device.doctor.finding import Context, Finding, green, grey, red
from eyas_device.updates.refusals import RootError
from eyas_device.updates.root import read_root


def updates(context: Context) -> Finding:
    """Whether the device can trust the repository that its configuration names; the repository is not asked."""
    update = context.config.update
    if not update.url:
        return grey("no [update] url: only `eyas flash` and `eyas-device install` bring a bundle")
    try:
        read_root(Path(update.root))
    except RootError as error:
        return red(str(error), "`eyas enroll` it with the kit that has the repository, then `eyas flash --name`")
    return green(f"signed releases from {update.url}, channel {update.channel}, root pinned in {update.root}")
