"""Motion JPEG over HTTP, against a real server that behaves well or badly; the parser; specifications and the fake."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.camera import Camera, Frame, is_live, net, open_camera
from eyas_device.camera.fake import FakeCamera
from eyas_device.camera.http_auth import authorization, parse_challenges
from eyas_device.camera.multipart import ChunkDecoder, MultipartParser
from eyas_device.errors import CameraError, CameraRefused, CameraSpecError, ImageError
from eyas_device.preprocess import image_size
from eyas_device.support.redact import redact
from tests.support.brokers import free_port
from tests.support.clocks import FakeClock
from tests.support.servers import PLENTY_S, StreamServer
from tests.support.streams import DIALECTS, chunk, jpeg_image, part
from tests.support.system_parts import require


@pytest.fixture(scope="module")
def streams() -> Iterator[StreamServer]:
    """A server that no test kills."""
    server = StreamServer()
    server.start()
    yield server
    server.kill()


@pytest.fixture
def mortal() -> Iterator[StreamServer]:
    """A server of the test's own."""
    server = StreamServer()
    server.start()
    yield server
    server.kill()


def taken(camera: Camera) -> Frame:
    frame = camera.capture()
    assert frame is not None
    return frame


@pytest.mark.parametrize("mode", ["normal", "nolength", "dashes", "chunked", "moved", "flood"])
def test_streams_of_all_dialects(streams: StreamServer, mode: str) -> None:
    known = {jpeg_image(number): number for number in range(48)}
    with open_camera(streams.spec(mode), timeout_s=10) as camera:
        assert camera.live
        frames = [taken(camera) for _ in range(6)]
    assert all(isinstance(frame.image, bytes) and frame.image in known for frame in frames)
    if mode != "flood":
        numbers = [known[bytes(frame.image)] for frame in frames]
        assert numbers == sorted(set(numbers))
    assert image_size(bytes(frames[0].image)) == (64, 48)
    assert frames[5].source == f"{streams.spec(mode)}#5"


@pytest.mark.parametrize("mode", DIALECTS)
def test_each_frame_is_returned_when_it_has_come(streams: StreamServer, mode: str) -> None:
    """The next part comes 0.2 s later, so a reader that waits for it, or for the end of a chunk, is a frame behind."""
    with open_camera(streams.spec(mode), timeout_s=10) as camera:
        frames = [taken(camera) for _ in range(5)]
    assert [bytes(frame.image).rstrip(b"\0") for frame in frames] == [jpeg_image(n) for n in range(5)]
    gaps = [after.captured - before.captured for before, after in itertools.pairwise(frames)]
    assert sum(gaps) < 4 * 0.2 + 1.0, gaps


@given(
    bodies=st.lists(st.binary(min_size=1, max_size=300), max_size=6),
    extensions=st.lists(st.sampled_from([b"", b";x", b' ; a="b;c"', b" "]), min_size=6, max_size=6),
    end=st.sampled_from([b"\r\n", b"\n"]),
    cuts=st.lists(st.integers(1, 40), min_size=1),
)
def test_chunks_are_removed_wherever_the_stream_is_cut(
    bodies: list[bytes], extensions: list[bytes], end: bytes, cuts: list[int]
) -> None:
    stream = b"".join(chunk(body, extension, end) for body, extension in zip(bodies, extensions, strict=False))
    stream += b"0" + end + end
    decoder, decoded, position = ChunkDecoder(), b"", 0
    for size in itertools.cycle(cuts):
        if position >= len(stream):
            break
        decoded += decoder.decode(stream[position : position + size])
        position += size
    assert decoded == b"".join(bodies) and decoder.ended and decoder.decode(b"more") == b""


@pytest.mark.parametrize(
    "data", [b"xyz\r\n", b"-5\r\n", b"5\r\nabcdefgh\r\n", b"0x5\r\n", b"1" * 17 + b"\r\n", b";" * 9999]
)
def test_what_is_no_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="chunk"):
        ChunkDecoder().decode(data)


# RFC 7616, 3.9.1: user Mufasa, password Circle of Life
_RFC = (
    'Digest realm="http-auth@example.org", qop="auth, auth-int", algorithm={}, '
    'nonce="7ypf/xlj9XXwfDPEoM4URrv/xwf94BcCAzFZH4GiTo0v", opaque="FQhe/qaU925kfnzjCev0ciny7QMkPqMAFRtzCUYo5tdS"'
)


@pytest.mark.parametrize(
    ("algorithms", "response"),
    [
        (["MD5"], "8ca523f5e9506fed4657c9700eebdbec"),
        (["SHA-256"], "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
        (["MD5", "SHA-256", "SHA-512-256"], "753927fa0e85d155564e2e272a28d1802ca10daf4496794697cf8db5856cb6c1"),
    ],
)
def test_the_digest_of_the_standard(algorithms: list[str], response: str) -> None:
    login = authorization(
        parse_challenges([_RFC.format(name) for name in algorithms]),
        "Mufasa",
        "Circle of Life",
        method="GET",
        target="/dir/index.html",
        cnonce="f2/wE4q74E6zIJEtWaHKaf5wv/H5QzzpXusqGemxURZJ",
    )
    assert login is not None and f'response="{response}"' in login and 'uri="/dir/index.html"' in login
    assert "qop=auth, nc=00000001" in login and 'opaque="FQhe/qaU925' in login


@pytest.mark.parametrize("mode", ["md5", "sha256", "sess", "old", "stale"])
def test_a_camera_that_asks_for_digest_gets_it(streams: StreamServer, mode: str) -> None:
    spec = streams.spec(f"digest-{mode}?channel=1&sub=2", "guard:pass%2Fword%401@")
    with open_camera(spec, timeout_s=10) as camera:
        assert taken(camera).image
    with pytest.raises(CameraRefused, match=r"refused \(401\).*check user and password"):
        open_camera(streams.spec(f"digest-{mode}", "guard:wrong@"), timeout_s=10)


def test_an_authentication_that_is_not_supported_is_named(streams: StreamServer) -> None:
    with pytest.raises(CameraRefused, match="requires the authentication 'negotiate', which is not supported"):
        open_camera(streams.spec("digest-other", "guard:x@"), timeout_s=10)


def test_a_password_is_only_sent_as_it_is_asked_for(tmp_path: Path) -> None:
    """Not before a challenge, never in the clear where digest is offered, and not to where a redirection points."""
    requests: list[str] = []
    port, other = free_port(), free_port()
    answers = {
        port: ['401 X\r\nWWW-Authenticate: Digest realm="r", nonce="n"\r\nWWW-Authenticate: Basic realm="r"'],
        other: ['401 X\r\nWWW-Authenticate: Basic realm="r"'],
    }
    answers[port].append(f"302 X\r\nLocation: http://127.0.0.1:{other}/stream")

    def serve(listener: socket.socket, replies: list[str]) -> None:
        for reply in replies:
            connected, _ = listener.accept()
            with connected:
                requests.append(connected.recv(65536).decode())
                connected.sendall(f"HTTP/1.1 {reply}\r\nContent-Length: 0\r\n\r\n".encode())

    with contextlib.ExitStack() as stack:
        for number, replies in answers.items():
            listener = stack.enter_context(socket.create_server(("127.0.0.1", number)))
            threading.Thread(target=serve, args=(listener, replies), daemon=True).start()
        with pytest.raises(CameraRefused):
            open_camera(f"mjpeg:http://guard:secret@127.0.0.1:{port}/", timeout_s=10)
    assert ["Authorization:" in request for request in requests] == [False, True, False]
    assert "Authorization: Digest" in requests[1] and "secret" not in "".join(requests)


def test_a_host_that_does_not_respond_is_left_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full backlog drops every SYN, as a host that is off does."""
    monkeypatch.setattr(net, "CONNECT_S", 0.3)
    with socket.socket() as deaf, contextlib.ExitStack() as stack:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        for spec in ("mjpeg:http", "rtsp"):
            started = time.monotonic()
            with pytest.raises(CameraError, match="the host does not respond"):
                open_camera(f"{spec}://127.0.0.1:{deaf.getsockname()[1]}/", timeout_s=60)
            assert time.monotonic() - started < PLENTY_S


def test_a_slow_reader_gets_the_newest_frame(streams: StreamServer) -> None:
    with open_camera(streams.spec("large"), timeout_s=10) as camera:
        first = taken(camera)
        time.sleep(0.6)  # some 30 frames, which the socket holds
        second = taken(camera)
    numbers = {jpeg_image(number): number for number in range(48)}
    first_number, second_number = (numbers[bytes(frame.image).rstrip(b"\0")] for frame in (first, second))
    assert (second_number - first_number) % 48 > 3


def test_a_password_is_sent_and_not_shown(streams: StreamServer) -> None:
    with open_camera(streams.spec("login", "guard:pass%2Fword%401@"), timeout_s=10) as camera:
        assert "pass" not in taken(camera).source
    for login in ("", "guard:wrong@"):
        with pytest.raises(CameraError, match=r"refused \(401\).*USER:PASSWORD") as caught:
            open_camera(streams.spec("login", login), timeout_s=10)
        assert "wrong" not in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "kind", "message"),
    [
        ("single", CameraError, "serves a single image"),
        ("gone", CameraError, "answers 404"),
        ("page", CameraError, "serves 'text/html'"),
        ("lost", CameraError, "redirects more than once"),
        ("away", CameraError, "redirects to 'ftp://"),
        ("unbound", CameraError, "has no boundary"),
    ],
)
def test_anything_but_a_stream_is_reported(
    streams: StreamServer, mode: str, kind: type[CameraError], message: str
) -> None:
    with pytest.raises(CameraError, match=message) as caught:
        open_camera(streams.spec(mode), timeout_s=10)
    assert caught.type is kind


@pytest.mark.parametrize(
    ("mode", "good", "message"),
    [
        ("drip", 1, "no whole frame within 1 s"),
        ("stall", 1, "no whole frame within 1 s"),
        ("silent", 0, "no whole frame within 1 s"),
        ("huge", 0, "a part of 4294967296 bytes is announced; at most"),
        ("closes", 1, "the server closed the connection"),
    ],
)
def test_a_broken_stream_is_reported_in_time(streams: StreamServer, mode: str, good: int, message: str) -> None:
    with open_camera(streams.spec(mode), timeout_s=1) as camera:
        for _ in range(good):
            taken(camera)
        started = time.monotonic()
        with pytest.raises(CameraError, match=message):
            for _ in range(5):  # more than one frame may come before the failure
                camera.capture()
        assert time.monotonic() - started < PLENTY_S


@pytest.mark.parametrize(
    ("mode", "message"), [("garbage", "no boundary within"), ("endless", "no end of a part within")]
)
def test_what_never_ends_is_bounded(streams: StreamServer, mode: str, message: str) -> None:
    with open_camera(streams.spec(mode), timeout_s=60) as camera, pytest.raises(CameraError, match=message):
        camera.capture()


def test_a_part_without_a_jpeg_is_skipped(streams: StreamServer) -> None:
    with open_camera(streams.spec("junk"), timeout_s=10) as camera:
        good = bad = 0
        while not (good and bad):
            try:
                good += taken(camera).image != b""
            except ImageError as error:
                assert "not a JPEG (begins with 6e 6f 74" in str(error)
                bad += 1


def test_a_properly_closed_stream_ends(streams: StreamServer) -> None:
    with open_camera(streams.spec("ends"), timeout_s=10) as camera:
        frames = list(iter(camera.capture, None))
    assert 1 <= len(frames) <= 2 and frames[-1].image == jpeg_image(1)


def test_a_killed_server_and_none_at_all(mortal: StreamServer) -> None:
    with open_camera(mortal.spec("normal"), timeout_s=10) as camera:
        taken(camera)
        mortal.kill()
        with pytest.raises(CameraError, match=r"closed the connection|reset"):
            for _ in range(100):
                camera.capture()
    with pytest.raises(CameraError, match="nothing listens there") as caught:
        open_camera(mortal.spec("normal"), timeout_s=10)
    assert caught.type is CameraError


def test_a_stopped_server_is_reported_in_time(mortal: StreamServer) -> None:
    with open_camera(mortal.spec("normal"), timeout_s=1) as camera:
        taken(camera)
        assert mortal.process is not None
        os.kill(mortal.process.pid, signal.SIGSTOP)
        with pytest.raises(CameraError, match="within 1 s"):
            for _ in range(200):
                camera.capture()
    with pytest.raises(CameraError, match="within 1 s"):  # the kernel still accepts; nobody answers
        open_camera(mortal.spec("normal"), timeout_s=1)


def test_closing_wakes_a_waiting_capture(streams: StreamServer) -> None:
    camera = open_camera(streams.spec("silent"), timeout_s=300)
    captured: list[Frame | None] = []
    waiting = threading.Thread(target=lambda: captured.append(camera.capture()), daemon=True)
    waiting.start()
    time.sleep(0.2)
    camera.close()
    waiting.join(PLENTY_S)
    assert captured == [None]
    camera.close()
    assert camera.capture() is None


def test_nothing_is_left_after_many_reopenings(streams: StreamServer) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    before = held()
    for mode in ("normal", "gone", "single", "unbound", "lost", "closes", "away") * 3:
        try:
            with open_camera(streams.spec(mode), timeout_s=10) as camera:
                camera.capture()
        except CameraError:
            pass
    assert held() == before


def test_tls_with_a_certificate_that_is_trusted_and_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("openssl")
    key, certificate, both = (tmp_path / name for name in ("key.pem", "certificate.pem", "both.pem"))
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=camera -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    server = StreamServer(both)
    server.start()
    try:
        with pytest.raises(CameraError, match=r"certificate is not trusted.*SSL_CERT_FILE") as caught:
            open_camera(server.spec("normal"), timeout_s=10)
        assert caught.type is CameraError
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with open_camera(server.spec("large"), timeout_s=10) as camera:
            assert [bytes(taken(camera).image)[:2] for _ in range(5)] == [b"\xff\xd8"] * 5
        camera = open_camera(server.spec("stall"), timeout_s=300)
        taken(camera)
        closing = threading.Timer(0.3, camera.close)
        closing.start()
        assert list(iter(camera.capture, None)) == []
        closing.join()
    finally:
        server.kill()


# --- The parser


def parts_of(stream: bytes, cuts: list[int], boundary: str = "frame", **bounds: int) -> tuple[list[bytes], bool, str]:
    """The parts of a stream fed in chunks, whether it ended, and its error if any."""
    parser = MultipartParser(boundary, **bounds)
    found: list[bytes] = []
    places = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    try:
        for start, end in zip(places, places[1:] or places, strict=False):
            parser.feed(stream[start:end])
            while (body := parser.next_part()) is not None:
                found.append(body)
    except ValueError as error:
        return found, parser.ended, str(error)
    return found, parser.ended, ""


bodies = st.lists(st.one_of(st.binary(max_size=60), st.sampled_from([b"\r\n--fram", b"\r\n", b"--frame", b"-" * 9])))
cut_places = st.lists(st.integers(0, 10_000), max_size=30)


@given(
    bodies=bodies, cuts=cut_places, length=st.booleans(), end=st.booleans(), newline=st.sampled_from([b"\r\n", b"\n"])
)
def test_any_chunking_gives_the_same_parts(
    bodies: list[bytes], cuts: list[int], length: bool, end: bool, newline: bytes
) -> None:
    if not length:  # then a body must not hold what ends it
        bodies = [body.replace(b"\r", b"r").replace(b"\n", b"n").replace(b"-", b"_") for body in bodies]
    stream = b"preamble\r\n" + b"".join(part(body, length=length) for body in bodies)
    stream += b"--frame--\r\n" if end else b"--frame\r\n"
    if newline == b"\n" and not length:
        stream = stream.replace(b"\r\n", b"\n")
    assert parts_of(stream, cuts) == (bodies, end, "")


snippets = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.sampled_from(
            [
                b"--frame\r\n",
                b"\r\n--frame\r\n",
                b"\r\n\r\n",
                b"\n\n",
                b"Content-Length: 7\r\n",
                b"Content-Length: 99999\r\n",
                b"--frame--\r\n",
                b"content-length:-3\r\n",
                b"-" * 100,
                b"Content-Length: 999999999999999999\r\n",
                b" " * 90,
                b"x" * 300,
            ]
        ),
    ),
    max_size=20,
).map(b"".join)
hostile = st.builds(bytes.__add__, st.sampled_from([b"", b"--frame\r\n", b"--frame\r\n\r\n"]), snippets)


@given(stream=hostile, cuts=cut_places)
@settings(max_examples=300)
def test_hostile_bytes_give_the_same_error_with_any_chunking(stream: bytes, cuts: list[int]) -> None:
    bounds = {"max_part": 100, "max_header": 60}
    whole, pieces = parts_of(stream, [], **bounds), parts_of(stream, cuts, **bounds)
    assert whole == pieces
    assert all(len(body) <= 500 for body in whole[0])


def test_hostile_bytes_take_no_time() -> None:
    """16 MiB that look like the start of a delimiter throughout, in small chunks."""
    for piece in (b"-" * 65536, b"\r\n" * 32768, b"\r\n--frame" * 7000, b" " * 65536):
        parser = MultipartParser("frame")
        parser.feed(b"--frame\r\n\r\n")
        started = time.monotonic()
        with pytest.raises(ValueError, match="within"):
            for _ in range(400):
                parser.feed(piece)
                parser.next_part()
        assert time.monotonic() - started < PLENTY_S


@pytest.mark.parametrize("boundary", ["", "x" * 201, "a\nb", "ä"])
def test_invalid_boundaries_are_rejected(boundary: str) -> None:
    with pytest.raises(ValueError, match="boundary"):
        MultipartParser(boundary)


# --- Specifications


@pytest.mark.parametrize(
    "spec",
    [
        "mjpeg:", "mjpeg:ftp://host/", "mjpeg:http://", "mjpeg:http://host:0/", "mjpeg:http://host:99999/",
        "mjpeg:http://a b/", "mjpeg:http://host/\r\nX: y", "mjpeg:HTTP://host/", "mjpeg://host/", "rtsp:",
        "rtsp://", "rtsp:http://x/", "rtsp://h o/", "rtsp://host:x/", "v4l2:", "v4l2:video0", "v4l2:-1",
        "v4l2:0?size=0x0", "v4l2:0?size=99999x9", "v4l2:0?size=4x4", "v4l2:0?fps=0", "v4l2:0?fps=many",
        "v4l2:0?format=h264", "v4l2:0?zoom=2", "v4l2:0?fps=1&fps=2", "v4l2:0?fps", "gst:", "gst:x",
        "picamera2:?size=1x1", "picamera2:x", "picamera2:?fps=0.0", "fake:?fps=0", "fake:?black=x",
        "fake:?resize=3", "fake:?live=2", "webcam:0", "",
    ],
)  # fmt: skip
def test_a_wrong_specification_lists_what_is_allowed(spec: str) -> None:
    with pytest.raises(CameraSpecError, match=r"allowed|is needed"):
        open_camera(spec)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("/dev/video0", "v4l2:/dev/video0"),
        ("/dev/v4l/by-id/usb-cam", "v4l2:/dev/v4l/by-id/usb-cam"),
        ("2", "v4l2:2"),
        ("http://cam/stream", "mjpeg:http://cam/stream"),
        ("HTTPS://cam/stream", "mjpeg:https://cam/stream"),
        ("RTSP://cam/1", "rtsp://cam/1"),
        ("pictures", "folder:pictures"),
        ("pictures/", "folder:pictures/"),
        ("pictures/a.JPG", "folder:pictures"),
        ("clip.mp4", "video:clip.mp4"),
        ("recording", "video:recording"),
        ("video3", "v4l2:3"),
        ("absent/", "folder:absent/"),
        ("webcam:0", None),
        ("usb:/", None),
        ("ftp://cam/", None),
        ("a\0b", None),
    ],
)
def test_a_specification_without_its_kind_is_answered_with_the_right_spelling(
    spec: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "recording").touch()
    with pytest.raises(CameraSpecError) as caught:
        open_camera(spec)
    assert str(caught.value).endswith(f"unknown kind; write {meant!r}") == (meant is not None)


def test_the_allowed_address_is_shown_whole() -> None:
    with pytest.raises(CameraSpecError, match=re.escape("allowed is rtsp://HOST[:PORT]/PATH, a login before HOST")):
        open_camera("rtsp:cam")


def test_the_suggestion_shows_no_password() -> None:
    with pytest.raises(CameraSpecError, match=r"mjpeg:http://\*\*\*@cam/") as caught:
        open_camera("http://user:secret@cam/")
    assert "secret" not in str(caught.value)


KINDS = st.sampled_from(["mjpeg", "rtsp", "v4l2", "picamera2", "fake", "x"])
BEGINNINGS = st.sampled_from(["", "?", "//", "http://", "0?", "?size="])


@given(kind=KINDS, beginning=BEGINNINGS, text=st.text(max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_specification_opens_or_is_rejected(kind: str, beginning: str, text: str) -> None:
    """Whatever stands there: a camera, or an error of ours. Hosts and devices are left out: nothing is opened here."""
    opens = kind in ("mjpeg", "rtsp", "v4l2", "picamera2")
    spec = f"{kind}:{beginning}{text}" + ("\0" if opens else "")
    try:
        open_camera(spec, timeout_s=0.1).close()
    except CameraError as error:
        assert str(error)


@pytest.mark.parametrize(
    "url",
    ["http://u:p@h/x", "http://u:p@ss@h/x", "http://u:p/q@h/x", "rtsp://u:p?@h/", "http://u:p#@h/", "http://u:\n@h"],
)
def test_no_password_is_shown(url: str) -> None:
    assert redact(url).startswith(url.partition("//")[0] + "//***@h")
    if not url.startswith("rtsp"):
        with pytest.raises(CameraError) as caught:
            open_camera(f"mjpeg:{url}:0", timeout_s=0.1)
        assert "u:" not in str(caught.value)


def test_what_is_live_is_known_before_it_is_opened() -> None:
    assert [is_live(spec) for spec in ("v4l2:0", "rtsp://h/", "fake:?live=1", "fake:?frames=2&live=1")] == [True] * 4
    assert [is_live(spec) for spec in ("folder:x", "video:x", "fake:", "fake:?live=0")] == [False] * 4


# --- The fake


def test_fake_failures() -> None:
    clock = FakeClock()
    rest = "?frames=12&size=64x48&black=2-3&frozen=5-7&resize=9:32x24&hang=11&live=1&fps=10"
    camera = FakeCamera.open(rest, timeout_s=7, clock=clock)
    assert camera.live
    frames = [taken(camera) for _ in range(11)]
    sizes = [image_size(bytes(frame.image)) for frame in frames]
    assert sizes == [(64, 48)] * 9 + [(32, 24)] * 2
    dark = [frame.pixels().max() < 5 for frame in frames]
    assert dark == [number in (2, 3) for number in range(11)]
    same = [one.image == two.image for one, two in itertools.pairwise(frames)]
    assert same == [number in (2, 5, 6) for number in range(10)]
    assert [round(frame.captured - frames[0].captured, 3) for frame in frames] == [n / 10 for n in range(11)]
    before = clock.monotonic()
    with pytest.raises(CameraError, match="no frame within 7 s"):
        camera.capture()
    assert clock.monotonic() - before >= 7


def test_fake_hang_ends_when_closed() -> None:
    camera = open_camera("fake:?hang=0", timeout_s=300)
    captured: list[Frame | None] = []
    waiting = threading.Thread(target=lambda: captured.append(camera.capture()), daemon=True)
    waiting.start()
    camera.close()
    waiting.join(PLENTY_S)
    assert captured == [None]
