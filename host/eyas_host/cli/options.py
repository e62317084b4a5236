"""Arguments and options shared by several verbs, and helpers that evaluate them."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.errors import LinkError
from eyas_device.support.names import MQTT_PORT

if TYPE_CHECKING:
    from eyas_host.fleet.broker.client import BrokerAccess
    from eyas_host.fleet.connect.ssh import SshAccess
    from eyas_host.pipeline.runner import RunContext

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, e.g. models/solar-cells/recipe.toml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a setting; remembered with the run, KEY= drops it; repeatable.",
    ),
]
YesOption = Annotated[
    bool, typer.Option("--yes", help="Do finished stages again for other settings than the run's without asking.")
]
RunsOption = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder of all runs.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the result to this file.")]
RUNS = Path("runs")
_LISTENS_S = 2.0

RootOption = Annotated[
    str, typer.Option("--root", metavar="DIR", help="Install below this folder of the device; no service unless /.")
]
PythonOption = Annotated[
    str | None,
    typer.Option("--python", metavar="PATH", help="Interpreter on the device that has eyas; builds no environment."),
]
PortOption = Annotated[
    int | None, typer.Option("--port", min=1, max=65535, help="SSH port of devices given without one.")
]
IdentityOption = Annotated[Path | None, typer.Option("--identity", metavar="FILE", help="SSH private key.")]
SshOption = Annotated[
    list[str] | None, typer.Option("--ssh-option", metavar="KEY=VALUE", help="Passed to ssh as -o; repeatable.")
]

BrokerOption = Annotated[
    str | None,
    typer.Option(
        "--broker",
        metavar="HOST[:PORT]",
        help="Default port: 8883 with TLS, else 1883.  [default: the broker of the kit, else 127.0.0.1]",
    ),
]
TlsOption = Annotated[
    bool, typer.Option("--tls", help="Encrypt, trusting the system's certificate authorities; --ca turns it on, too.")
]
CaOption = Annotated[
    Path | None, typer.Option("--ca", metavar="FILE", help="CA certificate of the broker; turns TLS on.")
]
CertificateOption = Annotated[Path | None, typer.Option("--certificate", metavar="FILE", help="Client certificate.")]
KeyOption = Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Private key of --certificate.")]
KitOption = Annotated[
    Path | None,
    typer.Option("--kit", metavar="DIR", help="Folder of `eyas broker`: certificates and addresses.  [default: fleet]"),
]
UserOption = Annotated[
    str, typer.Option("--user", help="User name; password from --password-file or EYAS_MQTT_PASSWORD.")
]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", metavar="FILE", help="File whose first line is the password.")
]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Allow a password without TLS.")]
KeysOption = Annotated[
    list[Path] | None,
    typer.Option("--keys", metavar="DIR", help="Look for private keys in this folder, too, e.g. a stick; repeatable."),
]
PassphraseFile = Annotated[
    Path | None,
    typer.Option(
        "--passphrase-file",
        metavar="FILE",
        help="Its first line is the passphrase of the keys.  [default: EYAS_KEY_PASSPHRASE, else asked for]",
    ),
]
PublishChannelOption = Annotated[
    str,
    typer.Option(
        "--channel",
        metavar="NAME",
        help="Let all devices of this channel take it, e.g. stable.  [default: none, it waits for a rollout]",
        show_default=False,
    ),
]
BoardsOption = Annotated[
    list[str] | None,
    typer.Option("--board", metavar="KIND", help="Kinds of boards that may install it; repeatable.  [default: all]"),
]
ChangeOption = Annotated[str, typer.Option("--note", metavar="TEXT", help="What changed, for people.")]
StoreOption = Annotated[str, typer.Option("--store", metavar="URL", help="Database, as an SQLAlchemy URL.")]
KIT = Path("fleet")
"""Default of `--kit`."""
STORE = "sqlite:///fleet.db"


def run_chain(
    recipe_path: Path,
    runs: Path,
    overrides: list[str] | None,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
    yes: bool = False,
) -> RunContext:
    """Load a recipe, print its warnings, run the stages that are out of date, and return the run."""
    with prepared_run(recipe_path, runs, overrides, start=start, only=only, until=until, yes=yes) as context:
        return context


@contextmanager
def prepared_run(
    recipe_path: Path,
    runs: Path,
    overrides: list[str] | None,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
    yes: bool = False,
    shared: bool = False,
) -> Iterator[RunContext]:
    """As `run_chain`, and the run stays locked while the block uses it; `shared` blocks only read."""
    from eyas_host.pipeline import runner
    from eyas_host.stages.chain import STAGES
    from eyas_host.stages.plan import show_plan

    last = until if shared else None  # later stages stay as they are, and the settings are for this command alone
    context = settled_run(recipe_path, runs, overrides, start=start, only=only, until=last, yes=yes)
    with runner.prepared_run(STAGES, context, start=start, only=only, until=until, shared=shared, plan=show_plan):
        yield context


def settled_run(
    recipe_path: Path,
    runs: Path,
    overrides: list[str] | None,
    *,
    start: str | None = None,
    only: str | None = None,
    until: str | None = None,
    yes: bool = False,
) -> RunContext:
    """The run of a recipe with this command's settings and the remembered ones; prints the recipe's warnings."""
    from eyas_host.api import check_stages, show_warnings
    from eyas_host.cli.remembered import settle

    check_stages(start, only)
    stages = {"start": start, "only": only, "until": until}
    context = settle(recipe_path, runs, overrides or (), stages=stages, yes=yes)
    show_warnings(context.recipe)
    return context


def ssh_access(identity: Path | None, port: int | None, options: list[str] | None) -> SshAccess:
    """Collect the SSH options."""
    from eyas_host.fleet.connect.ssh import FleetError, SshAccess

    if identity is not None and not identity.is_file():
        raise FleetError(f"--identity {identity}: no such file; the private key of the login is needed")
    return SshAccess(identity=identity, port=port, options=tuple(options or ()))


def kit_option(kit: Path) -> str:
    """The option that names a kit, for commands that are shown; empty for the default."""
    return "" if kit == KIT else f" --kit {shlex.quote(str(kit))}"


def _check_plain_broker() -> None:
    """Raise `LinkError` if no broker listens on this machine."""
    try:
        socket.create_connection(("127.0.0.1", MQTT_PORT), timeout=_LISTENS_S).close()
    except ConnectionRefusedError:
        raise LinkError(
            f"no broker: there is no kit in ./{KIT}, and nothing listens on 127.0.0.1:{MQTT_PORT}; `eyas broker` comes "
            "first, or name one with --broker or --kit"
        ) from None
    except OSError:
        pass  # the connection itself says what is wrong


def broker_access(
    broker: str | None,
    kit: Path | None,
    *,
    tls: bool,
    ca: Path | None,
    certificate: Path | None,
    key: Path | None,
    user: str,
    password_file: Path | None,
    insecure: bool,
) -> BrokerAccess:
    """Collect the broker options; the kit's address and credentials are the defaults.

    Without a kit and a broker it is the kit in `./fleet` if there is one, else a broker on this machine. Raises
    `LinkError` where that does not listen, or where the kit has no credentials: `eyas broker` comes first.
    """
    from eyas_host.fleet.broker.client import BrokerAccess

    if kit is None and broker is None:
        kit = KIT if KIT.is_dir() else None
        if kit is None and not (tls or ca):
            _check_plain_broker()
    if kit is not None:
        from eyas_host.fleet.broker.kit import HOST, local_address
        from eyas_host.fleet.broker.pki import exists

        host = kit / HOST
        if ca is None and not exists(host / "ca.crt"):
            raise LinkError(f"{host}: no credentials; `eyas broker{kit_option(kit)}` comes first and makes them")
        ca, key = ca or host / "ca.crt", key or host / "client.key"
        certificate = certificate or host / "client.crt"
        if broker is None and (address := local_address(kit)) is not None:
            broker = str(address)
    broker = "127.0.0.1" if broker is None else broker
    access = BrokerAccess(
        broker=broker,
        tls=tls,
        ca=ca,
        certificate=certificate,
        key=key,
        user=user,
        password_file=password_file,
        insecure=insecure,
    )
    access.check()
    return access
