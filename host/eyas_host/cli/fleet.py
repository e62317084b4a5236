"""Verbs of the fleet's server: `broker`, `expel`, `forget`, `collect`, `watch` and `expire`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.support.logs import show
from eyas_device.support.streams import to_json
from eyas_host.cli.options import (
    KIT,
    STORE,
    BrokerOption,
    CaOption,
    CertificateOption,
    InsecureOption,
    KeyOption,
    KitOption,
    PasswordFile,
    StoreOption,
    TlsOption,
    UserOption,
    broker_access,
    kit_option,
)

if TYPE_CHECKING:
    from eyas_host.fleet.collect.settings import CollectorReport


def broker(
    kit: KitOption = None,
    bind: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="0.0.0.0 lets devices connect.  [default: as before, else 127.0.0.1]"),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port.  [default: as before, else 8883; embedded: 1883]")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", metavar="HOST", help="Name or address that devices connect to; repeatable.  [default: as before]"
        ),
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
    from eyas_host.fleet.broker.kit import device_address, prepare
    from eyas_host.fleet.broker.supervise import serve

    folder = KIT if kit is None else kit
    option = kit_option(folder)
    prepared = prepare(folder, bind=bind, port=port, names=names or ())
    address = device_address(folder)
    for warning in prepared.warnings:
        _print(f"warning:   {warning}")
    if address is None or address.is_loopback:
        _print("note:      other machines cannot reach it; `eyas broker --bind 0.0.0.0` serves them")
        local = "" if address is None else f" --broker {address}"
        _print(f"devices:   eyas enroll NAME --camera SPEC{option}{local}   (on this machine)")
    else:
        _print(f"devices:   eyas enroll NAME --camera SPEC{option}   (for {address})")
    _print(f"collector: eyas collect{option}")
    _print(f"live view: eyas watch{option}")
    if code := serve(prepared, say=_print):
        raise typer.Exit(code)


def expel(
    device: Annotated[str, typer.Argument(metavar="NAME", help="Name of an enrolled device.")],
    kit: KitOption = None,
) -> None:
    """Lock a device out: revoke its certificates, end its connection, remove its retained status and answer."""
    from eyas_host.fleet.broker.expel import expel as run

    expelled = run(KIT if kit is None else kit, device)
    count = expelled.certificates
    show(f"{device}: {count} certificate{'' if count == 1 else 's'} revoked{'' if count else ', all were before'}")
    if expelled.broker_crl:
        _print(f"{expelled.broker_crl}: a running `eyas broker` of this kit applies it within seconds")
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
        show(f"{name}: removed")
    if not removed:
        show(f"{device}: the broker retains nothing of it")


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
    drift: Annotated[
        float,
        typer.Option(min=0, metavar="SECONDS", help="Look for drift so often, see `eyas drift`; 0: not."),
    ] = 60.0,
    webhook: Annotated[
        str, typer.Option(metavar="URL", help="Post alarms of drift to this web server, as JSON.", show_default=False)
    ] = "",
    page: Annotated[
        Path | None,
        typer.Option(
            "--page",
            metavar="FILE",
            help="Write the page of drift (HTML) whenever alarms change, and once an hour.",
            show_default=False,
        ),
    ] = None,
    page_url: Annotated[
        str,
        typer.Option(
            "--page-url",
            metavar="URL",
            help="Where a web server shows that page: alarms carry the address of their section.",
            show_default=False,
        ),
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="Print each report as one line of JSON.")] = False,
) -> None:
    """Store what devices send and acknowledge what is stored, until SIGTERM or Ctrl-C."""
    from eyas_device.support.names import host_name
    from eyas_host.fleet.collect.collector import collect as run
    from eyas_host.fleet.collect.group import check_names
    from eyas_host.fleet.collect.settings import CollectorSettings
    from eyas_host.fleet.drift.errors import DriftError

    of_drift = {"--webhook": webhook, "--page": page, "--page-url": page_url}
    if not drift and (unused := [name for name, value in of_drift.items() if value]):
        raise DriftError(f"{', '.join(unused)}: --drift 0 looks for no drift")
    settings = CollectorSettings(
        name=host_name() if name is None else name,
        group=group,
        receive_maximum=receive_maximum,
        drift_s=drift,
        webhook=webhook,
        page="" if page is None else str(page),
        page_url=page_url,
    )
    check_names(settings.group, settings.name)
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
        run(store, access, settings, on_report=_print_json)
        return
    from eyas_host.fleet.collect.log import CollectorLog

    log = CollectorLog()
    try:
        run(store, access, settings, on_report=log.report, on_start=log.say)
    finally:
        log.close()


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

    with Store(store, create=False) as opened:
        expired = run(opened, Retention(windows_days=windows, events_days=events, quarantine_days=quarantine))
    show(f"{expired.merged} windows merged, {expired.deleted} messages deleted, {expired.quarantined} quarantined")


def _print(text: str) -> None:
    show(text, sys.stderr)


def _print_json(report: CollectorReport) -> None:
    print(to_json(report, sys.stdout), flush=True)
