"""What the tests of the device's doctor share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from msgspec.structs import replace

from eyas_device.config import Config
from eyas_device.doctor import Context

NOW = datetime(2026, 12, 24, 12, tzinfo=timezone.utc).timestamp()


def context(
    state: Path | None = None,
    *,
    bundle: Path | str = "",
    camera: str = "",
    broker: str = "",
    telemetry: dict[str, Any] | None = None,
    **more: Any,
) -> Context:
    """What is checked: a device with these settings."""
    config = Config()
    config = replace(
        config,
        device=replace(config.device, state=str(state or "/nowhere/eyas")),
        model=replace(config.model, bundle=str(bundle)),
        camera=replace(config.camera, source=camera, timeout_s=2.0),
        telemetry=replace(config.telemetry, broker=broker, **(telemetry or {})),
    )
    return Context(config=config, **more)


def file(path: Path, text: str) -> None:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def disk_of(*, free_mb: float = 1e5, inodes: int = 10**6, free_inodes: int = 10**6) -> Callable[[Path], Any]:
    """A file system for `statvfs`."""
    return lambda path: SimpleNamespace(
        f_bavail=int(free_mb * 1000), f_frsize=1000, f_files=inodes, f_favail=free_inodes
    )


def versions(**installed: str) -> Callable[[str], str | None]:
    """Versions of installed packages."""
    return {name.replace("_", "-"): version for name, version in installed.items()}.get
