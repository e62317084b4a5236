"""Where a run's images lie on this machine.

The split's manifest knows images by their hash alone, so that a data set that moved is still the same input to every
later stage; this table beside it has the paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from eyas_host.data.sources import LabelledImage
from eyas_host.pipeline.runner import LOCATIONS
from eyas_host.support.errors import DataError
from eyas_host.support.files import write_bytes


class Locations(msgspec.Struct, frozen=True):
    """`split/locations.json`."""

    sources: tuple[str, ...]
    """Folders of the sources, `[data] path` first; empty for the demonstration set."""
    paths: dict[str, str]
    """sha256 of an image -> its file."""

    def located(self, images: Iterable[LabelledImage]) -> tuple[LabelledImage, ...]:
        """The images with their paths; an image without one keeps what it has."""
        return tuple(msgspec.structs.replace(p, path=self.paths.get(p.sha256, p.path)) for p in images)


def without_paths(images: Iterable[LabelledImage]) -> tuple[LabelledImage, ...]:
    """The images as the manifest has them."""
    return tuple(msgspec.structs.replace(image, path="") for image in images)


def save_locations(root: Path, images: Iterable[LabelledImage], sources: Sequence[str]) -> None:
    """Write the table of the run at `root`."""
    table = Locations(sources=tuple(sources), paths={image.sha256: image.path for image in images})
    write_bytes(root / LOCATIONS, msgspec.json.format(msgspec.json.encode(table), indent=1))


def load_locations(root: Path) -> Locations:
    """Read the table of the run at `root`. Raises `DataError` if it is missing or malformed."""
    try:
        return msgspec.json.decode((root / LOCATIONS).read_bytes(), type=Locations)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{root / LOCATIONS}: cannot be read ({error}); run again with --from split") from None
