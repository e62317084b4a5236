"""Arguments and options shared by several verbs, and helpers that evaluate them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eyas_device.errors import LinkError

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
        help="Default port: 8883 with TLS, else 1883.  [default: the broker of --kit, else 127.0.0.1]",
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
    Path | None, typer.Option("--kit", metavar="DIR", help="Folder of `eyas broker`: use the host's credentials in it.")
]
UserOption = Annotated[
    str, typer.Option("--user", help="User name; password from --password-file or EYAS_MQTT_PASSWORD.")
]
PasswordFile = Annotated[
    Path | None, typer.Option("--password-file", metavar="FILE", help="File whose first line is the password.")
]
InsecureOption = Annotated[bool, typer.Option("--insecure", help="Allow a password without TLS.")]
StoreOption = Annotated[str, typer.Option("--store", metavar="URL", help="Database, as an SQLAlchemy URL.")]
FolderOption = Annotated[Path, typer.Option("--folder", metavar="DIR", help="Folder of certificates and keys.")]
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
    from eyas_host.fleet.connect.ssh import SshAccess

    return SshAccess(identity=identity, port=port, options=tuple(options or ()))


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
    """Collect the broker options; the kit's address and credentials are the defaults."""
    from eyas_host.fleet.broker.client import BrokerAccess

    if kit is not None:
        from eyas_host.fleet.broker.kit import HOST, local_address
        from eyas_host.fleet.broker.pki import exists

        host = kit / HOST
        if ca is None and not exists(host / "ca.crt"):
            raise LinkError(f"{host}: no credentials; the first start of `eyas broker --folder {kit}` makes them")
        ca, key = ca or host / "ca.crt", key or host / "client.key"
        certificate = certificate or host / "client.crt"
        if broker is None and (address := local_address(kit)) is not None:
            broker = str(address)
    broker = "127.0.0.1" if broker is None else broker
    return BrokerAccess(
        broker=broker,
        tls=tls,
        ca=ca,
        certificate=certificate,
        key=key,
        user=user,
        password_file=password_file,
        insecure=insecure,
    )
