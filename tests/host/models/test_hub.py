"""A hub that is mute, captive or broken costs one bounded probe; damaged files are named and passed over."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from huggingface_hub import close_session, constants

from eyas_host.models import factory, hub, pretrained
from eyas_host.models.factory import build
from eyas_host.models.weights import check_whole, read_weights
from eyas_host.support.errors import WeightsError

TEACHER, STUDENT, OTHER = "tf_efficientnet_lite0", "mobilenetv3_small_100", "resnet18"
REPOSITORIES = {TEACHER: f"{TEACHER}.in1k", STUDENT: f"{STUDENT}.lamb_in1k", OTHER: f"{OTHER}.a1_in1k"}


# The probe


@contextlib.contextmanager
def mute() -> Iterator[int]:
    """A listener that accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextlib.contextmanager
def replying(status: int, body: bytes, **headers: str) -> Iterator[int]:
    """An HTTP server with one reply to everything."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextlib.contextmanager
def trickling() -> Iterator[int]:
    """A server that sends a byte of an endless header now and then, so that no single read takes long."""
    stop = threading.Event()

    def feed(server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
            while not stop.wait(0.05):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=feed, args=(server,), daemon=True).start()
        yield server.getsockname()[1]
        stop.set()


def login_page() -> contextlib.AbstractContextManager[int]:
    return replying(200, b"<html>Welcome to our hotel</html>", **{"Content-Type": "text/html", "ETag": '"1"'})


BROKEN: dict[str, tuple[Callable[[], contextlib.AbstractContextManager[int]], str]] = {
    "mute": (mute, "does not answer within 0.5 s"),
    "trickling": (trickling, "does not answer within 0.5 s"),
    "login page": (login_page, "not as a hub"),
    "unavailable": (lambda: replying(503, b""), "answers with error 503"),
    "forbidden": (lambda: replying(403, b""), "answers with error 403"),
}


@pytest.fixture
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.unreachable, "__kwdefaults__", {"seconds": 0.5})


@pytest.mark.parametrize("kind", BROKEN)
def test_a_hub_that_is_none_is_asked_once(
    kind: str, no_hub: None, short_probe: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve, words = BROKEN[kind]
    where = hub.repository(OTHER)
    assert where is not None
    with serve() as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert words in hub.unreachable(where)
    assert constants.HF_HUB_OFFLINE
    assert words in hub.unreachable(where)
    (said,) = capsys.readouterr().err.splitlines()
    assert f"the hub (127.0.0.1) {words}" in said.replace("answers, but ", "") and "off-line from here on" in said


def test_a_mute_hub_leaves_the_other_origins(
    no_hub: None, short_probe: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mute() as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert build(TEACHER, 3, "auto", trained=True)[1] == "packaged"
        assert build(STUDENT, 3, "auto")[1] == "pretrained"
        with pytest.raises(WeightsError, match=rf"127\.0\.0\.1: does not answer .*its cache has no weights of {OTHER}"):
            build(OTHER, 3, "hub")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_mute_proxy_counts_as_no_hub(no_hub: None, short_probe: None, monkeypatch: pytest.MonkeyPatch) -> None:
    where = hub.repository(OTHER)
    assert where is not None
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with mute() as port:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
        close_session()  # the client reads the proxy once
        try:
            assert "does not answer within" in hub.unreachable(where)
        finally:
            close_session()


@pytest.mark.parametrize(
    ("status", "headers"), [(200, {"X-Repo-Commit": "1" * 40, "ETag": '"1"'}), (404, {"X-Error-Code": "EntryNotFound"})]
)
def test_a_hub_is_known_by_its_reply(
    status: int, headers: dict[str, str], no_hub: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file that it is asked for is under another name."""
    with replying(status, b"", **headers) as port:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        where = hub.repository(STUDENT)
        assert where is not None and hub.unreachable(where) == ""
    assert not constants.HF_HUB_OFFLINE


def test_weights_that_are_on_no_hub_are_not_looked_for_elsewhere(no_hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timm knows some by another server's address."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **more: pytest.fail(f"{words} is looked up"))
    with pytest.raises(WeightsError, match="hub: none for legacy_seresnet18"):
        build("legacy_seresnet18", 3, "hub")


# Damaged files


def cache(root: Path, name: str, data: bytes, file: str = "model.safetensors") -> Path:
    """Put a file into the hub's cache, as weights of a network."""
    folder = root / f"models--timm--{REPOSITORIES[name]}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("x")
    (folder / "snapshots/x").mkdir(parents=True)
    path = folder / "snapshots/x" / file
    path.write_bytes(data)
    return path


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


WHOLE = {
    "model.safetensors": safetensors.numpy.save({"conv_stem.weight": np.ones((32, 3, 3, 3), np.float32)}),
    "pytorch_model.bin": torch_bytes({"conv_stem.weight": torch.ones(32, 3, 3, 3)}),
}
RUBBISH = np.random.default_rng(0).bytes(3000)
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "rubbish": lambda data: RUBBISH,
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "another network's": lambda data: data,
    **{f"cut at {place}": lambda data, place=place: data[:place] for place in (1, 8, 100, 2000)},
    "without its last byte": lambda data: data[:-1],
}


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "another network's"])
def test_damaged_files_are_named(damage: str, tmp_path: Path) -> None:
    for file, whole in WHOLE.items():
        path = tmp_path / file
        path.write_bytes(whole)
        check_whole(path)
        path.write_bytes(DAMAGE[damage](whole))
        for read in (check_whole, read_weights):
            with pytest.raises(WeightsError) as caught:
                read(path)
            assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", "without its last byte"),
        ("model.safetensors", "another network's"),
        ("pytorch_model.bin", "empty"),
    ],
)
def test_damaged_files_of_the_hubs_cache_are_passed_over(
    file: str,
    damage: str,
    no_hub: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = cache(tmp_path, STUDENT, DAMAGE[damage](WHOLE[file]), file)
    assert build(STUDENT, 3, "auto")[1] == "pretrained"
    (said,) = capsys.readouterr().err.splitlines()
    assert str(path) in said and "remove it" in said
    with pytest.raises(WeightsError) as caught:
        build(STUDENT, 3, "hub")
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_blob_that_is_not_what_its_name_says(tmp_path: Path) -> None:
    """A page of zeros in the middle: the file can be read, with other weights."""
    data = bytearray(safetensors.numpy.save({"w": np.ones((64, 64), np.float32)}))
    blob = tmp_path / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    check_whole(link)
    data[8000:12096] = bytes(4096)
    blob.write_bytes(data)
    with pytest.raises(WeightsError, match="it is not what was downloaded"):
        check_whole(link)


@pytest.mark.parametrize("damage", ["cut at 2000", "another network's"])
def test_damaged_packaged_weights_are_passed_over(
    damage: str, no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    path = tmp_path / "lite0.pth"
    path.write_bytes(DAMAGE[damage](WHOLE["pytorch_model.bin"]))
    monkeypatch.setattr(factory, "packaged_file", lambda name: path)
    with pytest.raises(WeightsError) as caught:
        build(TEACHER, 3, "packaged", trained=True)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    capsys.readouterr()
    assert build(TEACHER, 3, "auto")[1] == "random"
    assert str(path) in capsys.readouterr().err


def test_damaged_weights_that_ship_with_eyas(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shipped = pretrained.weights_file(STUDENT)
    assert shipped is not None
    path = tmp_path / shipped.name
    path.write_bytes(shipped.read_bytes()[:-1])
    monkeypatch.setattr(pretrained, "_WEIGHTS_FOLDER", tmp_path)
    assert build(STUDENT, 3, "auto")[1] == "random"
    assert str(path) in capsys.readouterr().err
    with pytest.raises(WeightsError, match=str(path)):
        build(STUDENT, 3, "pretrained")


def test_a_zero_page_in_a_torch_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights_file.pth"
    data = bytearray(torch_bytes({"w": torch.ones(64, 64)}))
    path.write_bytes(data)
    check_whole(path)
    data[4000:8096] = bytes(4096)
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=r"weights_file\.pth: .*wrong checksum"):
        check_whole(path)
