"""`eyas enroll`: a device's certificate and configuration, and the question before a known name gets another one."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.errors import LinkError
from eyas_device.support.logs import show
from eyas_host.cli.options import KIT, KitOption, kit_option

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from eyas_host.fleet.broker.pki import Issued

_CAMERAS = "e.g. v4l2:0, picamera2:, rtsp://HOST/PATH, mjpeg:http://HOST/PATH"


def enroll(
    device: Annotated[str, typer.Argument(metavar="NAME", help="Name of the device, unique in the fleet.")],
    camera: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help=f"Its camera, {_CAMERAS}.  [default: as enrolled before]"),
    ] = None,
    site: Annotated[
        str | None,
        typer.Option(help="Second level of its topics.  [default: as enrolled before, else default]"),
    ] = None,
    broker: Annotated[
        str | None,
        typer.Option(
            "--broker", metavar="HOST[:PORT]", help="Broker as the device reaches it.  [default: the kit's own]"
        ),
    ] = None,
    commands: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Commands that it executes: pause,resume,... or none.  [default: all]"),
    ] = None,
    update_url: Annotated[
        str | None,
        typer.Option(
            "--update-url",
            metavar="URL",
            help="Repository of signed releases as the device reaches it: https://HOST/PATH, http://HOST/PATH, or a "
            "folder there.  [default: as enrolled before, else none]",
        ),
    ] = None,
    kit: KitOption = None,
    days: Annotated[float, typer.Option(min=1, max=3650, help="Lifetime of the certificate.")] = 825.0,
    replace: Annotated[bool, typer.Option("--replace", help="Revoke the device's earlier certificates.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Issue a known device another one without asking.")] = False,
) -> None:
    """Issue a device's certificate and write its complete device.toml, which `eyas flash --name` brings to it."""
    from eyas_device.config import CONFIG
    from eyas_device.support.redact import redact
    from eyas_host.fleet.broker import enroll as enrolment
    from eyas_host.fleet.broker.kit import AUTHORITY, broker_for_devices
    from eyas_host.fleet.broker.pki import exists

    folder = KIT if kit is None else kit
    option = kit_option(folder)
    if not exists(folder / AUTHORITY):
        raise LinkError(f"{folder}: there is no kit; `eyas broker{option} --bind 0.0.0.0` comes first and makes it")
    known = enrolment.known_device(folder, device)
    if camera is None and not enrolment.has_camera(folder, device):
        raise LinkError(f"--camera SPEC is needed, {_CAMERAS}; all kinds: `eyas-device run --help`")
    address, others = (None, ()) if broker is not None else broker_for_devices(folder, option)
    if known and not (yes or replace):
        _ask(device, known, option)
    enrolled = enrolment.enroll(
        folder,
        device,
        site=site,
        camera=camera,
        broker=broker if address is None else str(address),
        commands=None if commands is None else [one.strip() for one in commands.split(",") if one.strip() != "none"],
        days=days,
        replace=replace,
        root=_root(folder, option, update_url),
        update_url=update_url,
    )
    show(f"{enrolled.config}: site {enrolled.site}, camera {redact(enrolled.camera)}, broker {enrolled.broker}")
    if others:
        show(f"the broker is also {', '.join(others)}: --broker HOST:PORT takes another of its addresses")
    if enrolled.update_url:
        show(f"signed updates from {redact(enrolled.update_url)}, trusted by the root of this kit")
    show(f"commands it executes: {', '.join(enrolled.commands) or 'none'}")
    if enrolled.revoked:
        show(f"{_certificates(enrolled.revoked)} revoked: it is locked out until it is flashed")
    elif known:
        show(f"{_certificates(len(known))} still valid, until `eyas expel {device}{option}` revokes all of them")
    for warning in enrolled.warnings:
        show(f"warning: {warning}", sys.stderr)
    show(f"next:    eyas flash USER@HOST --name {device}{option} --bundle DIR")
    show(
        f"by hand: {enrolled.archive} (with the private key); on the device, as root: "
        f"tar -xf {enrolled.archive.name} -C {CONFIG.parent}"
    )


def _root(kit: Path, option: str, url: str | None) -> bytes | None:
    """The root of the kit's repository; None if there is no repository, and none is asked for."""
    from eyas_device.updates.fetcher import Fetcher
    from eyas_host.fleet.broker.pki import exists
    from eyas_host.fleet.updates.repository import REPOSITORY, Repository

    if url:
        Fetcher(url).close()
    if not exists(kit / REPOSITORY):
        if url:
            raise LinkError(f"{kit}: there is no repository; `eyas keys init{option}` comes first and makes it")
        return None
    return Repository(kit).root()


def _ask(device: str, known: Sequence[Issued], option: str) -> None:
    """Ask before a known device gets another certificate. Raises `LinkError` where nobody can be asked, or for a no."""
    until = datetime.fromtimestamp(max(one.until for one in known), UTC)
    text = (
        f"{device} is enrolled, its certificate is valid until {until:%Y-%m-%d}. Another one does not end that: "
        f"`eyas expel {device}{option}` or --replace does"
    )
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise LinkError(f"{text}; --yes issues another one, --replace also revokes that")
    show(text, sys.stderr)
    if not typer.confirm("Issue another certificate?", err=True):
        raise LinkError(f"{device}: nothing was changed")


def _certificates(count: int) -> str:
    return f"{count} earlier certificate{'' if count == 1 else 's'}"
