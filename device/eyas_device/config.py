"""The device's configuration: one TOML file (`/etc/eyas/device.toml`), every key optional.

`device/device.example.toml` explains each key. The command line overrides single values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec

from eyas_device.errors import ConfigError
from eyas_device.names import NAME, broker, host_name
from eyas_device.sections import Section, convert, parse, told

CONFIG = Path("/etc/eyas/device.toml")
"""Where the service looks."""

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class DeviceSection(Section, frozen=True):
    """Who this device is and where it keeps its things."""

    site: str = "default"
    """Second level of the telemetry topic."""
    name: str = msgspec.field(default_factory=host_name)
    """Third level of the telemetry topic; the host's name unless given."""
    state: str = "/var/lib/eyas"
    """Folder of the two slots, the remembered choice and the snapshots."""


class CameraSection(Section, frozen=True):
    """Where frames come from, and when the source counts as ill."""

    source: str = ""
    """A specification as `eyas-device run --camera` takes it."""
    timeout_s: Seconds = 5.0
    """A source that delivers nothing for so long is lost and opened anew."""
    frozen_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """The same picture, byte for byte, for so long means a frozen source (0: never)."""
    black_level: Annotated[float, msgspec.Meta(ge=0, le=255)] = 4.0
    """A frame whose pixels are all at or below it (0..255) is black and not answered (0: only all-zero frames)."""
    give_up_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """End with exit code 3 after so long without a frame (0: never; the service goes on trying)."""


class ModelSection(Section, frozen=True):
    """What answers, and on how much of the machine."""

    bundle: str = ""
    """A bundle's folder; empty: the current slot below `device.state`."""
    runtime: str = ""
    """litert, tflite, openvino or onnx; empty: the remembered choice, else the first that is installed."""
    artefact: str = ""
    """An artefact's name; empty: what the bundle says."""
    threads: Count = 1
    """Inference threads."""
    max_latency_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """A model whose median golden picture takes longer does not go live (0: no bound)."""
    affinity: tuple[Annotated[int, msgspec.Meta(ge=0, le=1023)], ...] = ()
    """Processor cores that the process may use; empty: all."""


class LoopSection(Section, frozen=True):
    """How often to look."""

    fps: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """At most so many frames a second (0: as many as it can)."""
    duty: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Largest part of the time spent working, 0..1: the rest is rest, for heat and battery."""
    max_age_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """A frame older than this when its turn comes is counted as dropped (0: no bound)."""


class TelemetrySection(Section, frozen=True):
    """Where to report."""

    broker: str = ""
    """HOST or HOST:PORT of an MQTT broker; empty: no telemetry."""
    window_s: Annotated[float, msgspec.Meta(ge=0.1)] = 10.0
    """Length of a window."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All sections."""

    device: DeviceSection = msgspec.field(default_factory=DeviceSection)
    camera: CameraSection = CameraSection()
    model: ModelSection = ModelSection()
    loop: LoopSection = LoopSection()
    telemetry: TelemetrySection = TelemetrySection()


def read_config(path: Path) -> Config:
    """Read a configuration file. Raises `ConfigError` listing every fault: section, key and what is allowed."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise ConfigError(f"{path}: not a file; the configuration is a TOML file")
        tree = parse(path.read_text(encoding="utf-8"))
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; the configuration is a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    sections, faults = convert(tree, Config)
    config = Config(**sections)
    faults += _impossible(config)
    if faults:
        raise ConfigError(told(path, faults))
    return config


def _impossible(config: Config) -> Iterable[str]:
    """What types alone do not say."""
    for section, struct in ((f.name, getattr(config, f.name)) for f in msgspec.structs.fields(Config)):
        for field in msgspec.structs.fields(type(struct)):
            value = getattr(struct, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"[{section}] {field.name} = {value}: a finite number is needed"
            if isinstance(value, str) and not value.isprintable():
                yield f"[{section}] {field.name} = {value!r}: control characters are not allowed"
    for key, name in (("site", config.device.site), ("name", config.device.name)):
        if not re.fullmatch(NAME, name):
            yield f"[device] {key} = {name!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed"
    if not Path(config.device.state).is_absolute():
        yield f"[device] state = {config.device.state!r}: an absolute path is needed"
    if config.telemetry.broker:
        try:
            broker(config.telemetry.broker)
        except ValueError as error:
            yield f"[telemetry] broker = {error}"
