"""What a spool says of itself, and its bounds."""

from __future__ import annotations

import enum

import msgspec

from eyas_device.errors import EyasError


class SpoolError(EyasError, OSError):
    """Another process holds the spool."""


class SpoolState(enum.Enum):
    """Where the spool keeps its messages."""

    ON_DISK = "on disk"
    IN_MEMORY = "in memory: no folder is configured"
    UNUSABLE = "in memory until the folder can be used"
    DISK_FAILED = "in memory until the disk works again"

    @property
    def is_fault(self) -> bool:
        """Whether somebody has to look at the disk."""
        return self in (SpoolState.UNUSABLE, SpoolState.DISK_FAILED)


class SpoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of a spool in bytes, age and data that a power cut may cost."""

    max_bytes: int = 64 << 20
    max_days: float = 30.0
    """Days of running time after which a message is dropped."""
    sync_s: float = 10.0
    """Longest time between an append and the sync of the disk."""


class Waiting(msgspec.Struct, frozen=True):
    """Messages that wait for their acknowledgement."""

    on_disk: int = 0
    in_memory: int = 0
    """They are lost when the process ends."""
