"""`eyas publish-agent`: a version of the agent itself goes into the signed repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def publish_agent(
    wheels: Annotated[
        list[str],
        typer.Argument(
            metavar="PLATFORM=DIR",
            help="A folder with the wheel of eyas-device and exactly those that it needs on a platform, e.g. "
            "cp311-aarch64=wheels/pi.",
        ),
    ],
    channel: PublishChannelOption = "",
    board: BoardsOption = None,
    note: ChangeOption = "",
    kit: KitOption = None,
    keys: KeysOption = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Sign a version of the agent; devices that allow it exchange theirs, and go back by themselves."""
    from eyas_host.cli.passphrases import open_repository
    from eyas_host.fleet.updates.agent import publish_agent as publish
    from eyas_host.fleet.updates.variants import PublishError

    folders = {}
    for text in wheels:
        platform, equals, folder = text.partition("=")
        if not equals or not Path(folder).is_dir():
            raise PublishError(f"{text}: PLATFORM=DIR is needed, with a folder of wheels: cp311-aarch64=wheels/pi")
        folders[platform] = Path(folder)
    repository = open_repository(kit, passphrase_file, keys)
    release = publish(repository, folders, channel=channel, boards=tuple(board or ()), note=note)
    show(f"{release.model} {release.version}: published, {f'channel {channel}' if channel else 'no channel yet'}")
    for variant in release.variants:
        size = sum(file.size_bytes for file in variant.files) / 1e6
        show(f"  {variant.platform}: {len(variant.files)} wheels, {size:.1f} MB")
