"""What root needs of the repository to update the agent, in a folder that the service's user fills and nobody trusts.

The user who speaks with the network cannot change the agent, and root, who can, speaks with no network: it reads this
folder as one reads a stick, beginning at the pinned root. See `eyas_device.updates.agent_release`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from eyas_device.config import UpdateSection
from eyas_device.support.files import atomic_write
from eyas_device.updates.clock import CLOCK, TrustedClock
from eyas_device.updates.fetch import Progress, Staging
from eyas_device.updates.fetcher import Fetcher
from eyas_device.updates.progress import UPDATES
from eyas_device.updates.release import Variant, blob_path
from eyas_device.updates.trust import TrustedRepository

MIRROR = "agent"
"""Folder of the copy, below `STATE/updates`."""
REQUEST = "agent-request"
"""File in `STATE/updates` whose change starts root's unit."""
_VIEW, _STAGING = "agent-view", "agent-staging"


class CopyingFetcher(Fetcher):
    """A fetcher that keeps a copy of each whole file in a folder."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self._copies = folder

    def open(self, path: str, *, offset: int = 0, max_bytes: int) -> Iterator[bytes]:
        """Read a file of the repository, as `Fetcher.open`, and keep it when it has arrived."""
        data = bytearray()
        for chunk in super().open(path, offset=offset, max_bytes=max_bytes):
            if not path.startswith("blobs/"):  # they are staged
                data += chunk
            yield chunk
        if data and not offset:
            copy = self._copies / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(copy, bytes(data))


class AgentMirror:
    """The copy below a device's state folder.

    Args:
        update: The section [update] of the configuration.
        site: Site of the device.
        state: The device's state folder.

    """

    def __init__(self, update: UpdateSection, site: str, state: Path) -> None:
        self._update, self._site, self._state = update, site, state
        self._folder = state / UPDATES
        self.path = self._folder / MIRROR

    def open(self) -> TrustedRepository:
        """The repository, seen with nothing cached, so that all metadata are fetched, and copied on the way."""
        view = self._folder / _VIEW
        shutil.rmtree(view, ignore_errors=True)
        view.mkdir(parents=True)
        fetcher = CopyingFetcher(self._update.url, self.path)
        clock = TrustedClock(self._folder / CLOCK)
        return TrustedRepository(self._update, self._site, view, clock=clock, fetcher=fetcher)

    def add(self, variant: Variant, repository: TrustedRepository, progress: Progress) -> None:
        """Fetch the wheels of a variant that are not there yet. Raises `UpdateError`."""
        staging = Staging(self._folder / _STAGING, rate_kb=self._update.rate_kb)
        have = sorted((self.path / "blobs").glob("*/*"))
        wheels = staging.assemble(variant, repository.fetcher, have, progress=progress)
        wanted = {}
        for file in variant.files:
            wanted[blob := self.path / blob_path(file.sha256)] = wheels / file.path
            blob.parent.mkdir(parents=True, exist_ok=True)
        for old in set(have) - set(wanted):
            old.unlink()
        for blob, wheel in wanted.items():
            blob.unlink(missing_ok=True)
            blob.hardlink_to(wheel)
        staging.clean()

    def request(self) -> None:
        """Start root's unit."""
        atomic_write(self._folder / REQUEST, b"")

    def clean(self) -> None:
        """Remove everything: no release of the agent is wanted."""
        for name in (MIRROR, _VIEW, _STAGING):
            shutil.rmtree(self._folder / name, ignore_errors=True)
        with suppress(OSError):
            (self._folder / REQUEST).unlink(missing_ok=True)
