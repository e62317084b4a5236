"""`eyas publish` and `eyas revoke`: releases go into the signed repository, and are withdrawn from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eyas_device.support.logs import show
from eyas_host.cli.options import (
    BoardsOption,
    ChangeOption,
    KeysOption,
    KitOption,
    PassphraseFile,
    PublishChannelOption,
)

if TYPE_CHECKING:
    from eyas_device.updates.release import Bounds, Variant


def publish(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, e.g. runs/solar-cells/bundle.")],
    channel: PublishChannelOption = "",
    site: Annotated[
        str, typer.Option(metavar="SITE", help="Only for devices of this site.  [default: all]", show_default=False)
    ] = "",
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Reduce it for pi3, pi4, pi5, jetson, x86 or all; repeatable.  [default: one variant a runtime, and "
            "all]",
            show_default=False,
        ),
    ] = None,
    board: BoardsOption = None,
    note: ChangeOption = "",
    probation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="Bound on real frames, e.g. frames=1000, min_agreement=0.8; repeatable."
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="DIR", help="Also copy the repository there: a stick, a web server's folder."),
    ] = None,
    oms: Annotated[
        Path | None,
        typer.Option("--oms", metavar="PEM", help="Also write BUNDLE/model.sig, OpenSSF Model Signing, with this key."),
    ] = None,
    kit: KitOption = None,
    keys: KeysOption = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a bundle and put it into the repository; with a channel, devices take it."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.mirror import mirror

    repository = open_repository(kit, passphrase_file, keys)
    bounds = _bounds(probation or [])
    if oms is not None:
        from eyas_host.fleet.updates.oms import sign_bundle

        show(f"{sign_bundle(bundle, oms)}: written")
    release = repository.publish(
        bundle,
        channel=channel,
        site=site,
        targets=tuple(target or ()),
        boards=tuple(board or ()),
        probation=bounds,
        note=note,
    )
    who = f"channel {channel}" if channel else "no channel yet"
    at = f" at {site}" if site else ""
    show(f"{release.model} {release.version}: published, {who}{at}")
    for variant in release.variants:
        show(f"  {', '.join(variant.runtimes)}: {_size(variant)}")
    if to is not None:
        copied = mirror(repository, to)
        show(f"{to}: {copied.files} files copied, {copied.size_bytes / 1e3:.0f} kB")


def revoke(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="Version of the release.")],
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Its model, where several have this version.", show_default=False)
    ] = "",
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why; devices report it.")] = "",
    site: Annotated[
        str | None, typer.Option(metavar="SITE", help="Only that of this site.  [default: wherever it is]")
    ] = None,
    older: Annotated[
        bool, typer.Option("--older", help="Not VERSION, but all that is older: no device installs it any more.")
    ] = False,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Also copy the repository there, as `eyas publish --to`.")
    ] = None,
    kit: KitOption = None,
    keys: KeysOption = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Withdraw a release: no device installs it, and those that run it go back."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.mirror import mirror
    from eyas_host.fleet.updates.variants import PublishError

    repository = open_repository(kit, passphrase_file, keys)
    if older:
        if site is not None or reason:
            raise PublishError("--older is for all sites, and devices say why by themselves: without --site, --reason")
        name = repository.refuse_older(version, model=model)
        show(f"{name}: nothing older than {version} is installed any more")
        if to is not None:
            mirror(repository, to)
        return
    for release in repository.revoke(version, model=model, reason=reason, site=site):
        show(f"{release.model} {release.version}{f' at {release.site}' if release.site else ''}: withdrawn")
    for name, channel in sorted(repository.channels().items()):
        if channel.rolled_back:
            show(f"{name}: goes back to {channel.previous}")
        elif not channel.target:
            show(f"{name}: wants nothing now; `eyas publish --channel` gives it something")
    if to is not None:
        mirror(repository, to)


def _bounds(settings: list[str]) -> Bounds:
    """The bounds of a probation. Raises `PublishError` for one that there is not, or an impossible value."""
    import msgspec

    from eyas_device.updates.release import Bounds
    from eyas_host.fleet.updates.variants import PublishError

    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in Bounds.__struct_fields__:
            raise PublishError(f"--probation {setting}: KEY=VALUE; keys are {', '.join(Bounds.__struct_fields__)}")
        values[key] = value
    try:
        return msgspec.convert(values, Bounds, strict=False)
    except msgspec.ValidationError as error:
        raise PublishError(f"--probation: {error}") from None


def _size(variant: Variant) -> str:
    return f"{len(variant.files)} files, {sum(file.size_bytes for file in variant.files) / 1e3:.0f} kB"
