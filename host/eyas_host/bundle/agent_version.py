"""The oldest agent that runs a bundle as it is meant: it follows from what the bundle uses, not from who packs it."""

from __future__ import annotations

from collections.abc import Callable

from eyas_device.bundle import Manifest
from eyas_device.support.versions import version_numbers

FIRST = "0.1.0"
"""The first agent; it ignores fields, artefacts and measurements that it does not know."""
FEATURES: dict[str, tuple[str, Callable[[Manifest], bool]]] = {}
"""Feature -> agent version that it came with, and whether a bundle uses it: those that older agents would ignore or
misread and then predict something else. What they may ignore without harm does not belong here."""


def min_agent_version(manifest: Manifest) -> str:
    """The newest version that a feature of the bundle came with."""
    versions = [version for version, uses in FEATURES.values() if uses(manifest)]
    return max([FIRST, *versions], key=version_numbers)
