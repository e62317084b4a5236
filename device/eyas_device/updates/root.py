"""The root of trust that was pinned when the device was enrolled: a file, and nothing of TUF yet."""

from __future__ import annotations

from pathlib import Path

import msgspec

from eyas_device.updates.refusals import RootError

_MAX_ROOT_BYTES = 512_000


def read_root(path: Path) -> bytes:
    """The pinned root. Raises `RootError` if it is missing or damaged; its signatures are checked by each refresh."""
    try:
        if path.is_file() and path.stat().st_size <= _MAX_ROOT_BYTES:
            data = path.read_bytes()
            if msgspec.json.decode(data)["signed"]["_type"] == "root":
                return data
    except OSError as error:
        raise RootError(f"{path}: {error.strerror}; `eyas enroll` and `eyas flash --name` bring it") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
        pass
    if path.exists():
        raise RootError(f"{path}: not a root of trust; `eyas enroll` and `eyas flash --name` bring it")
    raise RootError(f"{path}: no root of trust is pinned here; `eyas enroll` and `eyas flash --name` bring it")
