"""Images at addresses: a real web server that fails in every way, and an object store; no credential anywhere."""

from __future__ import annotations

import base64
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from eyas_host.data import remote
from eyas_host.data.dataset import ImageDataset
from eyas_host.data.index import Index, build_index
from eyas_host.data.manifest import save_split
from eyas_host.data.remote import find_remote, local_copy, stat_remote
from eyas_host.data.sources import fingerprint, source_folders
from eyas_host.data.split import split_index
from eyas_host.recipe.data import DataSection
from eyas_host.recipe.load import load_recipe
from eyas_host.support.errors import DataError, MissingExtra, RecipeError
from tests.support.image_server import ImageServer, serving_images
from tests.support.inside import eyas


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr(remote, "_WAITS_S", (0.01, 0.01))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return cv2.imencode(".png", pixels)[1].tobytes()


def entries(first: int, count: int = 8) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for number in range(first, first + count):
        found |= {f"{number:03d}.png": image(number), f"{number:03d}.cls": b"odd" if number % 2 else b"even"}
    return found


def write_shard(path: Path, first: int) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in entries(first).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ImageServer]:
    root = tmp_path / "web"
    root.mkdir()
    for number in range(3):
        write_shard(root / f"train-{number}.tar", 8 * number)
    with serving_images(root) as running:
        yield running


def shards(server: ImageServer, name: str = "train-{0..2}.tar") -> DataSection:
    return DataSection(source="tar", path=f"{server.url}/{name}")


def manifest(index: Index, data: DataSection, root: Path) -> bytes:
    save_split(split_index(index, data, 1), root, index)
    return (root / "split/manifest.json").read_bytes()


def complaint(data: DataSection) -> str:
    with pytest.raises(DataError) as caught:
        build_index(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_split_is_that_of_the_same_shards_here(server: ImageServer, tmp_path: Path) -> None:
    near, far = DataSection(source="tar", path=str(server.root)), shards(server)
    index = build_index(far)
    assert manifest(index, far, tmp_path / "far") == manifest(build_index(near), near, tmp_path / "near")
    assert len(index.images) == 24 and all(one.path.startswith(f"{server.url}/train-") for one in index.images)
    before = len(server.requests)
    dataset = ImageDataset(index.images, index.labels)
    assert [dataset.pixels[number].shape for number in range(24)] == [(12, 12, 3)] * 24
    assert len(server.requests) == before, "every image is read from the copy"
    assert source_folders(far) == ()
    remote.local_copy(f"{server.url}/train-1.tar").unlink()
    assert ImageDataset(index.images, index.labels).pixels[12].shape == (12, 12, 3), "a lost copy is made again"


def test_a_shard_is_downloaded_once_and_again_when_it_changes(server: ImageServer) -> None:
    data = shards(server)
    build_index(data)
    loaded = [request for request in server.requests if request[0] == "GET"]
    before = fingerprint(data)
    assert len(build_index(data).images) == 24
    assert [request for request in server.requests if request[0] == "GET"] == loaded and len(loaded) == 3
    write_shard(server.root / "train-2.tar", 50)
    assert fingerprint(data) != before
    assert {one.path.split("::")[1].split(".")[0] for one in build_index(data).images} >= {"050", "057"}
    assert sum(request[0] == "GET" for request in server.requests) == 4


@pytest.mark.parametrize("head", [True, False])
def test_a_cut_connection_goes_on_where_it_was(server: ImageServer, head: bool) -> None:
    server.head = head
    url = f"{server.url}/train-0.tar"
    whole = (server.root / "train-0.tar").read_bytes()
    if not head:
        server.cuts = [1]  # the answer to one byte
    server.cuts += [1000, 0, 5000]
    assert local_copy(url).read_bytes() == whole
    starts = [start for method, _, start in server.requests if method == "GET"]
    assert starts[-4:] == [0, 1000, 1000, 6000]
    assert not list(local_copy(url).parent.glob("*.part*"))


def test_what_has_arrived_is_kept_for_the_next_run(server: ImageServer) -> None:
    url = f"{server.url}/train-0.tar"
    server.cuts = [3000, *[0] * 20]
    with pytest.raises(DataError, match=r"ended after 3,000 of 20,480 bytes.*run again"):
        local_copy(url)
    server.cuts.clear()
    server.requests.clear()
    assert local_copy(url).read_bytes() == (server.root / "train-0.tar").read_bytes()
    assert ("GET", "/train-0.tar", 3000) in server.requests


def test_what_has_arrived_of_another_version_is_not_used(server: ImageServer) -> None:
    url = f"{server.url}/train-0.tar"
    server.cuts = [3000, *[0] * 20]
    with pytest.raises(DataError, match="run again"):
        local_copy(url)
    server.cuts.clear()
    write_shard(server.root / "train-0.tar", 70)
    assert local_copy(url).read_bytes() == (server.root / "train-0.tar").read_bytes()


@pytest.mark.parametrize("setting", ["ranges", "versions", "lengths"])
def test_a_plain_server(server: ImageServer, setting: str) -> None:
    setattr(server, setting, False)
    if setting != "lengths":  # without them nobody can know, but the archive has its own end
        server.cuts = [1000]
    assert len(build_index(shards(server)).images) == 24


def test_a_truncated_shard_of_a_server_without_lengths(server: ImageServer) -> None:
    server.lengths = False
    server.cuts = [1500]
    assert "train-0.tar" in complaint(shards(server, "train-0.tar"))


def test_a_file_that_changes_while_it_is_downloaded(server: ImageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{server.url}/train-0.tar"
    found = stat_remote(url)
    write_shard(server.root / "train-0.tar", 70)
    with pytest.raises(DataError, match="changed while it was downloaded"):
        remote.fetch(found)
    assert local_copy(url).is_file()


@pytest.mark.parametrize(
    ("statuses", "words"),
    [
        ([404], "no such file (status 404)"),
        ([401], "access denied (status 401); put the login into ~/.netrc"),
        ([418], "the server refuses it (status 418)"),
        ([503] * 3, "the server is busy or failed (status 503)"),
    ],
)
def test_a_server_that_refuses(server: ImageServer, statuses: list[int], words: str) -> None:
    server.statuses = statuses * 3
    assert words in complaint(shards(server, "train-0.tar"))


def test_a_busy_server_is_asked_again(server: ImageServer) -> None:
    found = stat_remote(f"{server.url}/train-0.tar")
    server.statuses = [503, 429]
    assert remote.fetch(found).is_file()


def test_without_the_server_the_copies_are_used(server: ImageServer, capsys: pytest.CaptureFixture[str]) -> None:
    data = shards(server)
    build_index(data)
    before = fingerprint(data)
    server.shutdown()
    server.server_close()
    assert fingerprint(data) == before and len(build_index(data).images) == 24
    assert "the copy on this machine is used" in " ".join(capsys.readouterr().err.split())
    assert "cannot be reached" in complaint(shards(server, "train-9.tar"))


def test_a_login_is_in_netrc_and_nowhere_else(server: ImageServer, tmp_path: Path) -> None:
    server.login = "Basic " + base64.b64encode(b"me:hunter2secret").decode()
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine 127.0.0.1 login me password hunter2secret\n")
    (home / ".netrc").chmod(0o600)
    (tmp_path / "recipe.toml").write_text(
        f'[run]\nname = "toy"\n[data]\nsource = "tar"\npath = "{server.url}/train-{{0..2}}.tar"\n'
    )
    done = eyas(tmp_path, "split", "recipe.toml")
    assert done.code == 0, done.err
    written = [path for path in (*(tmp_path / "runs").rglob("*"), *(tmp_path / "cache").rglob("*")) if path.is_file()]
    assert len(written) > 10
    for text in (done.out.encode(), done.err.encode(), *(path.read_bytes() for path in written)):
        assert b"hunter2secret" not in text and server.login.encode() not in text
    server.login = "another"
    done = eyas(tmp_path, "split", "recipe.toml", "--set", f"data.path={server.url}/train-7.tar")
    assert done.code == 2 and "access denied" in done.err and "hunter2secret" not in done.err


def test_a_login_does_not_follow_a_redirect(server: ImageServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("machine 127.0.0.1 login me password hunter2secret\n")
    (home / ".netrc").chmod(0o600)
    with serving_images(server.root) as other:
        server.redirect = other.url.replace("127.0.0.1", "localhost")
        other.login = "Basic " + base64.b64encode(b"me:hunter2secret").decode()
        assert "access denied" in complaint(shards(server, "train-0.tar"))


@pytest.mark.parametrize(
    ("path", "source", "words"),
    [
        ("https://me:hunter2@host/a.tar", "tar", "holds a user or password"),
        ("s3://KEY:hunter2@bucket/a.tar", "tar", "holds a user or password"),
        ("https://host/a.tar?X-Amz-Signature=hunter2", "tar", "holds a query"),
        ("simplecache::s3://bucket/a.tar", "tar", "simplecache"),
        ("s3://bucket/a.zip::b.tar", "tar", "a chain of file systems"),
        ("ftp://hunter2@host/a.tar", "tar", "ftp:// is not known"),
        ("file:///etc/a.tar", "tar", "file:// is not known"),
        ("https:///a.tar", "tar", "is not complete"),
        ("s3://bucket/../a.tar", "tar", "is not complete"),
        ("https://host/table.csv", "csv", "a table on this machine"),
        ("https://host/images/", "folder", "does not list its files"),
    ],
)
def test_addresses_that_are_refused(tmp_path: Path, path: str, source: str, words: str) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\nname = "toy"\n[data]\nsource = "{source}"\npath = "{path}"\n')
    if "simplecache" in words:  # no address at all: a file of that name
        assert "simplecache::s3:/bucket" in load_recipe(recipe).data.path
        return
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert words in str(caught.value) and "hunter2" not in str(caught.value)


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """Fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_class_folders_and_shards_of_an_object_store(
    store: fsspec.AbstractFileSystem, server: ImageServer, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    for number in range(24):
        label = "odd" if number % 2 else "even"
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:03d}.png").write_bytes(image(number))
        store.pipe(f"/bucket/images/{label}/{number:03d}.png", image(number))
    store.pipe("/bucket/images/readme.txt", b"hello")
    store.pipe("/bucket/images/odd/._001.png", b"x")
    for path in sorted(server.root.iterdir()):
        store.pipe(f"/bucket/shards/{path.name}", path.read_bytes())
    near = DataSection(path=str(folder))
    wanted = manifest(build_index(near), near, tmp_path / "near")
    for name, data in {
        "folder": DataSection(path="memory://bucket/images"),
        "shards": DataSection(source="tar", path="memory://bucket/shards/"),
        "pattern": DataSection(source="tar", path="memory://bucket/shards/train-{0..2}.tar"),
    }.items():
        index = build_index(data)
        assert manifest(index, data, tmp_path / name) == wanted, name
        assert index.images[0].path.startswith("memory://bucket/")
    assert dict(build_index(DataSection(path="memory://bucket/images")).left_out) == {".txt": 1, "hidden": 1}
    before = fingerprint(DataSection(path="memory://bucket/images"))
    store.pipe("/bucket/images/odd/001.png", image(99))
    assert fingerprint(DataSection(path="memory://bucket/images")) != before
    assert len(build_index(DataSection(path="memory://bucket/images")).images) == 24


def test_mistakes_with_an_object_store(store: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    store.pipe("/bucket/a.tar", b"no archive")
    store.pipe("/bucket/flat/1.png", image(1))
    assert "no such file" in complaint(DataSection(source="tar", path="memory://bucket/b.tar"))
    assert "not a whole tar archive" in complaint(DataSection(source="tar", path="memory://bucket/a.tar"))
    assert "no files there" in complaint(DataSection(path="memory://nothing"))
    assert "no images in class folders" in complaint(DataSection(path="memory://bucket/flat"))
    assert "no .tar files there" in complaint(DataSection(source="tar", path="memory://bucket/flat"))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError("aws_secret_access_key=hunter2 was not accepted")

    def strange(*_: object, **__: object) -> None:
        raise RuntimeError("no login: https://me:hunter2@host/")

    for failing, words in ((denied, "access denied"), (strange, "RuntimeError")):
        monkeypatch.setattr(type(store), "find", failing)
        message = complaint(DataSection(path="memory://bucket"))
        assert words in message and "hunter2" not in message


def test_a_store_without_its_package() -> None:
    if any(name == "s3fs" for name in __import__("sys").modules):
        pytest.skip("s3fs is installed")
    with pytest.raises(MissingExtra, match=r"s3fs.*eyas\[s3\]"):
        find_remote("s3://bucket/images")
