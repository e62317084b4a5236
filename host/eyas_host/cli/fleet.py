"""Verbs of the fleet's server: `broker`, `enroll`, `expel`, `forget`, `collect`, `watch` and `expire`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.errors import LinkError
from eyas_device.support.streams import to_json
from eyas_host.cli.options import (
    STORE,
    BrokerOption,
    CaOption,
    CertificateOption,
    FolderOption,
    InsecureOption,
    KeyOption,
    KitOption,
    PasswordFile,
    StoreOption,
    TlsOption,
    UserOption,
    broker_access,
)

if TYPE_CHECKING:
    from eyas_host.fleet.collect.collector import CollectorReport


def broker(
    folder: FolderOption = Path("fleet"),
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets devices connect.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port.  [default: 8883; embedded: 1883]")] = None,
    names: Annotated[
        list[str] | None,
        typer.Option("--name", metavar="HOST", help="Name or address that devices connect to; repeatable."),
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="For a first try without mosquitto: this machine only, no TLS.")
    ] = False,
) -> None:
    """Run an MQTT broker with mutual TLS; the first start creates its certificates."""
    if embedded:
        from eyas_host.fleet.broker.embedded import serve_embedded

        serve_embedded(port or 1883, say=_print)
        return
    from eyas_device.support.names import TLS_PORT, format_address
    from eyas_host.fleet.broker.kit import prepare
    from eyas_host.fleet.broker.supervise import serve

    kit = prepare(folder, bind=bind, port=port or TLS_PORT, names=names or ())
    address = format_address(kit.hosts[0], kit.port)
    for warning in kit.warnings:
        _print(f"warning:   {warning}")
    _print(f"devices:   eyas enroll NAME --folder {folder} --broker {address}")
    _print(f"collector: eyas collect --kit {folder} --broker {address}")
    _print(f"live view: eyas watch --kit {folder} --broker {address}")
    if code := serve(kit, say=_print):
        raise typer.Exit(code)


def enroll(
    device: Annotated[str, typer.Argument(metavar="NAME", help="Name of the device, unique in the fleet.")],
    site: Annotated[str, typer.Option(help="Site of the device: second level of its topics.")] = "default",
    broker: Annotated[
        str | None,
        typer.Option("--broker", metavar="HOST[:PORT]", help="Broker for its device.toml.  [default: the kit's own]"),
    ] = None,
    folder: FolderOption = Path("fleet"),
    days: Annotated[float, typer.Option(min=1, max=3650, help="Lifetime of the certificate.")] = 825.0,
) -> None:
    """Issue a device's credentials: key, certificate and a section for its device.toml."""
    from eyas_host.fleet.broker.enroll import DEVICE_FOLDER
    from eyas_host.fleet.broker.enroll import enroll as run
    from eyas_host.fleet.broker.kit import device_address

    if broker is None and device_address(folder) is None:
        raise LinkError(f"--broker HOST:PORT is needed: no broker was started with `eyas broker --folder {folder}` yet")
    enrolled = run(folder, device, site=site, broker=broker, days=days)
    print(enrolled.section)
    host = enrolled.broker.host if enrolled.broker else ""
    if host in ("localhost", "::1") or host.startswith("127."):
        _print(f"warning: {host} is the device itself; `eyas broker --bind 0.0.0.0 --name HOST` serves a network")
    _print(
        f"{enrolled.archive}: contains a private key; on the device, as root: "
        f"tar -xf {enrolled.archive.name} -C {Path(DEVICE_FOLDER).parent}"
    )


def expel(
    device: Annotated[str, typer.Argument(metavar="NAME", help="Name of an enrolled device.")],
    folder: FolderOption = Path("fleet"),
) -> None:
    """Lock a device out: revoke its certificates, end its connection, remove its retained status and answer."""
    from eyas_host.fleet.broker.expel import expel as run

    expelled = run(folder, device)
    count = expelled.certificates
    print(f"{device}: {count} certificate{'' if count == 1 else 's'} revoked{'' if count else ', all were before'}")
    if expelled.broker_crl:
        _print(f"{expelled.broker_crl}: a running `eyas broker` of this folder applies it within seconds")
    _print(f"{expelled.crl}: copy it over broker/ca.crl of the same fleet on any other machine that runs its broker")


def forget(
    device: Annotated[str, typer.Argument(metavar="NAME", help="Name of a device that is gone.")],
    broker: BrokerOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    kit: KitOption = None,
    user: UserOption = "",
    password_file: PasswordFile = None,
    insecure: InsecureOption = False,
) -> None:
    """Remove what a broker retains of a device that is gone, also of one without a certificate."""
    from eyas_host.fleet.broker.forget import forget as run

    access = broker_access(
        broker,
        kit,
        tls=tls,
        ca=ca,
        certificate=certificate,
        key=key,
        user=user,
        password_file=password_file,
        insecure=insecure,
    )
    removed = run(access, device)
    for name in removed:
        print(f"{name}: removed")
    if not removed:
        print(f"{device}: the broker retains nothing of it")


def collect(
    broker: BrokerOption = None,
    store: StoreOption = STORE,
    group: Annotated[str, typer.Option(help="Collectors of one group share the messages.")] = "eyas",
    name: Annotated[
        str | None, typer.Option(help="Name of this collector in its group.  [default: the host name]")
    ] = None,
    receive_maximum: Annotated[
        int, typer.Option("--receive-maximum", min=2, max=10_000, help="Max. messages received but not yet committed.")
    ] = 500,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    kit: KitOption = None,
    user: UserOption = "",
    password_file: PasswordFile = None,
    insecure: InsecureOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print each report as one line of JSON.")] = False,
) -> None:
    """Store what devices send and acknowledge what is stored, until SIGTERM or Ctrl-C."""
    from eyas_device.support.names import host_name
    from eyas_host.fleet.collect.collector import CollectorSettings
    from eyas_host.fleet.collect.collector import collect as run

    access = broker_access(
        broker,
        kit,
        tls=tls,
        ca=ca,
        certificate=certificate,
        key=key,
        user=user,
        password_file=password_file,
        insecure=insecure,
    )
    settings = CollectorSettings(
        name=host_name() if name is None else name, group=group, receive_maximum=receive_maximum
    )
    run(store, access, settings, on_report=_print_json if json else _print_report)


def watch(
    broker: BrokerOption = None,
    tls: TlsOption = False,
    ca: CaOption = None,
    certificate: CertificateOption = None,
    key: KeyOption = None,
    kit: KitOption = None,
    user: UserOption = "",
    password_file: PasswordFile = None,
    insecure: InsecureOption = False,
    json: Annotated[bool, typer.Option("--json", help="Print each message as one line of JSON.")] = False,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Stop after this long.")] = None,
) -> None:
    """Show all devices live, worst condition first, until q or Ctrl-C."""
    from eyas_host.fleet.watch import live

    access = broker_access(
        broker,
        kit,
        tls=tls,
        ca=ca,
        certificate=certificate,
        key=key,
        user=user,
        password_file=password_file,
        insecure=insecure,
    )
    if json:
        live.stream(access, sys.stdout, seconds=seconds)
    else:
        live.watch(access, seconds=seconds)


def expire(
    store: StoreOption = STORE,
    windows: Annotated[
        float, typer.Option(min=1, metavar="DAYS", help="Age at which windows are merged into hours.")
    ] = 30.0,
    events: Annotated[
        float, typer.Option(min=1, metavar="DAYS", help="Age at which events, profiles and results are deleted.")
    ] = 365.0,
    quarantine: Annotated[
        float, typer.Option(min=1, metavar="DAYS", help="Age at which quarantined messages are deleted.")
    ] = 30.0,
) -> None:
    """Apply retention to a store: merge old windows, delete old messages. Collectors may keep running."""
    from eyas_host.fleet.store.database import Store
    from eyas_host.fleet.store.retention import Retention
    from eyas_host.fleet.store.retention import expire as run

    with Store(store) as opened:
        expired = run(opened, Retention(windows_days=windows, events_days=events, quarantine_days=quarantine))
    print(f"{expired.merged} windows merged, {expired.deleted} messages deleted, {expired.quarantined} quarantined")


def _print(text: str) -> None:
    print(text, file=sys.stderr)


def _print_report(report: CollectorReport) -> None:
    state = ": ".join(filter(None, (report.state.replace("_", " "), report.detail)))
    error = f"; cannot write: {report.store_error}; nothing is acknowledged until it can" if report.store_error else ""
    error += f"; warning: {report.warning}" if report.warning else ""
    _print(
        f"{state}; {report.messages} stored, {report.per_second:.0f}/s, {report.duplicates} duplicates, "
        f"{report.quarantined} quarantined, {report.waiting} waiting, lag {report.lag_s:.2f} s{error}"
    )


def _print_json(report: CollectorReport) -> None:
    print(to_json(report, sys.stdout))
