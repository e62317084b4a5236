"""Addresses of images: which are known, and what must not be in them."""

from __future__ import annotations

import re

WEB = ("http", "https")
STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "memory": "fsspec"}
"""Object stores that fsspec reads, and the package of each."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(path: str) -> bool:
    """Whether a path is an address rather than a file of this machine."""
    return _SCHEME.match(path) is not None


def scheme_of(url: str) -> str:
    """`https`, `s3`, ... of an address."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def address_error(url: str) -> str:
    """What is wrong with an address of images, without quoting it; empty if it can be used.

    Credentials are refused: an address is written into recipes, manifests, reports and messages.
    """
    scheme = scheme_of(url)
    if scheme not in (*WEB, *STORES):
        return f"{scheme}:// is not known; https://, {', '.join(f'{name}://' for name in STORES if name != 'memory')}"
    authority, _, rest = url.partition("://")[2].partition("/")
    if "@" in authority:
        fix = "~/.netrc" if scheme in WEB else "the environment or the configuration of the store's tools"
        return f"holds a user or password, which would be written into manifests and reports; put them into {fix}"
    if "?" in url or "#" in url:
        return "holds a query, and signed addresses are credentials; name the file alone"
    if "::" in url:
        return "is a chain of file systems; name one address"
    if not authority or "/../" in f"/{rest}/":
        return "is not complete"
    return ""
