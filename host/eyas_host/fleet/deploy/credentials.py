"""What a flash brings beside the bundle, a configuration and credentials: checked here before a device is touched."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.x509.oid import NameOID

from eyas_device.config import CONFIG, STATE, Config, read_config
from eyas_device.errors import ConfigError
from eyas_device.support.names import check_name
from eyas_host.fleet.broker.enroll import CREDENTIALS, DEVICE_FOLDER, ROOT
from eyas_host.fleet.broker.kit import AUTHORITY, DEVICES
from eyas_host.fleet.broker.pki import Credentials, belong_together, days_left, exists, read_file
from eyas_host.fleet.broker.revocation import LIST, load_list, revoked
from eyas_host.fleet.connect.preflight import Layout
from eyas_host.fleet.connect.ssh import FleetError


class DeviceFiles(msgspec.Struct, frozen=True):
    """Files of one device, or of all that are flashed alike."""

    config: Path | None = None
    """Its device.toml; None keeps the one that it has."""
    credentials: Path | None = None
    """Folder of its certificate, its key and the authority's certificate; None keeps what it has."""
    needed: tuple[str, ...] = ()
    """Files that the configuration names and that are not brought: they have to be on the device."""


def device_files(config: Path | None, name: str | None, kit: Path, layout: Layout, folder: Path) -> DeviceFiles:
    """Check what is to be brought.

    Args:
        config: The user's own configuration; by default, that of the enrolled device.
        name: Name of an enrolled device, whose credentials are brought.
        kit: Folder of `eyas broker`, in which it was enrolled.
        layout: Paths on the device.
        folder: Folder for a copy that is changed for a device whose root is not `/`.

    Raises:
        FleetError, CredentialError, ConfigError: Something is missing, or does not fit together.

    """
    own = None if name is None else _enrolled(name, kit)
    path = config if config is not None or own is None else own / CONFIG.name
    if path is None:
        return DeviceFiles()
    if own is not None and config is None and layout.root != "/":
        path = _below_root(path, layout, folder)
    settings = read_config(path)
    if settings.device.state != layout.state and layout.root == "/":
        raise ConfigError(f"{path}: [device] state must be {layout.state}, where the service may write")
    if not settings.camera.source:
        raise ConfigError(f'{path}: [camera] source is missing, e.g. source = "v4l2:0"; the service needs one')
    if own is not None:
        _check_credentials(own, settings, path, layout, kit)
    brought = {f"{layout.credentials}/{file}" for file in (*CREDENTIALS.values(), ROOT) if own and exists(own / file)}
    return DeviceFiles(path, own, tuple(dict.fromkeys(file for file in _named(settings) if file not in brought)))


def _enrolled(name: str, kit: Path) -> Path:
    """The folder of an enrolled device."""
    option = "" if kit == Path("fleet") else f" --kit {kit}"
    try:
        check_name(name)
    except ValueError as error:
        raise FleetError(f"--name {error}") from None
    if not exists(kit):
        raise FleetError(
            f"{kit}: there is no kit; `eyas broker{option} --bind 0.0.0.0` comes first, then `eyas enroll {name} "
            f"--camera SPEC{option}`"
        )
    own = kit / DEVICES / name
    missing = [file for file in (*CREDENTIALS.values(), CONFIG.name) if not exists(own / file)]
    if missing:
        what = "is not enrolled" if len(missing) > len(CREDENTIALS) else f"lacks {', '.join(missing)}"
        raise FleetError(f"{name} {what} in {kit}; `eyas enroll {name} --camera SPEC{option}` comes first")
    return own


def _below_root(config: Path, layout: Layout, folder: Path) -> Path:
    """A copy of an enrolled device's configuration, with its paths below the root that it is installed in."""
    read_config(config)
    tree: dict[str, Any] = tomllib.loads(read_file(config).decode("utf-8-sig"))
    device, telemetry = tree.setdefault("device", {}), tree.get("telemetry", {})
    if device.get("state", STATE) == STATE:
        device["state"] = layout.state
    for key, file in CREDENTIALS.items():
        if telemetry.get(key) == f"{DEVICE_FOLDER}/{file}":
            telemetry[key] = f"{layout.credentials}/{file}"
    if tree.get("update", {}).get("root") == f"{DEVICE_FOLDER}/{ROOT}":
        tree["update"]["root"] = f"{layout.credentials}/{ROOT}"
    copy = folder / "below-root" / config.name
    copy.parent.mkdir(mode=0o700)
    copy.write_bytes(msgspec.toml.encode(tree))
    return copy


def _check_credentials(own: Path, settings: Config, config: Path, layout: Layout, kit: Path) -> None:
    """Raise `FleetError` unless the credentials work, are the device's, and are those that its configuration names."""
    files = Credentials(*(own / file for file in CREDENTIALS.values()))
    again = f"`eyas enroll {own.name} --yes` makes new ones"
    try:
        authority = x509.load_pem_x509_certificate(read_file(files.ca))
        fit = belong_together(files.cert, files.key, authority)
        certificate = x509.load_pem_x509_certificate(read_file(files.cert))
    except ValueError as error:
        raise FleetError(f"{own}: damaged ({error}); {again}") from None
    if not fit:
        raise FleetError(f"{own}: certificate, key and authority do not belong together; {again}")
    if days_left(files.cert) <= 0:
        raise FleetError(f"{files.cert}: expired; {again}")
    if exists(kit / AUTHORITY / "ca.crt"):
        current = x509.load_pem_x509_certificate(read_file(kit / AUTHORITY / "ca.crt"))
        if current != authority:
            raise FleetError(f"{files.ca}: not the certificate of this kit's authority; {again}")
        if certificate.serial_number in revoked(load_list(kit / AUTHORITY / LIST, current)):
            raise FleetError(f"{files.cert}: revoked, {own.name} was expelled; {again}")
    [holder] = [str(one.value) for one in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] or [""]
    if holder != settings.device.name:
        raise FleetError(
            f"{files.cert} is {holder}'s, but {config} says [device] name = {settings.device.name!r}: the broker lets "
            "a device write below its own name only"
        )
    telemetry = settings.telemetry
    for key, file in CREDENTIALS.items():
        path = f"{layout.credentials}/{file}"
        if telemetry.broker and getattr(telemetry, key) != path:
            raise FleetError(f"{config}: [telemetry] {key} must be {path!r}, where --name brings it")


def _named(settings: Config) -> Iterator[str]:
    """Files that a configuration names."""
    telemetry = settings.telemetry
    if telemetry.broker:
        yield from filter(None, (telemetry.ca, telemetry.certificate, telemetry.key, telemetry.password_file))
    if settings.update.url:
        yield settings.update.root
    for output in settings.output:
        yield from filter(None, (output.header_file, output.ca))
