"""The bytes of an image, wherever it lies: a file here or at an address, or a member of a tar shard at a known offset.

A member's path is `SHARD.tar::MEMBER@OFFSET+SIZE`: it needs no list of the shard to be read, and no shard stays open,
so that there may be more shards than file descriptors.
"""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import NamedTuple

from eyas_device.errors import ImageError
from eyas_device.preprocess import Pixels, Preprocessing, decode
from eyas_host.data.remote import local_copy
from eyas_host.support.addresses import is_url
from eyas_host.support.errors import DataError

_MEMBER = re.compile(r"(?P<shard>.+?\.tar)::(?P<name>.+)@(?P<offset>\d+)\+(?P<size>\d+)", re.DOTALL)


class Member(NamedTuple):
    """A file in a tar shard."""

    shard: str
    name: str
    offset: int
    """Of its first byte in the shard."""
    size: int
    """Bytes."""

    def __str__(self) -> str:
        return f"{self.shard}::{self.name}@{self.offset}+{self.size}"


def parse_member(path: str) -> Member | None:
    """The member that a path names; None for a file of its own.

    >>> parse_member("/data/train-000.tar::cat/7.jpg@1536+20480")
    Member(shard='/data/train-000.tar', name='cat/7.jpg', offset=1536, size=20480)
    """
    found = _MEMBER.fullmatch(path) if ".tar::" in path else None
    if found is None:
        return None
    return Member(found["shard"], found["name"], int(found["offset"]), int(found["size"]))


def file_name(path: str) -> str:
    """Name of an image without its folder, as people know it."""
    member = parse_member(path)
    return Path(path if member is None else member.name).name


def read_image_bytes(path: str) -> bytes:
    """Read an encoded image, of a file at an address from its copy on this machine.

    Raises `OSError` if it cannot be read, and `DataError` if there is no copy and none can be made.
    """
    member = parse_member(path)
    if member is None:
        return local_file(path).read_bytes()
    with local_file(member.shard).open("rb", buffering=0) as stream:
        return _read_at(stream.fileno(), member)


def local_file(path: str) -> Path:
    """The file of this machine that a path means: the copy of one at an address, which is made if it is missing."""
    return local_copy(path) if is_url(path) else Path(path)


def _read_at(descriptor: int, member: Member) -> bytes:
    """The member's bytes; one call reads up to 2 GB."""
    data = os.pread(descriptor, member.size, member.offset)
    if len(data) < member.size:
        raise OSError(errno.EIO, "the archive ends before this image: it has changed", str(member))
    return data


def read_pixels(path: str, spec: Preprocessing | None = None) -> Pixels:
    """Read and decode an image. Raises `ImageError` naming it if it cannot be read or decoded."""
    try:
        data = read_image_bytes(path)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    except DataError as error:
        raise ImageError(str(error)) from None
    return decode(data, spec=spec, where=path)
