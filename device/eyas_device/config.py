"""The device's configuration: one TOML file (`/etc/eyas/device.toml`), every key optional.

`device.example.toml`, beside this file, explains each key. The command line overrides single values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, get_args

import msgspec

from eyas_device.errors import ConfigError
from eyas_device.support.names import check_name, host_name, parse_broker
from eyas_device.support.toml import Section, convert, parse, told

CONFIG = Path("/etc/eyas/device.toml")
EXAMPLE = Path(__file__).with_name("device.example.toml")
"""Every key with its default, explained."""
"""Where the service looks."""
STATE = "/var/lib/eyas"
"""Where the service keeps its things."""

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]


class DeviceSection(Section, frozen=True):
    """Who this device is and where it keeps its things."""

    site: str = "default"
    """Second level of the telemetry topic."""
    name: str = msgspec.field(default_factory=host_name)
    """Third level of the telemetry topic; the host's name unless given."""
    state: str = STATE
    """Folder of the two slots, the remembered choice and the snapshots."""


class CameraSection(Section, frozen=True):
    """Where frames come from, and when the source counts as ill."""

    source: str = ""
    """A specification as `eyas-device run --camera` takes it."""
    timeout_s: Seconds = 5.0
    """A source that delivers nothing for so long is lost and opened again."""
    frozen_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """The same image, byte for byte, for so long means a frozen source (0: never)."""
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
    """A model whose median golden image takes longer does not go live (0: no bound)."""
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


Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
CommandName = Literal["pause", "resume", "set-thresholds", "snapshot", "bench", "doctor", "check-update"]
COMMANDS: tuple[str, ...] = get_args(CommandName)
"""Commands that a host may send."""


class TelemetrySection(Section, frozen=True):
    """Where to report, and what to do while nobody listens."""

    broker: str = ""
    """HOST or HOST:PORT of an MQTT broker; empty: no telemetry."""
    window_s: Annotated[float, msgspec.Meta(ge=0.1)] = 10.0
    """Length of a window."""
    delivery: Literal["collector", "broker"] = "collector"
    """Whose acknowledgement lets the device forget a message."""
    tls: bool = False
    """Encrypt, and believe the system's certificate authorities."""
    ca: str = ""
    """File of the authority that signed the broker's certificate; encrypts as well."""
    certificate: str = ""
    """File of the device's own certificate."""
    key: str = ""
    """File of its private key."""
    user: str = ""
    """Who the device is at the broker; empty: nobody, or what the certificate says."""
    password_file: str = ""
    """A file whose first line is the password."""
    spool_mb: Annotated[float, msgspec.Meta(ge=1, le=65536)] = 64.0
    """Disk that waiting messages may take, 2^20 bytes."""
    spool_days: Annotated[float, msgspec.Meta(gt=0, le=3650)] = 30.0
    """Days of running after which a waiting message is given up."""
    sync_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """A power cut may cost the messages of so long."""
    commands: tuple[CommandName, ...] = ()
    """What the host may tell this device to do."""


class PrivacySection(Section, frozen=True):
    """Which single images may leave the device, and how. By default none."""

    events: bool = False
    """Tell of single answers, without images."""
    images: bool = False
    """Add their images, prepared as the other keys say; implies events."""
    sample_rate: Share = 0.0
    """Part of all answers that become an event, 0..1."""
    band: tuple[Share, Share] = (0.0, 0.0)
    """Answers of a confidence from the first to below the second become an event."""
    unfamiliar: bool = False
    """Answers become an event while the camera sees what the model was not trained on."""
    every_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """At most one event in so long, so that a bad hour does not use up the day."""
    per_day: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 50
    """Images in a UTC day."""
    max_side: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 640
    """Pixels of the longer side: larger images are scaled down."""
    crop: tuple[Share, ...] = ()
    """Left, top, width and height of what is shown, as parts of the image; empty: all."""
    blur: Literal["none", "whole"] = "none"
    """`whole`: blocks of which 16 make the longer side, so that nobody can be recognised."""
    retention_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 30
    """For how long the host may keep the image."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All sections."""

    device: DeviceSection = msgspec.field(default_factory=DeviceSection)
    camera: CameraSection = CameraSection()
    model: ModelSection = ModelSection()
    loop: LoopSection = LoopSection()
    telemetry: TelemetrySection = TelemetrySection()
    privacy: PrivacySection = PrivacySection()


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
        try:
            check_name(name)
        except ValueError as error:
            yield f"[device] {key} = {error}"
    if not Path(config.device.state).is_absolute():
        yield f"[device] state = {config.device.state!r}: an absolute path is needed"
    if config.telemetry.broker:
        try:
            parse_broker(config.telemetry.broker)
        except ValueError as error:
            yield f"[telemetry] broker = {error}"
    if bool(config.telemetry.certificate) != bool(config.telemetry.key):
        yield "[telemetry] certificate, key: both are needed, or none"
    low, high = config.privacy.band
    if low > high:
        yield f"[privacy] band = [{low:g}, {high:g}]: the first must not be above the second"
    crop = config.privacy.crop
    if crop and not (len(crop) == 4 and min(crop[2:]) > 0 and crop[0] + crop[2] <= 1 and crop[1] + crop[3] <= 1):
        yield f"[privacy] crop = {list(crop)}: left, top, width and height inside of 0..1 are needed"
