"""Redaction: no credential leaves the process in a status, a log line, a finding or the text of an error.

Cameras and brokers carry their credentials in many ways: in the user part of an address, in a query string or path, in
a pipeline's properties, in a header. `redact` knows these forms rather than the secrets themselves, because the text
of a library's error may quote an address that no configuration holds. In doubt it removes too much.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

MASK = "***"
"""What stands in place of a credential."""

_MARK = re.compile(r"[@=]|['\"]\s*:|%40|authorization|digest|basic|bearer|cookie|x-", re.IGNORECASE)
"""Without one of these there is nothing to redact, which is true for most texts."""
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,31}(?:://|%3a%2f%2f)", re.IGNORECASE)
_BARE_USER = re.compile(r"(?<![\w@/.%+~-])[\w.%+~-]{1,64}:(?!/|\S{0,64}?://)\S{1,256}@(?=[\w\[])")
"""`USER:PASSWORD@HOST` without a scheme, as people write a broker's address."""
_HOST_AND_PORT = re.compile(r"(?:\[[^\]\s]*\]|[^\[\]:@/?#\s]*)(?::\d{1,5})?(?=[/?#\s'\"]|$)")
_PASSWORD_WITH_SPACE = re.compile(r"[^@]{0,256}@")
_HEADER = re.compile(
    r"(?:authorization|(?<![\w-])(?:set-)?cookie|(?<![\w-])x-[\w-]*(?:key|token))['\"]?\s*[:=]\s*"
    r"|(?<!\w)digest\s+(?=\w+\s*=)",
    re.IGNORECASE,
)
_SCHEME_WORD = re.compile(r"(?<!\w)(?:Bearer|bearer)\s+(?!token|auth)(\S+)")
_BASIC = re.compile(r"(?<!\w)(?:Basic|basic)\s+([A-Za-z0-9+/]{4,}={0,2})")
_STRONG = r"(?:password|passwd|passphrase|passcode|pwd|secret|token|loginpas|user-pw|user-id|proxy-pw|proxy-id)"
_WEAK = (
    r"(?<![A-Za-z0-9])(?:pass|pw|key|auth|sig|signature|session|sessionid|sid|credentials?)"
    r"|(?:api|private|access|secret|shared)[_-]?key"
)
_USER = r"(?<=[?&/;-])(?:user|usr|username|login|loginuse)"
_KEY = re.compile(
    rf"(?:(?:{_STRONG})\d*(?:['\"]\s*:\s*|['\"]?\s*=\s*)|(?:{_WEAK})(?:['\"]\s*:\s*|=)|(?:{_USER})=)", re.IGNORECASE
)
_CAST = re.compile(r"\(\w+\)\s*")
"""GStreamer's type of a value: `user-pw=(string)"..."`."""
_NEXT_KEY = re.compile(r"[&,;][\w.%-]{1,64}=|_[A-Za-z]{1,32}=")
"""What ends a value: the next key of a query, of a list, or of a path such as `/user=x_password=y_channel=1`."""
_TRAILING = "'\"\\)]}>:,.;!"
_MAX_USER = 4096
"""Maximum length of a user and password."""
_SPACE = re.compile(r"\s|$")
_AFTER_QUOTE = re.compile(rf"[)\]}}>:,.;!]*(?:\s|$)|[)\]}}]*,(?=\\?['\"])|{_NEXT_KEY.pattern}")
"""What may follow a quoted value; otherwise its quote is part of the value."""


def redact(text: str) -> str:
    """Return `text` with every user name, password, token and key replaced by `***`.

    Covers user parts of addresses of any scheme (raw and percent-encoded), `name=value` and `"name": "value"` pairs
    that name a credential, and HTTP authentication headers. Host, port, path and other options stay, and so do names
    of files that hold a credential.

    >>> redact("rtsp://admin:S3cret@10.0.0.7:554/live")
    'rtsp://***@10.0.0.7:554/live'
    >>> redact("rtspsrc location=rtsp://10.0.0.7/live user-id=admin user-pw='my pass' ! decodebin ! appsink")
    "rtspsrc location=rtsp://10.0.0.7/live user-id=*** user-pw='***' ! decodebin ! appsink"
    """
    if not _MARK.search(text):
        return text
    for redacted in (_users, _headers, _values):
        text = redacted(text)
    return text


def redact_tree(value: Any) -> Any:
    """Redact every string of nested dictionaries, lists and tuples; other values stay."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: _redact_item(key, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redact_tree(item) for item in value)
    return value


def _redact_item(key: object, value: Any) -> Any:
    """Redact a value; the value of a key that names a credential as a whole."""
    if isinstance(key, str) and isinstance(value, str) and value and _KEY.fullmatch(f"{key}="):
        return MASK
    return redact_tree(value)


def _users(text: str) -> str:
    """Redact `user:password@` of addresses."""
    parts, done = [], 0
    for match in _SCHEME.finditer(text):
        if match.start() < done:  # inside a password
            continue
        encoded = "%" in match[0]
        end = _user_end(text, match.end(), quote=text[match.start() - 1 : match.start()], encoded=encoded)
        if end is not None:
            parts += [text[done : match.end()], MASK, "%40" if encoded else "@"]
            done = end
    return _BARE_USER.sub(f"{MASK}@", "".join([*parts, text[done:]]))


def _user_end(text: str, start: int, *, quote: str, encoded: bool) -> int | None:
    """Where the host begins in the address that starts (after its scheme) at `start`; None without a user part."""
    limit = start + _MAX_USER
    if quote and quote in "'\"`":
        run = text[start:limit].partition(quote)[0]
    else:
        run = next(iter(text[start:limit].split(maxsplit=1)), "") if not text[start : start + 1].isspace() else ""
    if encoded:
        found = list(re.finditer("%40|@", run))
        return start + found[-1].end() if found else None
    authority = re.split(r"[/?#]", run, maxsplit=1)[0]
    at = run.rfind("@")
    if at >= 0:
        # An @ behind the first slash belongs to a password with a slash, if what stands before it may be a user.
        if "@" not in authority and _HOST_AND_PORT.match(run):
            is_host = ":" not in authority or authority.startswith("[")
            if is_host or _KEY.search(run, 0, at):
                return None
        return start + at + 1
    if _HOST_AND_PORT.match(run):
        return None
    rest = _PASSWORD_WITH_SPACE.match(text, start)  # a password with a space
    return None if rest is None or "://" in rest[0] else rest.end()


def _headers(text: str) -> str:
    """Redact the values of HTTP authentication headers."""
    parts, done = [], 0
    for match in _HEADER.finditer(text):
        if match.start() < done:
            continue
        quote = text[match.end() : match.end() + 1]
        start = match.end() + 1 if quote in ("'", '"') else match.end()
        end = _closing(text, start, quote) if start > match.end() else _end_of_line(text, start)
        if end > start:
            parts += [text[done:start], MASK]
            done = end
    text = "".join([*parts, text[done:]])
    text = _SCHEME_WORD.sub(lambda m: m[0][: m.start(1) - m.start()] + MASK, text)
    return _BASIC.sub(lambda m: m[0].replace(m[1], MASK) if _is_basic(m[1]) else m[0], text)


def _is_basic(code: str) -> bool:
    """Whether `code` is base64 of `user:password`."""
    try:
        return b":" in base64.b64decode(
            code + "=" * (-len(code) % 4), altchars=b"-_" if set("-_") & set(code) else None
        )
    except (ValueError, binascii.Error):
        return False


def _values(text: str) -> str:
    """Redact the values of `name=value` pairs that name a credential."""
    parts, done = [], 0
    for match in _KEY.finditer(text):
        if match.start() < done:
            continue
        start = match.end()
        cast = _CAST.match(text, start)
        start = cast.end() if cast else start
        first, end = _value(text, start)
        if end > first:
            parts += [text[done:first], MASK]
            done = end
    return "".join([*parts, text[done:]])


def _value(text: str, start: int) -> tuple[int, int]:
    """First and last position (exclusive) of the value that begins at `start`, without its quotes."""
    quote = next((q for q in ('\\"', "\\'", '"', "'") if text.startswith(q, start)), "")
    if quote:
        first = start + len(quote)
        end = _closing(text, first, quote)
        if (_AFTER_QUOTE if end > first else _SPACE).match(text, end + len(quote)):
            return first, end
    end, spaced = start, False
    while end < len(text) and not text[end].isspace():
        if end > start and not spaced and _NEXT_KEY.match(text, end):
            return start, end
        escape = text[end] == "\\" and end + 1 < len(text)
        spaced |= escape and text[end + 1].isspace()  # or the secret ends with a backslash: then too much is redacted
        end += 2 if escape else 1
    end = min(end, len(text))
    while end > start + 1 and text[end - 1] in _TRAILING:
        end -= 1
    return start, end


def _closing(text: str, start: int, quote: str) -> int:
    """Position of the quote that closes the text from `start`; its end if none does."""
    position = start
    while position < len(text):
        if text.startswith(quote, position):
            return position
        position += 2 if text[position] == "\\" else 1
    return len(text)


def _end_of_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return len(text) if end < 0 else end
