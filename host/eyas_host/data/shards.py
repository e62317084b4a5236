"""Images in tar shards, as WebDataset writes them, or as `tar` packs a folder of class folders.

A sample is `KEY.jpg` with its label beside it: `KEY.cls` (the label as text) or `KEY.json` (`label` or `cls`, and
perhaps `group` and `time`). Where no shard has such files, the labels are the folders in the archive. A shard is read
once: its list of members is kept in the cache until the shard changes. Nothing is ever unpacked.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import msgspec

from eyas_device.support.image_files import NO_SUFFIX, SPECIAL, SUFFIXES, is_litter
from eyas_host.data.image_bytes import Member, local_file
from eyas_host.data.remote import fetch_all, find_remote, stat_all
from eyas_host.data.remote_file import RemoteFile
from eyas_host.data.times import Axis, read_times
from eyas_host.support.addresses import is_url
from eyas_host.support.errors import DataError
from eyas_host.support.files import cache_folder, write_bytes
from eyas_host.support.progress import track

USAGE = "a .tar file, a folder of them, or a pattern such as train-{000..146}.tar is needed, here or at an address"
LINK = "link in an archive"
SEVERAL_DOTS = "with a further part of the name before the suffix"
_SIDECARS = ("cls", "json")
_VERSION = 1
"""Of the cached lists."""
_MAX_SIDECAR_BYTES = 64 << 10
_MAX_SHARDS = 1_000_000
_END_BYTES = 64 << 10
_BLOCK = 512
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]+)\}")
_SHOWN = 3


class _Image(msgspec.Struct, frozen=True, gc=False):
    """An image in a shard, as the cache has it."""

    name: str
    offset: int
    size: int
    label: str | None = None
    """As its own files say; None without them."""
    group: str = ""
    time: str = ""


class _List(msgspec.Struct, frozen=True):
    """What a shard holds."""

    version: int
    stamp: tuple[int, int]
    """Size and modification time of the shard."""
    images: tuple[_Image, ...]
    labelled: bool
    """Whether it has files with labels."""
    left_out: dict[str, int]


class ShardImage(NamedTuple):
    """A labelled image in a shard."""

    path: str
    """As `eyas_host.data.image_bytes` reads it."""
    label: str
    group: str
    time: float | None
    """Seconds since 1970 UTC."""


class Shards(NamedTuple):
    """What a source of tar shards holds."""

    images: tuple[ShardImage, ...]
    left_out: Mapping[str, int]
    """Reason -> members that were left out."""
    axis: Axis
    """What the times lie on."""
    remarks: tuple[str, ...]
    stamps: Mapping[str, tuple[int, int]]
    """Shard -> its size and modification time when it was listed."""


def find_shards(path: str) -> list[str]:
    """The shards that a path names, sorted: itself, the `.tar` files of a folder, or all that a pattern makes.

    Raises `DataError` if there is none, or one of a pattern is missing.
    """
    root = Path(path)
    if root.is_dir():
        shards = sorted(str(one) for one in root.iterdir() if one.suffix == ".tar" and not is_litter(one.name))
        if not shards:
            raise DataError(f"{path}: no .tar files in this folder; {USAGE}")
        return shards
    shards = expand(path)
    missing = [shard for shard in shards if not Path(shard).is_file()]
    if missing:
        of = f"{len(missing)} of {len(shards)} shards are missing, e.g. {missing[0]}" if len(shards) > 1 else "no such"
        raise DataError(f"{path}: {of}{' file' * (len(shards) == 1)}; {USAGE}")
    return shards


def find_remote_shards(url: str) -> list[RemoteFile]:
    """The shards that an address names: all of a pattern, or the `.tar` files of an object store's folder.

    Raises `DataError` if there is none, one is missing, or the server cannot be reached.
    """
    if url.endswith(".tar"):
        return stat_all(expand(url))
    shards = [file for file in find_remote(url) if file.url.endswith(".tar")]
    if not shards:
        raise DataError(f"{url}: no .tar files there; {USAGE}")
    return shards


def expand(pattern: str) -> list[str]:
    """All names of a pattern with ranges and lists in braces, as WebDataset and shells write them.

    Raises `DataError` for more than a million.

    >>> expand("train-{08..10}.tar"), expand("{a,b}.tar")
    (['train-08.tar', 'train-09.tar', 'train-10.tar'], ['a.tar', 'b.tar'])
    """
    fixed, choices, end, count = [], [], 0, 1
    for found in _RANGE.finditer(pattern):
        fixed.append(pattern[end : found.start()])
        end = found.end()
        if found[1] is None:
            several: Sequence[str] = found[3].split(",")
        else:
            first, last = int(found[1]), int(found[2])
            if last - first >= _MAX_SHARDS:
                raise DataError(f"{pattern}: more than {_MAX_SHARDS:,} names")
            several = [str(number).zfill(len(found[1])) for number in range(first, last + 1)]
        choices.append(several)
        count *= len(several)
        if not 0 < count <= _MAX_SHARDS:
            raise DataError(f"{pattern}: makes {count:,} names; 1 to {_MAX_SHARDS:,} are allowed")
    parts = ("".join(a + b for a, b in zip(fixed, chosen, strict=True)) for chosen in product(*choices))
    return [part + pattern[end:] for part in parts]


def list_shards(path: str, *, times: bool = False) -> Shards:
    """List the images of all shards of `path`; `times`: whether the split needs them, and errors in them count.

    Raises `DataError` for shards that cannot be read, are cut short or compressed, hold a name twice or one that leads
    out of the archive, or images without a label.
    """
    if is_url(path):
        files = find_remote_shards(path)
        fetch_all(files)
        shards = [file.url for file in files]
    else:
        shards = find_shards(path)
    lists = {shard: _list_shard(shard) for shard in track(shards, "listing shards")}
    left_out: Counter[str] = Counter()
    for one in lists.values():
        left_out.update(one.left_out)
    found = [(shard, image) for shard, one in lists.items() for image in sorted(one.images, key=_by_parts)]
    if not found:
        raise DataError(f"{path}: no images in {len(shards)} shard{'s' * (len(shards) > 1)}; {', '.join(SUFFIXES)}")
    labels = _own_labels(path, found) if any(one.labelled for one in lists.values()) else _folder_labels(path, found)
    column = read_times([image.time for _, image in found])
    if column.errors and times:
        error, rows = next(iter(column.errors.items()))
        shard, image = found[rows[0]]
        raise DataError(f"{path}: {len(rows)} x time is {error}, first in {shard}::{image.name} ({image.time!r})")
    moments = [None] * len(found) if column.errors else column.seconds
    remarks = (f"times are not used: time is {next(iter(column.errors))}",) if column.errors else ()
    images = tuple(
        ShardImage(str(Member(shard, image.name, image.offset, image.size)), label, image.group, moment)
        for (shard, image), label, moment in zip(found, labels, moments, strict=True)
    )
    stamps = {shard: one.stamp for shard, one in lists.items()}
    return Shards(images, dict(left_out), column.axis, (*remarks, *(column.remarks if times else ())), stamps)


def stamp_of(shard: str) -> tuple[int, int]:
    """Size and modification time (ns) of a shard. Raises `DataError` if it cannot be read."""
    try:
        info = local_file(shard).stat()
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror})") from None
    return info.st_size, info.st_mtime_ns


def check_unchanged(stamps: Mapping[str, tuple[int, int]]) -> None:
    """Raise `DataError` if a shard is not what it was when it was listed."""
    for shard, stamp in stamps.items():
        if stamp_of(shard) != stamp:
            raise DataError(f"{shard}: changed while its images were read; run again when it is complete")


def _by_parts(image: _Image) -> tuple[str, ...]:
    """The order of class folders."""
    return PurePosixPath(image.name).parts


def _own_labels(path: str, found: Sequence[tuple[str, _Image]]) -> list[str]:
    """The labels that the samples' files give. Raises `DataError` if one has none."""
    missing = [f"{shard}::{image.name}" for shard, image in found if image.label is None]
    if missing:
        key = _key(missing[0].rpartition("::")[2])[0]
        raise DataError(
            f"{path}: {len(missing)} of {len(found)} images have no label, e.g. {missing[0]}; {key}.cls, or a label in "
            f"{key}.json, is needed"
        )
    return [image.label or "" for _, image in found]


def _folder_labels(path: str, found: Sequence[tuple[str, _Image]]) -> list[str]:
    """The folder of each image, below one that holds all of them. Raises `DataError` if one lies in no folder."""
    parts = [PurePosixPath(image.name).parts for _, image in found]
    depth = 0
    while len({own[depth] for own in parts if len(own) > depth}) == 1 and all(len(own) > depth + 2 for own in parts):
        depth += 1
    loose = [f"{shard}::{image.name}" for (shard, image), own in zip(found, parts, strict=True) if len(own) < depth + 2]
    if loose:
        raise DataError(
            f"{path}: {len(loose)} of {len(found)} images have no label, e.g. {loose[0]}: neither KEY.cls nor KEY.json "
            "beside them, nor a folder in the archive"
        )
    return [unicodedata.normalize("NFC", own[depth]) for own in parts]


def _list_shard(shard: str) -> _List:
    """What a shard holds: from the cache, if it has not changed since."""
    stamp = stamp_of(shard)
    name = shard if is_url(shard) else str(Path(shard).absolute())
    own = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32]
    cached = cache_folder("eyas") / "shards" / f"{own}.msgpack"
    try:
        known = msgspec.msgpack.decode(cached.read_bytes(), type=_List)
        if (known.version, known.stamp) == (_VERSION, stamp):
            return known
    except (OSError, msgspec.DecodeError):
        pass
    listed = _read_list(shard, stamp)
    check_unchanged({shard: stamp})
    write_bytes(cached, msgspec.msgpack.encode(listed))
    return listed


def _read_list(shard: str, stamp: tuple[int, int]) -> _List:
    images: dict[str, tuple[int, int]] = {}
    sidecars: dict[str, bytes] = {}
    left_out: Counter[str] = Counter()
    for name, member, stream in _members(shard):
        if member.isdir():
            continue
        reason = _reason(name, member)
        if reason:
            left_out[reason] += 1
            continue
        if name in images or name in sidecars:
            raise DataError(f"{shard}: holds {name} twice; write the shard again with each name once")
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            images[name] = member.offset_data, member.size
        elif member.size > _MAX_SIDECAR_BYTES:
            raise DataError(f"{shard}::{name}: {member.size:,} bytes; a label takes {_MAX_SIDECAR_BYTES:,} at most")
        else:
            stream.seek(member.offset_data)
            sidecars[name] = stream.read(member.size)
    samples = _samples(shard, sidecars)
    if samples:
        several = [name for name in images if "." in _key(name)[1]]
        left_out[SEVERAL_DOTS] += len(several)
        for name in several:
            del images[name]
        _check_keys(shard, images)
    own = tuple(_Image(name, *place, *samples.get(_key(name)[0], ())) for name, place in images.items())
    return _List(_VERSION, stamp, own, bool(samples), dict(+left_out))


def _members(shard: str) -> Iterator[tuple[str, tarfile.TarInfo, IO[bytes]]]:
    """Every member with its clean name and the shard's stream. Raises `DataError` if it is no whole archive."""
    try:
        with local_file(shard).open("rb") as stream:
            start = stream.read(6)
            for magic, kind in _COMPRESSED.items():
                if start.startswith(magic):
                    raise DataError(f"{shard}: is compressed ({kind}), so images cannot be read one by one; unpack it")
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # it keeps a kilobyte of each
                    if member.size < 0:
                        raise DataError(f"{shard}: {member.name!r} has a negative size: damaged")
                    yield _clean_name(shard, member), member, stream
                end = archive.offset
            _check_end(shard, stream, end)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shard}: not a whole tar archive ({error}); copy it again") from None
    except OSError as error:
        raise DataError(f"{shard}: cannot be read ({error.strerror})") from None


def _check_end(shard: str, stream: IO[bytes], end: int) -> None:
    """Check that the archive ends where its last member does: with zeros, and nothing behind them (POSIX, pax)."""
    stream.seek(end)
    rest = stream.read(_END_BYTES)
    if len(rest) < _BLOCK or any(rest[:_BLOCK]):
        raise DataError(f"{shard}: ends without the mark of a whole archive after {end:,} bytes: cut short or damaged")
    if any(rest):
        raise DataError(f"{shard}: more data follows its end: two archives in one file? write them as one")


def _clean_name(shard: str, member: tarfile.TarInfo) -> str:
    """A member's name without `./`. Raises `DataError` if it leads out of the archive or is not UTF-8."""
    parts = [part for part in member.name.split("/") if part not in ("", ".")]
    if member.name.startswith("/") or ".." in parts:
        raise DataError(f"{shard}: the name {member.name!r} leads out of the archive; write the shard again")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise DataError(f"{shard}: the name {member.name!a} is not UTF-8; write the shard again") from None
    return "/".join(parts)


def _key(name: str) -> tuple[str, str]:
    """Key of the sample that a member belongs to, with its folder, and the rest of the name: WebDataset's rule."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _check_keys(shard: str, names: Iterable[str]) -> None:
    """Raise `DataError` if a sample has two images."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_key(name)[0], name)
        if other != name:
            raise DataError(f"{shard}: {other} and {name} have one key and so one label; give each a name of its own")


def _samples(shard: str, sidecars: Mapping[str, bytes]) -> dict[str, tuple[str | None, str, str]]:
    """Key -> label, group and time. Raises `DataError` for a file that does not say them."""
    samples: dict[str, tuple[str | None, str, str]] = {}
    for name, data in sidecars.items():
        key, extension = _key(name)
        label, group, moment = (
            _read_json(shard, name, data) if extension == "json" else (_read_text(shard, name, data), "", "")
        )
        known, *others = samples.get(key, (None, "", ""))
        if known is not None and label is not None and known != label:
            raise DataError(f"{shard}: {key}.cls and {key}.json give two labels, {known!r} and {label!r}; keep one")
        samples[key] = (known if label is None else label, group or others[0], moment or others[1])
    return samples


def _read_text(shard: str, name: str, data: bytes) -> str:
    try:
        text = data.decode().strip()
    except UnicodeDecodeError:
        raise DataError(f"{shard}::{name}: not UTF-8 text; a label is needed") from None
    if not text:
        raise DataError(f"{shard}::{name}: is empty; a label is needed")
    return unicodedata.normalize("NFC", text)


def _read_json(shard: str, name: str, data: bytes) -> tuple[str | None, str, str]:
    try:
        values = msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{shard}::{name}: not a JSON object ({error})") from None
    texts = {}
    for field in ("label", "cls", "group", "time"):
        value = values.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
            raise DataError(f"{shard}::{name}: {field} is {type(value).__name__}; text or a number is needed")
        texts[field] = unicodedata.normalize("NFC", "" if value is None else str(value).strip())
    if texts["label"] and texts["cls"] and texts["label"] != texts["cls"]:
        raise DataError(f"{shard}::{name}: label and cls are two, {texts['label']!r} and {texts['cls']!r}; keep one")
    return texts["label"] or texts["cls"] or None, texts["group"], texts["time"]


def _reason(name: str, member: tarfile.TarInfo) -> str:
    """Why a member is left out; empty if it is an image or says something about one."""
    if litter := next((part for part in name.split("/") if is_litter(part)), ""):
        return "hidden" if litter.startswith(".") else "left behind by a system or a tool"
    if member.issym() or member.islnk():
        return LINK
    if not member.isreg() or member.sparse is not None:
        return SPECIAL
    suffix = PurePosixPath(name).suffix.lower()
    return "" if suffix in SUFFIXES or _key(name)[1] in _SIDECARS else suffix or NO_SUFFIX
