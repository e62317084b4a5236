"""The device's configuration: one TOML file (`/etc/eyas/device.toml`), every key optional.

`device.example.toml`, beside this file, explains each key. The command line overrides single values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, TypeVar, get_args
from urllib.parse import urlsplit

import msgspec

from eyas_device.board.identity import default_name
from eyas_device.errors import ConfigError
from eyas_device.support.files import expand_home
from eyas_device.support.hours import parse_hours
from eyas_device.support.names import MAX_NAME, BrokerAddress, check_name, check_site, parse_broker
from eyas_device.support.redact import redact
from eyas_device.support.toml import Section, convert, error_report, parse

CONFIG = Path("/etc/eyas/device.toml")
"""Where the service reads it."""
EXAMPLE = Path(__file__).with_name("device.example.toml")
"""Every key with its default and an explanation."""
RENAMED = {
    "[privacy] pictures": "[privacy] images",
    "[privacy] unfamiliar": "[privacy] ood",
    "[privacy] every_s": "[privacy] min_interval_s",
    "[privacy] per_day": "[privacy] max_images_per_day",
}
"""Keys of earlier versions -> their present names."""
STATE = "/var/lib/eyas"
"""State folder of the service."""
SERVICE_USER = "eyas"
"""User and group of the service."""
INSTANCES = Path("/etc/eyas/devices")
"""Folder of the configurations NAME.toml of several cameras on one machine, for the services `eyas-device@NAME`. In it,
the default of `device.state` is `/var/lib/eyas/devices/NAME`, and that of `device.name` ends with `-NAME`."""
_Section = TypeVar("_Section", bound=Section)
_LOOPBACK = ("localhost", "127.0.0.1", "::1")

Seconds = Annotated[float, msgspec.Meta(gt=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1024)]

_MIN_FPS = 1e-5


class DeviceSection(Section, frozen=True):
    """Identity and state folder of the device."""

    site: str = "default"
    """Second level of the telemetry topic."""
    name: str = msgspec.field(default_factory=default_name)
    """Third level of the telemetry topic; default: the host's name, if that is a factory default with six digits that
    tell machines apart."""
    state: str = STATE
    """Folder of the two slots, the saved selection and the spool: an absolute path."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged; `--log-level` and `$EYAS_LOG` override it."""


class CameraSection(Section, frozen=True):
    """Source of the frames, and when it counts as failed."""

    source: str = ""
    """Camera specification, as for `eyas-device run --camera`."""
    rotate: Literal[0, 90, 180, 270] = 0
    """Degrees by which the image is turned clockwise, after its EXIF orientation."""
    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Mirror the turned image: `horizontal` exchanges left and right, `vertical` top and bottom."""
    region: tuple[Fraction, ...] = ()
    """Left, top, width and height of the part that is classified, as fractions of the turned and mirrored image."""
    controls: dict[str, float | Literal["auto"]] = msgspec.field(default_factory=dict)
    """Controls of a v4l2 or picamera2 camera: exposure, gain, focus, white_balance, ... -> a number or "auto"."""
    timeout_s: Seconds = 5.0
    """A source that delivers nothing for this time is lost and reopened."""
    frozen_s: Annotated[float, msgspec.Meta(ge=0)] = 30.0
    """A source that delivers identical images for this time is frozen and reopened (0: never)."""
    black_level: Annotated[float, msgspec.Meta(ge=0, le=255)] = 4.0
    """A frame with all pixel values at or below it (0..255) is black and not classified (0: only all-zero frames)."""
    give_up_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Exit with code 3 after this time without a frame (0: never; the service keeps trying)."""


class ModelSection(Section, frozen=True):
    """The model to run, its runtime and its share of the processor."""

    bundle: str = ""
    """Folder of a bundle; empty: the current slot below `device.state`."""
    runtime: str = ""
    """litert, tflite, openvino or onnx; empty: the saved selection, else the first that is installed."""
    artefact: str = ""
    """Name of an artefact; empty: the one that the bundle prefers."""
    threads: Count = 1
    """Inference threads."""
    max_latency_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """A model with a higher median latency on the golden images does not go live (0: no limit)."""
    affinity: tuple[Annotated[int, msgspec.Meta(ge=0, le=1023)], ...] = ()
    """Processor cores that the process may use; empty: all."""


class LoopSection(Section, frozen=True):
    """Rate of the frame loop."""

    fps: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Maximum frames per second (0: no limit)."""
    duty: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    """Duty cycle: maximum fraction of the time spent working, above 0 to 1. Limits heat and saves battery."""
    max_age_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """A frame that is older than this when its turn comes is dropped (0: no limit)."""


CommandName = Literal["pause", "resume", "set-thresholds", "snapshot", "bench", "doctor"]
COMMANDS: tuple[str, ...] = get_args(CommandName)
"""Commands that a host may send."""


class TelemetrySection(Section, frozen=True):
    """Broker, credentials and the spool for messages that cannot be sent."""

    broker: str = ""
    """HOST, HOST:PORT, mqtt://HOST or mqtts://HOST of an MQTT broker; empty: no telemetry. Default port: 8883 with TLS,
    1883 without."""
    window_s: Annotated[float, msgspec.Meta(ge=0.1)] = 10.0
    """Length of a telemetry window."""
    delivery: Literal["collector", "broker"] = "collector"
    """Whose acknowledgement lets the device delete a message."""
    tls: bool = False
    """Encrypt, trusting the system's certificate authorities."""
    ca: str = ""
    """Certificate file of the authority that signed the broker's certificate; implies `tls`."""
    certificate: str = ""
    """File of the device's certificate."""
    key: str = ""
    """File of its private key."""
    user: str = ""
    """User name at the broker; empty: anonymous, or the name in the certificate."""
    password_file: str = ""
    """File whose first line is the password."""
    insecure: bool = False
    """Allow a password or commands without TLS: whoever can reach the network can read the one and send the other."""
    spool_mb: Annotated[float, msgspec.Meta(ge=1, le=65536)] = 64.0
    """Disk space for waiting messages, MiB."""
    spool_days: Annotated[float, msgspec.Meta(gt=0, le=3650)] = 30.0
    """Days of uptime after which a waiting message is dropped."""
    sync_s: Annotated[float, msgspec.Meta(ge=0)] = 10.0
    """A power cut may lose the messages of this time."""
    commands: tuple[CommandName, ...] = ()
    """Commands that the host may send to this device."""

    @property
    def address(self) -> BrokerAddress:
        """The broker's address. Raises `ValueError` for an impossible one."""
        return parse_broker(self.broker, tls=self.tls or bool(self.ca or self.certificate))

    @property
    def exposed(self) -> tuple[str, ...]:
        """Keys that are not safe without TLS, if there is a broker and no TLS."""
        if not self.broker or self.address.tls:
            return ()
        keys = {"commands": self.commands, "user": self.user, "password_file": self.password_file}
        return tuple(key for key, value in keys.items() if value)


class UpdateSection(Section, frozen=True):
    """Where signed releases come from, and when they are installed."""

    url: str = ""
    """Repository: https://HOST/PATH, http://HOST/PATH, or a folder; empty: only `eyas flash` and `install` update."""
    root: str = "/etc/eyas/root.json"
    """The pinned root of trust, as `eyas enroll` writes it; no release is installed without it."""
    channel: str = "stable"
    """Channel of releases."""
    group: str = "default"
    """Group of the device in rollouts."""
    model: str = ""
    """Name of the model; empty: that of the bundle that runs."""
    poll_s: Annotated[float, msgspec.Meta(ge=10)] = 3600.0
    """Time between two looks at the repository, on average; a message over MQTT asks for one at once."""
    rate_kb: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Maximum download rate, kB per second (0: no limit)."""
    hours: str = ""
    """When a release may be installed, local time: `22:00-05:00`; empty: always. A channel may narrow it."""
    agent: bool = False
    """Signed releases may exchange the agent itself: `eyas flash` and `service install` bring root's units for that."""


class PrivacySection(Section, frozen=True):
    """Which single predictions and images may leave the device, and how; by default none."""

    events: bool = False
    """Send events for single predictions, without images."""
    images: bool = False
    """Add images to events, processed as set below; implies `events`."""
    sample_rate: Fraction = 0.0
    """Fraction of all predictions that become an event, 0..1, whatever they say: they tell the accuracy."""
    band: tuple[Fraction, Fraction] = (0.0, 0.0)
    """Predictions with a confidence from the first to below the second number become an event."""
    ood: bool = False
    """Predictions become an event while the images are out of distribution."""
    disagreements: bool = False
    """On probation, predictions become an event whose label the previous model does not give."""
    min_interval_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """Minimum time between two events, so that a bad hour does not use up the day's images; those drawn at random have
    an interval of their own."""
    max_images_per_day: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 50
    """Maximum number of images per UTC day; with `sample_rate` a quarter is kept for those drawn at random."""
    max_side: Annotated[int, msgspec.Meta(ge=16, le=4096)] = 640
    """Maximum of the longer side, pixels: larger images are scaled down."""
    crop: tuple[Fraction, ...] = ()
    """Left, top, width and height of the visible region, as fractions of the image; empty: all of it."""
    blur: Literal["none", "whole"] = "none"
    """`whole`: pixelate to 16 blocks along the longer side, so that nobody can be recognised."""
    retention_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 30
    """Days for which the host may keep the image."""
    training: bool = False
    """Whether the image may be trained on, and kept for as long as a model that was trained on it."""


class OutputSection(Section, frozen=True):
    """What follows from predictions: a retained MQTT topic, a webhook or a pin. There may be several outputs."""

    kind: Literal["mqtt", "webhook", "gpio"]
    """`mqtt`: the retained topic `eyas/SITE/NAME/answer`; `webhook`: POST of JSON; `gpio`: a pin of the board."""
    labels: tuple[str, ...] = ()
    """Labels that switch it on; empty (not for `gpio`): every label."""
    confidence: Fraction = 0.0
    """Calibrated confidence from which a prediction switches it on, 0..1."""
    hysteresis: Fraction = 0.0
    """While it is on, a prediction holds it from `confidence` minus this."""
    uncertain: bool = False
    """Count predictions below the bundle's confidence threshold, too."""
    hits: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 3
    """Frames among the last `of` that must agree before it switches on or off; more than half of `of`."""
    of: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    """Number of last frames that are looked at; a change takes at most so many."""
    min_on_s: Annotated[float, msgspec.Meta(ge=0, le=86400)] = 0.0
    """Minimum time on."""
    safe: Literal["off", "on"] = "off"
    """Its level while the device cannot say: at the start, camera lost or black, paused, out of distribution, no
    prediction for `stale_s`, and at the end."""
    ood: Literal["safe", "ignore"] = "safe"
    """Whether the output is safe while the images are out of distribution."""
    stale_s: Seconds = 10.0
    """Without a prediction for this time the output is safe."""
    url: str = ""
    """webhook: address that answers are posted to, `https://...`."""
    header_file: str = ""
    """webhook: file whose first line is a secret header, `Authorization: Bearer ...`."""
    ca: str = ""
    """webhook: certificate file of the authority that signed the server's certificate; empty: the system's."""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=60)] = 5.0
    """webhook: time limit of one attempt."""
    pin: Annotated[int, msgspec.Meta(ge=-1, le=1023)] = -1
    """gpio: number of the pin, Broadcom numbering on a Raspberry Pi."""
    active_high: bool = True
    """gpio: whether "on" is the high level."""


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All sections of the configuration."""

    device: DeviceSection = msgspec.field(default_factory=DeviceSection)
    camera: CameraSection = CameraSection()
    model: ModelSection = ModelSection()
    loop: LoopSection = LoopSection()
    telemetry: TelemetrySection = TelemetrySection()
    update: UpdateSection = UpdateSection()
    privacy: PrivacySection = PrivacySection()
    output: tuple[OutputSection, ...] = ()


def read_config(path: Path) -> Config:
    """Read a configuration file. Raises `ConfigError` that lists every error: section, key and what is allowed."""
    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise ConfigError(f"{path}: not a file; the configuration is a TOML file")
        tree = parse(path.read_text(encoding="utf-8-sig"))
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {reason}; the configuration is a TOML file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    sections, errors = convert(tree, Config, RENAMED)
    config = with_home(_with_instance(Config(**sections), instance_of(path), tree.get("device")))
    errors += _invalid_values(config)
    if errors:
        raise ConfigError(error_report(path, errors))
    return config


def instance_of(path: Path | None) -> str:
    """NAME for the configuration of one camera among several, `INSTANCES/NAME.toml`; empty for any other."""
    if path is None or path.suffix != ".toml":
        return ""
    folder = path.parent if path.is_absolute() else Path.cwd() / path.parent
    return path.stem if folder == INSTANCES else ""


def with_home(config: Config) -> Config:
    """Replace a leading `~` of every path by the home folder of the user who runs the agent."""

    def expanded(section: _Section, *keys: str) -> _Section:
        return msgspec.structs.replace(section, **{key: expand_home(getattr(section, key)) for key in keys})

    return msgspec.structs.replace(
        config,
        device=expanded(config.device, "state"),
        model=expanded(config.model, "bundle"),
        telemetry=expanded(config.telemetry, "ca", "certificate", "key", "password_file"),
        update=expanded(config.update, "url", "root"),
        output=tuple(expanded(output, "header_file", "ca") for output in config.output),
    )


def _with_instance(config: Config, instance: str, written: object) -> Config:
    """Set an instance's own defaults where the file has no values."""
    if not instance:
        return config
    keys = written if isinstance(written, dict) else {}
    host = config.device.name[: max(1, MAX_NAME - 1 - len(instance))]
    own = {"state": f"{STATE}/devices/{instance}", "name": f"{host}-{instance}"}
    changed = {key: value for key, value in own.items() if key not in keys}
    return msgspec.structs.replace(config, device=msgspec.structs.replace(config.device, **changed))


def _invalid_values(config: Config) -> Iterable[str]:
    """Errors of values that the types allow."""
    sections = [(f.name, getattr(config, f.name)) for f in msgspec.structs.fields(Config) if f.name != "output"]
    sections += [(f"output {number}", output) for number, output in enumerate(config.output, 1)]
    for section, struct in sections:
        for field in msgspec.structs.fields(type(struct)):
            value = getattr(struct, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                yield f"[{section}] {field.name} = {value}: a finite number is needed"
            if isinstance(value, str) and not value.isprintable():
                yield f"[{section}] {field.name} = {value!r}: control characters are not allowed"
    for section, key, check, name in (
        ("device", "site", check_site, config.device.site),
        ("device", "name", check_name, config.device.name),
        ("update", "channel", check_name, config.update.channel),
        ("update", "group", check_name, config.update.group),
    ):
        try:
            check(name)
        except ValueError as error:
            yield f"[{section}] {key} = {error}"
    if 0 < config.loop.fps < _MIN_FPS:
        yield f"[loop] fps = {config.loop.fps:g}: 0 (no limit), or {_MIN_FPS:g} (about one frame a day) and more"
    if not Path(config.device.state).is_absolute():
        yield f"[device] state = {config.device.state!r}: an absolute path is needed"
    yield from (f"[telemetry] {error}" for error in connection_errors(config.telemetry))
    try:
        parse_hours(config.update.hours)
    except ValueError as error:
        yield f"[update] hours = {error}"
    for name, value in config.camera.controls.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
            yield f"[camera] controls: {name!r} is not a name; small letters, digits and '_' are allowed"
        if isinstance(value, float) and not math.isfinite(value):
            yield f'[camera] controls: {name} = {value}: a finite number or "auto" is needed'
    low, high = config.privacy.band
    if low > high:
        yield f"[privacy] band = [{low:g}, {high:g}]: the first must not be above the second"
    for key, box in (("[camera] region", config.camera.region), ("[privacy] crop", config.privacy.crop)):
        if box and not (len(box) == 4 and min(box[2:]) > 0 and box[0] + box[2] <= 1 and box[1] + box[3] <= 1):
            yield f"{key} = {list(box)}: left, top, width and height within 0..1 are needed"
    yield from _output_errors(config)


def connection_errors(telemetry: TelemetrySection) -> Iterable[str]:
    """Errors of the broker's address and its credentials: key, what is wrong, what is allowed."""
    try:
        exposed = telemetry.exposed
    except ValueError as error:
        yield f"broker = {error}"
        exposed = ()
    if exposed and not telemetry.insecure:
        yield (
            f"{', '.join(exposed)}: not without TLS: set ca (or tls = true for a public certificate), or accept that "
            "the network can read and send them with insecure = true"
        )
    if bool(telemetry.certificate) != bool(telemetry.key):
        yield "certificate, key: both are needed, or none"


def _output_errors(config: Config) -> Iterable[str]:
    """Errors of outputs whose values fit their types."""
    for number, output in enumerate(config.output, 1):
        where = f"[output {number}]"
        if not output.of < 2 * output.hits <= 2 * output.of:
            yield f"{where} hits = {output.hits}: more than half of `of` ({output.of}), and at most all, are needed"
        if output.kind == "gpio" and not output.labels:
            yield f'{where} labels: kind = "gpio" needs the labels that switch the pin on'
        if output.kind == "gpio" and output.pin < 0:
            yield f"{where} pin: missing"
        if config.loop.fps and output.stale_s < 2 / config.loop.fps:
            needed = 2 / config.loop.fps
            yield f"{where} stale_s = {output.stale_s:g}: {needed:g} or more with [loop] fps = {config.loop.fps:g}"
        if output.kind == "webhook" and (problem := _webhook_problem(output)):
            yield f"{where} {problem}"
    if sum(output.kind == "mqtt" for output in config.output) > 1:
        yield '[[output]]: at most one of kind = "mqtt", a device has one topic'


def _webhook_problem(output: OutputSection) -> str:
    """What is wrong with the address of a webhook; empty if nothing."""
    try:
        url = urlsplit(output.url)
        usable = url.scheme in ("http", "https") and url.hostname and "@" not in url.netloc and url.port != 0
    except ValueError:
        usable = False
    if not usable or " " in output.url:
        return f"url = {redact(output.url)!r}: https://HOST[:PORT]/PATH is needed, without user and password"
    if url.scheme == "http" and output.header_file and url.hostname not in _LOOPBACK:
        return "header_file: a secret needs https://, or a server on this machine"
    return ""
