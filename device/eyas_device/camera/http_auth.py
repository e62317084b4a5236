"""HTTP authentication of network cameras: digest where the server offers it, else basic.

Source: RFC 7616 (digest, with SHA-256 and MD5), RFC 7617 (basic), RFC 9110, 11 (challenges).
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from urllib.request import parse_http_list

_HASHES = {"sha-256": hashlib.sha256, "md5": hashlib.md5}
"""Algorithm -> hash function, the stronger one first."""
_START = re.compile(r"([A-Za-z][\w-]*)(?:\s+(.*))?", re.DOTALL)

Challenge = tuple[str, Mapping[str, str]]
"""Scheme and parameters, both names in lower case."""


def parse_challenges(headers: Iterable[str]) -> Sequence[Challenge]:
    """Parse `WWW-Authenticate` headers, each with one or more challenges."""
    challenges: list[tuple[str, dict[str, str]]] = []
    for item in (item for header in headers for item in parse_http_list(header)):
        name, equals, value = item.partition("=")
        if not equals or " " in name.strip():  # a scheme, maybe with its first parameter
            match = _START.fullmatch(item.strip())
            if match is None:
                continue
            challenges.append((match[1].lower(), {}))
            name, equals, value = (match[2] or "").partition("=")
        if equals and challenges:
            challenges[-1][1][name.strip().lower()] = _unquote(value.strip())
    return challenges


def authorization(
    challenges: Iterable[Challenge], user: str, password: str, *, method: str, target: str, cnonce: str = ""
) -> str | None:
    """Value of the `Authorization` header for the strongest challenge; None if none of them is supported."""
    offered = list(challenges)
    digests = [parameters for scheme, parameters in offered if scheme == "digest" and "nonce" in parameters]
    for name in (f"{algorithm}{session}" for algorithm in _HASHES for session in ("", "-sess")):
        for parameters in digests:
            if parameters.get("algorithm", "MD5").lower() == name and _quality(parameters) is not None:
                return _digest(parameters, user, password, method, target, cnonce or secrets.token_hex(16))
    if any(scheme == "basic" for scheme, _ in offered):
        return f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"
    return None


def is_stale(challenges: Iterable[Challenge]) -> bool:
    """Whether the server only wants its new nonce to be used."""
    return any(scheme == "digest" and p.get("stale", "").lower() == "true" for scheme, p in challenges)


def _quality(parameters: Mapping[str, str]) -> str | None:
    """Protection to use: `auth`, or empty for servers before RFC 2617; None if only others are offered."""
    offered = [word.strip().lower() for word in parameters.get("qop", "").split(",") if word.strip()]
    return "auth" if "auth" in offered else None if offered else ""


def _digest(p: Mapping[str, str], user: str, password: str, method: str, target: str, cnonce: str) -> str:
    algorithm = p.get("algorithm", "MD5")
    function = _HASHES[algorithm.lower().removesuffix("-sess")]

    def hashed(*words: str) -> str:
        return function(":".join(words).encode()).hexdigest()

    realm, nonce, quality = p.get("realm", ""), p["nonce"], _quality(p)
    secret = hashed(user, realm, password)
    if algorithm.lower().endswith("-sess"):
        secret = hashed(secret, nonce, cnonce)
    count = "00000001"
    middle = (nonce, count, cnonce, quality) if quality else (nonce,)
    fields = {"username": user, "realm": realm, "nonce": nonce, "uri": target}
    fields["response"] = hashed(secret, *middle, hashed(method, target))
    fields |= {"cnonce": cnonce} if quality or algorithm.lower().endswith("-sess") else {}
    fields |= {"opaque": p["opaque"]} if "opaque" in p else {}
    parts = [f'{name}="{_quote(value)}"' for name, value in fields.items()]
    parts += [f"algorithm={algorithm}"] if "algorithm" in p else []
    parts += [f"qop={quality}", f"nc={count}"] if quality else []
    return f"Digest {', '.join(parts)}"


def _quote(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\r", "").replace("\n", "")


def _unquote(value: str) -> str:
    if len(value) >= 2 and value[0] == value[-1] == '"':
        return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.DOTALL)
    return value
