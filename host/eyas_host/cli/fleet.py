"""The verbs of `eyas` that carry and show telemetry. Nothing heavy is imported until one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from eyas_host.fleet.broker.client import Access
    from eyas_host.fleet.collect.collector import Report

_STORE = "sqlite:///fleet.db"

_Broker = Annotated[str, typer.Option("--broker", metavar="HOST[:PORT]", help="Port 8883 with --ca, else 1883.")]
_Ca = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation on Python 3.10
    typer.Option("--ca", metavar="FILE", help="Certificate of the broker's authority: turns TLS on."),
]
_Cert = Annotated[Optional[Path], typer.Option("--cert", metavar="FILE", help="Client certificate.")]  # noqa: UP045
_Key = Annotated[Optional[Path], typer.Option("--key", metavar="FILE", help="Its private key.")]  # noqa: UP045
_Kit = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--kit", metavar="DIR", help="A folder of `eyas broker`: its credentials are used."),
]
_User = Annotated[str, typer.Option("--user", help="User name; the password is in EYAS_MQTT_PASSWORD or a file.")]
_PasswordFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--password-file", metavar="FILE", help="The password is its first line."),
]
_Store = Annotated[str, typer.Option("--store", metavar="URL", help="SQLAlchemy's URL of the database.")]
_Json = Annotated[bool, typer.Option("--json", help="One JSON object a line, for pipes.")]
_Folder = Annotated[Path, typer.Option("--folder", metavar="DIR", help="Where certificates and keys are kept.")]


def collect(
    broker: _Broker = "127.0.0.1",
    store: _Store = _STORE,
    group: Annotated[str, typer.Option(help="Collectors of one group share the messages.")] = "eyas",
    name: Annotated[Optional[str], typer.Option(help="This one's name in the group; the host's by default.")] = None,  # noqa: UP045
    receive_maximum: Annotated[
        int, typer.Option("--in-hand", min=2, max=10_000, help="Messages that are taken before a commit, at most.")
    ] = 500,
    ca: _Ca = None,
    cert: _Cert = None,
    key: _Key = None,
    kit: _Kit = None,
    user: _User = "",
    password_file: _PasswordFile = None,
    json: _Json = False,
) -> None:
    """Store what devices send, and acknowledge only what is stored. Ends at SIGTERM or Ctrl-C."""
    from eyas_host.fleet.collect.collector import collect as run

    access = _access(broker, ca, cert, key, kit, user, password_file)
    run(
        store,
        access,
        name=name,
        group=group,
        receive_maximum=receive_maximum,
        tell=_tell_json if json else _tell,
    )


def watch(
    broker: _Broker = "127.0.0.1",
    ca: _Ca = None,
    cert: _Cert = None,
    key: _Key = None,
    kit: _Kit = None,
    user: _User = "",
    password_file: _PasswordFile = None,
    json: _Json = False,
    seconds: Annotated[Optional[float], typer.Option(min=0.1, help="End after so long.")] = None,  # noqa: UP045
) -> None:
    """Show all devices live, trouble first, from the broker alone. Ends with q or Ctrl-C."""
    import sys

    from eyas_host.fleet.watch.view import stream
    from eyas_host.fleet.watch.view import watch as run

    access = _access(broker, ca, cert, key, kit, user, password_file)
    if json:
        stream(access, sys.stdout, seconds=seconds)
    else:
        run(access, seconds=seconds)


def broker(
    folder: _Folder = Path("fleet"),
    bind: Annotated[str, typer.Option(metavar="ADDRESS", help="0.0.0.0 lets devices reach it.")] = "127.0.0.1",
    port: Annotated[Optional[int], typer.Option(min=1, max=65535, help="8883; embedded: 1883.")] = None,  # noqa: UP045
    names: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--name", metavar="HOST", help="A name or address under which devices reach it; may be repeated."),
    ] = None,
    embedded: Annotated[
        bool, typer.Option("--embedded", help="A first try without mosquitto: this machine only, no TLS, nothing kept.")
    ] = False,
) -> None:
    """Run a broker that knows each device by its certificate. The first start makes what it needs."""
    if embedded:
        from eyas_host.fleet.broker.embedded import serve_embedded

        serve_embedded(port or 1883, say=_say)
        return
    from eyas_host.fleet.broker.client import TLS_PORT
    from eyas_host.fleet.broker.kit import prepare, serve

    kit = prepare(folder, bind=bind, port=port or TLS_PORT, names=names or ())
    at = f"{kit.hosts[0]}:{kit.port}"
    _say(f"devices:   eyas enroll NAME --folder {folder} --broker {at}")
    _say(f"collector: eyas collect --kit {folder} --broker {at}")
    _say(f"watching:  eyas watch --kit {folder} --broker {at}")
    code = serve(kit, say=_say)
    if code:
        raise typer.Exit(code)


def enroll(
    device: Annotated[str, typer.Argument(metavar="NAME", help="The device's name, unique in the fleet.")],
    site: Annotated[str, typer.Option(help="Where it is: the second level of its topics.")] = "default",
    broker: Annotated[str, typer.Option("--broker", metavar="HOST:PORT", help="For its device.toml.")] = "BROKER:8883",
    folder: _Folder = Path("fleet"),
    days: Annotated[float, typer.Option(min=1, max=3650, help="How long they are valid.")] = 825.0,
) -> None:
    """Make a device's credentials: key, certificate, and what goes into its device.toml."""
    from eyas_host.fleet.broker.enroll import THERE
    from eyas_host.fleet.broker.enroll import enroll as run

    made = run(folder, device, site=site, broker=broker, days=days)
    typer.echo(made.section)
    _say(f"{made.archive}: to {THERE}/ on the device; the key in it is secret")


def expire(
    store: _Store = _STORE,
    windows: Annotated[float, typer.Option(min=1, metavar="DAYS", help="Then windows are merged to hours.")] = 30.0,
    events: Annotated[float, typer.Option(min=1, metavar="DAYS", help="Then events, profiles, results go.")] = 365.0,
    poison: Annotated[float, typer.Option(min=1, metavar="DAYS", help="Then the quarantine is emptied.")] = 30.0,
) -> None:
    """Merge and delete what is old in a store; collectors may go on meanwhile."""
    from eyas_host.fleet.store.retention import Keep
    from eyas_host.fleet.store.retention import prune as run
    from eyas_host.fleet.store.store import Store

    with Store(store) as opened:
        gone = run(opened, Keep(windows_days=windows, events_days=events, poison_days=poison))
    typer.echo(f"{gone.rolled} windows merged, {gone.deleted} messages and {gone.poison} of the quarantine deleted")


def _access(
    broker: str,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    kit: Path | None,
    user: str,
    password_file: Path | None,
) -> Access:
    from eyas_host.fleet.broker.client import Access

    if kit is not None:
        host = kit / "host"
        ca, cert, key = ca or host / "ca.crt", cert or host / "client.crt", key or host / "client.key"
    return Access(broker=broker, ca=ca, cert=cert, key=key, user=user, password_file=password_file)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _tell(report: Report) -> None:
    _say(
        f"{report.state}; {report.messages} stored, {report.per_second:.0f}/s, {report.duplicates} came again, "
        f"{report.quarantined} in quarantine, {report.waiting} waiting, lag {report.lag_s:.2f} s"
        f"{'' if report.store == 'writing' else f'; {report.store}'}"
    )


def _tell_json(report: Report) -> None:
    import msgspec

    typer.echo(msgspec.json.encode(report).decode())
