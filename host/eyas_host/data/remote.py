"""Images at `https://` and `s3://` addresses, by way of a copy on this machine.

Each file is downloaded once, into `eyas/remote` below the user's cache folder (`XDG_CACHE_HOME`), and read there. What
breaks off goes on where it was. A copy is used until a command that lists the images finds another version.
"""

from __future__ import annotations

import errno
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.support.logs import clean
from eyas_device.support.trouble import FULL
from eyas_host.data import remote_http
from eyas_host.data.remote_file import RemoteFile, UnreachableError
from eyas_host.support.addresses import STORES, WEB, address_error, scheme_of
from eyas_host.support.errors import DataError, MissingExtra
from eyas_host.support.extras import install_line
from eyas_host.support.files import cache_folder, exclusive_lock, write_bytes
from eyas_host.support.progress import meter, warn

_WAITS_S = (0.5, 1.0, 2.0, 4.0)
"""Between attempts that brought nothing."""
_THREADS = 8
"""Files that are downloaded at a time."""
_CHUNK_BYTES = 1 << 20
_VERSIONS = ("ETag", "etag", "generation", "md5", "LastModified", "last_modified", "mtime", "created")
"""What the file systems of fsspec call a version, the surest first."""


def local_copy(url: str) -> Path:
    """The copy of a file, which is downloaded if there is none. Raises `DataError` if it cannot be."""
    place = _place(url)
    return place.with_suffix(".data") if _known(place) is not None else fetch(stat_remote(url))


def stat_remote(url: str) -> RemoteFile:
    """Size and version of a file now, or of its copy if the server is out of reach; that is a warning.

    Raises `DataError` if there is no such file, or it can neither be reached nor is here.
    """
    _check_address(url)
    try:
        return remote_http.stat_file(url) if scheme_of(url) in WEB else _with_store(url, _stat_now)
    except UnreachableError as error:
        known = _known(_place(url))
        if known is None:
            raise
        warn(f"{error}: the copy on this machine is used")
        return known


def stat_all(urls: Sequence[str]) -> list[RemoteFile]:
    """`stat_remote` of each, several at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(stat_remote, urls))


def find_remote(url: str) -> list[RemoteFile]:
    """All files below a folder of an object store, sorted. Raises `DataError` if it cannot be listed."""
    _check_address(url)
    if scheme_of(url) in WEB:
        raise DataError(f"{url}: a web server does not list its files; name tar shards (source = 'tar')")
    files: list[RemoteFile] = _with_store(url, _find)
    return files


def fetch_all(files: Iterable[RemoteFile]) -> None:
    """Download what is missing of some files, several at a time. Raises `DataError` if one cannot be had."""
    missing = [file for file in files if not _matches(_known(_place(file.url)), file)]
    if not missing:
        return
    with (
        meter("downloading (MB)", sum(max(0, file.size) for file in missing) // 1_000_000) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        arrived = [0] * len(missing)

        def report(number: int) -> Callable[[int], None]:
            def count(size: int) -> None:
                arrived[number] = size
                bar.reach(sum(arrived) // 1_000_000)

            return count

        try:
            jobs = [pool.submit(fetch, file, report(number)) for number, file in enumerate(missing)]
            for job in jobs:
                job.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def fetch(file: RemoteFile, progress: Callable[[int], None] = lambda size: None) -> Path:
    """Download this version of a file, unless it is here, and return the copy; `progress` gets the bytes so far.

    Raises `DataError` if the server has no such file or another version, does not answer, or the disk is full.
    """
    place = _place(file.url)
    data, about = place.with_suffix(".data"), place.with_suffix(".json")
    with exclusive_lock(place.parent / "lock"):
        if _matches(_known(place), file):
            return data
        part = place.with_suffix(".part")
        try:
            _download(file, part, place.with_suffix(".part.json"), progress)
            about.unlink(missing_ok=True)
            part.replace(data)
        except OSError as error:
            fix = "; free some space, or set XDG_CACHE_HOME to a larger disk" if error.errno in FULL else ""
            raise DataError(f"{file.url}: its copy {place.parent} cannot be written ({error.strerror}){fix}") from None
        write_bytes(about, msgspec.json.encode(msgspec.structs.replace(file, size=data.stat().st_size)))
    return data


def _download(file: RemoteFile, part: Path, about: Path, progress: Callable[[int], None]) -> None:
    """Complete `part`, from where an earlier attempt on the same version ended."""
    if _read(about) != file or not file.version:
        part.unlink(missing_ok=True)
        write_bytes(about, msgspec.json.encode(file))
    part.touch()
    waits = iter(_WAITS_S)
    while (arrived := part.stat().st_size) != file.size:
        try:
            _append(file, part, arrived, progress)
            if file.size < 0:
                break
            problem = f"{file.url}: ended after {part.stat().st_size:,} of {file.size:,} bytes"
        except UnreachableError as error:
            problem = str(error)
        if part.stat().st_size > arrived and file.version:
            waits = iter(_WAITS_S)
        elif part.stat().st_size != file.size:
            wait_s = next(waits, None)
            if wait_s is None:
                raise UnreachableError(f"{problem}; what has arrived is kept, run again to go on")
            time.sleep(wait_s)
    about.unlink(missing_ok=True)


def _append(file: RemoteFile, part: Path, arrived: int, progress: Callable[[int], None]) -> None:
    """Read the file from `arrived` on, or from its start if the server cannot do that, to the end of `part`."""
    if arrived and (arrived > file.size >= 0 or not file.version):
        arrived = 0
    read = remote_http.read_file if scheme_of(file.url) in WEB else _read_store
    start, chunks = read(file, arrived)
    with part.open("r+b") as stream:
        stream.truncate(start)
        stream.seek(start)
        for chunk in chunks:
            stream.write(chunk)
            progress(stream.tell())
            if stream.tell() > file.size >= 0:
                raise DataError(f"{file.url}: more than the {file.size:,} bytes that the server named; run again")


def _place(url: str) -> Path:
    """Where the copy of a file lies, without its suffix."""
    key = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:40]
    folder = cache_folder("eyas") / "remote" / key[:2]
    folder.mkdir(parents=True, exist_ok=True)
    return folder / key


def _known(place: Path) -> RemoteFile | None:
    """What the copy there is; None if there is none, or it is damaged."""
    known = _read(place.with_suffix(".json"))
    with suppress(OSError):
        if known is not None and place.with_suffix(".data").stat().st_size == known.size:
            return known
    return None


def _matches(known: RemoteFile | None, file: RemoteFile) -> bool:
    """Whether a copy is of this version; by its size where the server has no versions."""
    if known is None or known.version != file.version:
        return False
    return known.size == file.size or (file.size < 0 and bool(file.version))


def _read(path: Path) -> RemoteFile | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=RemoteFile)
    except (OSError, msgspec.DecodeError):
        return None


def _check_address(url: str) -> None:
    if problem := address_error(url):
        raise DataError(f"[data] path: the address {problem}")


def _with_store(url: str, work: Callable[[str, Any, str], Any]) -> Any:
    """`work(url, file system, path)`; what the store's package raises becomes a `DataError` without credentials."""
    package = STORES[scheme_of(url)]
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        return work(url, system, path)
    except ImportError:
        extra = install_line("s3") if package == "s3fs" else f"install the package {package}"
        raise MissingExtra(f"{url}: needs {package}: {extra}") from None
    except FileNotFoundError:
        raise DataError(f"{url}: no such file or folder") from None
    except PermissionError as error:
        raise DataError(f"{url}: access denied ({clean(str(error))}); see to the store's credentials") from None
    except DataError:
        raise
    except (OSError, TimeoutError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UnreachableError(f"{url}: cannot be read ({clean(str(error))})") from None
    except Exception as error:  # each package has errors of its own, such as a login that it does not find
        raise DataError(f"{url}: cannot be read ({type(error).__name__}: {clean(str(error))})") from None


def _stat(url: str, system: Any, path: str) -> RemoteFile:
    return _file(url, system.info(path))


def _stat_now(url: str, system: Any, path: str) -> RemoteFile:
    """Without what the file system remembers of earlier listings."""
    system.invalidate_cache()
    return _stat(url, system, path)


def _find(url: str, system: Any, path: str) -> list[RemoteFile]:
    system.invalidate_cache()
    found = system.find(path, detail=True)
    base, inner = url.rstrip("/"), path.rstrip("/")
    files = [
        _file(f"{base}/{name.removeprefix(inner).lstrip('/')}", info) for name, info in found.items() if name != inner
    ]
    if not files:
        raise DataError(f"{url}: no files there")
    return sorted(files, key=lambda file: file.url)


def _file(url: str, info: dict[str, Any]) -> RemoteFile:
    if info.get("type") == "directory":
        raise DataError(f"{url}: is a folder")
    version = next((info[key] for key in _VERSIONS if info.get(key) is not None), "")
    if isinstance(version, datetime):  # some file systems have a time as this in one call, as a number in another
        version = version.timestamp()
    size = info.get("size")
    return RemoteFile(url, int(size) if size is not None else -1, str(version))


def _read_store(file: RemoteFile, start: int) -> tuple[int, Iterator[bytes]]:
    def chunks() -> Iterator[bytes]:
        stream = _with_store(file.url, lambda _, system, path: system.open(path, "rb"))
        with stream:
            _with_store(file.url, lambda *_: stream.seek(start))
            while chunk := _with_store(file.url, lambda *_: stream.read(_CHUNK_BYTES)):
                yield chunk

    if _with_store(file.url, _stat_now if start else _stat) != file:
        raise DataError(f"{file.url}: changed while it was downloaded; run again")
    return start, chunks()
