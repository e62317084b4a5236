"""The hub that timm's weights come from: the only server that the host asks on its own, after one bounded probe.

`HF_ENDPOINT` names it (huggingface.co by default), `HF_HUB_OFFLINE=1` switches it off. A hub that does not answer as
one is not asked again by this process; what its cache holds is used.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import timm

from eyas_host.support.progress import warn

PROBE_S = 5.0
"""How long a hub has to answer, seconds: look-up, connection, proxy and reply together."""
_FILES = ("model.safetensors", "pytorch_model.bin")
_SILENT: dict[str, str] = {}
"""Hub that did not answer this process -> why."""


class Repository(NamedTuple):
    """Where the hub keeps a network's weights."""

    name: str
    revision: str | None
    files: tuple[str, ...]
    """Names that the weights may have, the preferred one first."""


def repository(network: str) -> Repository | None:
    """The hub's repository of a network, or None if its weights are not on the hub."""
    config = timm.get_pretrained_cfg(network)
    if config is None or not config.hf_hub_id:
        return None
    name, _, revision = config.hf_hub_id.partition("@")
    return Repository(name, revision or None, (config.hf_hub_filename,) if config.hf_hub_filename else _FILES)


def host() -> str:
    """Name of the hub's host."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or constants.ENDPOINT


def unreachable(where: Repository, *, seconds: float = PROBE_S) -> str:
    """Why the hub cannot be used, empty if it answers as a hub does; then it is not asked again by this process.

    It is asked once for one file's metadata, through a proxy if one is set; no answer within `seconds` counts as none.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _SILENT.get(constants.ENDPOINT, "HF_HUB_OFFLINE is set")
    replies: list[str] = []
    probe = threading.Thread(target=lambda: replies.append(_ask(where, seconds)), name="hub-probe", daemon=True)
    probe.start()
    probe.join(seconds)
    why = replies[0] if replies else f"does not answer within {seconds:g} s"
    if why:
        constants.HF_HUB_OFFLINE = True
        _SILENT[constants.ENDPOINT] = why
        warn(f"the hub ({host()}) {why}: off-line from here on; HF_HUB_OFFLINE=1 leaves it out")
    return why


def cached_weights(where: Repository) -> Path | None:
    """The weights' file in the hub's cache on this machine, or None."""
    from huggingface_hub import try_to_load_from_cache

    for file in where.files:
        try:
            found = try_to_load_from_cache(where.name, file, revision=where.revision)
        except (OSError, ValueError):  # a cache that is no folder, or cannot be read
            continue
        if isinstance(found, str):
            return Path(found)
    return None


def _ask(where: Repository, seconds: float) -> str:
    """Ask for a file's metadata once; why the hub cannot be used, or an empty text."""
    from huggingface_hub import constants, get_hf_file_metadata
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    url = f"{constants.ENDPOINT}/{where.name}/resolve/{where.revision or 'main'}/{where.files[0]}"
    try:
        metadata = get_hf_file_metadata(url, timeout=seconds)
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return ""  # what a hub says of a file that it does not have
    except HfHubHTTPError as error:
        return f"answers with error {error.response.status_code}"
    except Exception as error:  # the client raises what its HTTP library does, and that has changed twice
        if "timeout" in type(error).__name__.lower():
            return f"does not answer within {seconds:g} s"
        return f"cannot be reached ({' '.join((str(error) or type(error).__name__).split())[:120]})"
    return "" if metadata.commit_hash else "answers, but not as a hub: is it the login page of a network or a proxy?"
