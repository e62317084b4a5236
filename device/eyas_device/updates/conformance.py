"""Drives the device's TUF client by three commands: init, refresh, download. The form is that of tuf-conformance.

    python -m eyas_device.updates.conformance --metadata-dir DIR init ROOT
    python -m eyas_device.updates.conformance --metadata-dir DIR --metadata-url URL refresh
    python -m eyas_device.updates.conformance --metadata-dir DIR --metadata-url URL \
        --target-name NAME --target-base-url URL --target-dir DIR download

So TUF's own conformance tests, and any repository of TUF metadata, can be tried against what a device runs: the same
client, fetcher and limits. Only the clock's floor is left out, because those tests play in the past.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import DownloadError, RepositoryError

from eyas_device.errors import EXIT_CHECK_FAILED, EyasError
from eyas_device.support.files import atomic_write
from eyas_device.updates.clock import TrustedClock
from eyas_device.updates.explain import explain
from eyas_device.updates.fetcher import Fetcher
from eyas_device.updates.refusals import MissingError
from eyas_device.updates.trust import DurableUpdater, MetadataFetcher, fetch_target

_ABOUT = "Drive the TUF client of Eyas devices: init, refresh, download."
_ROOT = "root.json"
_MAX_TARGET_BYTES = 1 << 30


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done, 1 refused or failed, 2 wrong arguments."""
    args = _parser().parse_args(argv)
    if (args.command != "init" and not args.metadata_url) or (
        args.command == "download" and not (args.target_name and args.target_base_url and args.target_dir)
    ):
        _parser().error(f"{args.command}: an option is missing; see --help")
    try:
        if args.command == "init":
            shutil.copyfile(args.root, args.metadata_dir / _ROOT)
        else:
            _look(args)
    except (EyasError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_CHECK_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m eyas_device.updates.conformance", description=_ABOUT)
    parser.add_argument("--metadata-dir", type=Path, required=True, metavar="DIR", help="folder of trusted metadata")
    parser.add_argument("--metadata-url", metavar="URL", help="address of the metadata, or a folder")
    parser.add_argument("--target-name", action="append", metavar="NAME", help="target to download; repeatable")
    parser.add_argument("--target-base-url", metavar="URL", help="address of the targets, or a folder")
    parser.add_argument("--target-dir", type=Path, metavar="DIR", help="folder to download to")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init", help="trust a root").add_argument("root", type=Path, metavar="ROOT")
    commands.add_parser("refresh", help="bring the metadata up to date")
    commands.add_parser("download", help="bring the metadata up to date and fetch targets")
    return parser


def _look(args: argparse.Namespace) -> None:
    """Refresh the metadata, and fetch targets if there are some to fetch."""
    url, _, base = args.metadata_url.rstrip("/").rpartition("/")
    clock = TrustedClock(None, released=0.0)
    updater: DurableUpdater | None = None
    with Fetcher(url or "/") as fetcher:
        metadata = MetadataFetcher(fetcher)
        try:
            updater = DurableUpdater(
                str(args.metadata_dir), base, fetcher=metadata, bootstrap=(args.metadata_dir / _ROOT).read_bytes()
            )
            updater.clock = clock
            updater.refresh()
            for name in args.target_name or ():
                _download(updater, name, args.target_base_url, args.target_dir)
        except (RepositoryError, DownloadError) as error:
            raise explain(error, updater, metadata.last, clock.read()) from None


def _download(updater: DurableUpdater, name: str, base: str, folder: Path) -> None:
    info = updater.get_targetinfo(name)
    if info is None:
        raise MissingError(f"{name}: the repository lists no such target")
    path = folder / quote(name, safe="")
    if updater.find_cached_target(info, str(path)):
        return
    with Fetcher(base) as fetcher:
        atomic_write(path, fetch_target(fetcher, updater.file_of(info), info, _MAX_TARGET_BYTES))


if __name__ == "__main__":
    sys.exit(main())
