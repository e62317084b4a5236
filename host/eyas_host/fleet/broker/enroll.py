"""Enrol a device: its certificate and key, its complete device.toml, and a tar archive of both."""

from __future__ import annotations

import io
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.camera import check_spec
from eyas_device.config import COMMANDS, CONFIG, read_config
from eyas_device.errors import CameraSpecError, ConfigError, LinkError
from eyas_device.support.names import BrokerAddress, check_name, check_site, parse_broker
from eyas_host.fleet.broker.kit import (
    AUTHORITY,
    BROKER,
    DEVICES,
    HOST_IDENTITY,
    certified_hosts,
    check_real,
    device_address,
    open_authority,
)
from eyas_host.fleet.broker.pki import (
    CLIENT_DAYS,
    Authority,
    CredentialError,
    Credentials,
    Issued,
    exists,
    read_file,
    write_file,
)
from eyas_host.fleet.broker.revocation import LIST, hand_to_broker, load_list, revoke, revoked

DEVICE_FOLDER = str(CONFIG.with_name("credentials"))
"""Folder of the credentials on the device."""
CREDENTIALS = {"ca": "ca.crt", "certificate": "client.crt", "key": "client.key"}
"""Key of [telemetry] -> file in that folder, and in the device's folder of the kit."""
ROOT = "root.json"
"""File of the pinned root of trust, beside the credentials."""
SERVICE_GROUP = "eyas"
"""Group of the device's service, which has to read the private key."""


class Enrolled(msgspec.Struct, frozen=True):
    """What a device was given."""

    credentials: Credentials
    config: Path
    """Its complete device.toml."""
    archive: Path
    """All of it, to unpack on the device by hand."""
    site: str
    camera: str
    """Empty if none was ever named: a service needs one."""
    broker: BrokerAddress | None
    """Address in it: as given, else of the kit in the folder; None if neither is known."""
    commands: tuple[str, ...]
    revoked: int
    """Number of earlier certificates that were revoked."""
    update_url: str = ""
    """Address of its repository; empty: none."""
    warnings: tuple[str, ...] = ()


def enroll(
    folder: Path,
    name: str,
    *,
    site: str | None = None,
    camera: str | None = None,
    broker: str | None = None,
    commands: Iterable[str] | None = None,
    days: float = CLIENT_DAYS,
    replace: bool = False,
    root: bytes | None = None,
    update_url: str | None = None,
) -> Enrolled:
    """Issue credentials for a device and write its device.toml, which `eyas flash --name` brings to it.

    What is not given stays as in the device's earlier device.toml, with everything else that was written into it;
    else the site is `default`, the broker that of the kit in `folder`, and all commands are allowed.

    Args:
        folder: The kit.
        name: Name of the device.
        site: Second level of its topics.
        camera: Specification of its camera, as for `eyas-device run --camera`.
        broker: Address of its broker.
        commands: Commands that a host may send it.
        days: Lifetime of its certificate.
        replace: Revoke its earlier certificates; else they stay valid until they expire or it is expelled.
        root: The root of trust that it pins for signed updates; None: it gets none, or keeps the one that it has.
        update_url: Address of the repository as the device reaches it; None: as before.

    Raises:
        LinkError: An invalid name, address or command.
        CameraSpecError: An invalid camera.
        ConfigError: The earlier device.toml has errors.
        CredentialError: The files cannot be written or signed.

    """
    _check_names(name, site)
    if camera is not None:
        check_camera(camera)
    address = device_address(folder) if broker is None else parse_address(broker)
    own = folder / DEVICES / name
    config = own / "device.toml"
    earlier = _earlier_settings(config)
    allowed = check_commands(commands) if commands is not None else None
    text = _settings(earlier, name, site=site, camera=camera, broker=str(address or ""), commands=allowed)
    text = _with_updates(text, pinned=root is not None or exists(own / ROOT), url=update_url)
    _check_settings(config, text)
    authority = open_authority(folder)
    before = valid_certificates(authority, name) if replace else []
    credentials = authority.issue(own, name, days=days)
    write_file(config, text.encode(), private=True)
    if root is not None:
        write_file(own / ROOT, root)
    archive = own.with_name(f"{name}.tar")
    write_file(archive, _pack(credentials, config), private=True)
    if before:
        revoke(authority, {int(one.serial, 16): name for one in before})
        if exists(folder / BROKER):
            hand_to_broker(authority, folder / BROKER)
    settings = read_config(config)
    return Enrolled(
        credentials,
        config,
        archive,
        settings.device.site,
        settings.camera.source,
        settings.telemetry.address if settings.telemetry.broker else None,
        settings.telemetry.commands,
        len(before),
        settings.update.url,
        (*_warnings(folder, address), *_moved(name, earlier, settings.device.site)),
    )


def valid_certificates(authority: Authority, name: str) -> list[Issued]:
    """The certificates of a device that are neither expired nor revoked, oldest first."""
    gone = revoked(load_list(authority.folder / LIST, authority.certificate))
    return [
        one
        for one in authority.issued()
        if one.name == name and int(one.serial, 16) not in gone and one.until > time.time()
    ]


def known_device(folder: Path, name: str) -> list[Issued]:
    """The valid certificates of a device, as `valid_certificates`; none where there is no kit yet."""
    _check_names(name, None)
    return valid_certificates(Authority(folder / AUTHORITY), name) if exists(folder / AUTHORITY / "ca.crt") else []


def has_camera(folder: Path, name: str) -> bool:
    """Whether the device's earlier device.toml names a camera."""
    return bool(_earlier_settings(folder / DEVICES / name / "device.toml").get("camera", {}).get("source"))


def parse_address(broker: str) -> BrokerAddress:
    """Address of a device's broker, with TLS. Raises `LinkError` for an impossible one and a placeholder."""
    try:
        address = parse_broker(broker, tls=True)
        check_real(address.host)
    except ValueError as error:
        raise LinkError(f"--broker {error}") from None
    return address


def check_camera(spec: str) -> None:
    """Raise `CameraSpecError` unless a device can have this camera."""
    check_spec(spec)
    kind, _, rest = spec.partition(":")
    if kind in ("folder", "video") and not rest.startswith("/"):
        raise CameraSpecError(f"camera {spec}: the service needs an absolute path of the device, as {kind}:/srv/{rest}")


def check_commands(names: Iterable[str]) -> tuple[str, ...]:
    """The names without repetitions. Raises `LinkError` for one that is not a command."""
    unique = tuple(dict.fromkeys(names))
    for name in unique:
        if name not in COMMANDS:
            raise LinkError(f"--commands {name!r}: allowed are {', '.join(COMMANDS)}, or none")
    return unique


def _check_names(name: str, site: str | None) -> None:
    for kind, check, value in (("device", check_name, name), ("site", check_site, site)):
        try:
            if value is not None:
                check(value)
        except ValueError as error:
            raise LinkError(f"{kind} {error}") from None
    if name == HOST_IDENTITY:
        raise LinkError(f"device {name!r}: reserved for the host; choose another name")


def _earlier_settings(config: Path) -> dict[str, Any]:
    """The sections of an earlier device.toml. Raises `ConfigError` if it has errors."""
    if not exists(config):
        return {}
    data = read_file(config)
    read_config(config)
    return tomllib.loads(data.decode("utf-8-sig"))


def _settings(
    earlier: Mapping[str, Any],
    name: str,
    *,
    site: str | None,
    camera: str | None,
    broker: str,
    commands: Iterable[str] | None,
) -> str:
    """The text of a device.toml: the earlier settings with what is new."""
    device, telemetry = dict(earlier.get("device", {})), dict(earlier.get("telemetry", {}))
    device |= {"name": name, "site": device.get("site", "default") if site is None else site}
    telemetry |= {"broker": broker} if broker else {}
    telemetry |= {key: f"{DEVICE_FOLDER}/{file}" for key, file in CREDENTIALS.items()}
    telemetry["commands"] = list(telemetry.get("commands", COMMANDS) if commands is None else commands)
    sections: dict[str, Any] = {"device": device, "camera": dict(earlier.get("camera", {})), "telemetry": telemetry}
    sections["camera"] |= {} if camera is None else {"source": camera}
    if not sections["camera"]:
        del sections["camera"]
    return msgspec.toml.encode({**sections, **{key: earlier[key] for key in earlier if key not in sections}}).decode()


def _with_updates(text: str, *, pinned: bool, url: str | None) -> str:
    """The text of a device.toml with where its root of trust and its repository are."""
    sections = tomllib.loads(text)
    update = dict(sections.get("update", {}))
    update |= {"root": f"{DEVICE_FOLDER}/{ROOT}"} if pinned and "root" not in update else {}
    update |= {} if url is None else {"url": url}
    return msgspec.toml.encode(sections | ({"update": update} if update else {})).decode()


def _check_settings(config: Path, text: str) -> None:
    """Raise `ConfigError`, as the device would, unless it can read this text."""
    with tempfile.TemporaryDirectory(prefix="eyas-enroll-") as folder:
        trial = Path(folder) / config.name
        trial.write_text(text, encoding="utf-8")
        try:
            read_config(trial)
        except ConfigError as error:
            raise ConfigError(str(error).replace(str(trial), str(config))) from None


def _pack(credentials: Credentials, config: Path) -> bytes:
    """A tar archive to unpack in /etc/eyas, as root, who gives the files to the service's group."""
    packed = io.BytesIO()
    root = config.with_name(ROOT)
    public = [credentials.ca, credentials.cert, *([root] if exists(root) else [])]
    files = {f"credentials/{path.name}": path for path in (*public, credentials.key)}
    try:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for member, path in {**files, config.name: config}.items():
                info = tar.gettarinfo(path, arcname=member)
                info.mode = 0o644 if path in public else 0o640
                info.uid = info.gid = 0
                info.uname, info.gname = "root", SERVICE_GROUP  # `tar` goes by the names
                with path.open("rb") as stream:
                    tar.addfile(info, stream)
    except OSError as error:
        raise CredentialError(f"{config.parent}: cannot be read ({error.strerror})") from None
    return packed.getvalue()


def _moved(name: str, earlier: Mapping[str, Any], site: str) -> Iterable[str]:
    before = earlier.get("device", {}).get("site", site)
    if before != site:
        yield f"its site was {before}; after the flash, `eyas forget {name}` removes what the broker retains there"


def _warnings(folder: Path, address: BrokerAddress | None) -> Iterable[str]:
    if address is None:
        return
    if address.is_loopback:
        yield f"{address.host} is the device itself; `eyas broker --bind 0.0.0.0` serves others"
    hosts = certified_hosts(folder)
    if hosts and address.host not in hosts:
        yield (
            f"the broker's certificate is not for {address.host}, so the device will refuse it: start `eyas broker` "
            f"with --name {address.host}"
        )
