"""Errors of drift monitoring."""

from __future__ import annotations

from eyas_device.errors import EyasError


class DriftError(EyasError, ValueError):
    """Something that was asked for is not there or not allowed."""
