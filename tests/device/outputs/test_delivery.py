"""Delivery: newest wins, failures are counted and tried again; a real HTTP server, gpiozero's mock pins."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest
from gpiozero import Device
from gpiozero.pins.mock import MockFactory

from eyas_device.config import OutputSection
from eyas_device.outputs.answer import Answer
from eyas_device.outputs.delivery import Delivery, OutputError
from eyas_device.outputs.gpio import Gpio
from eyas_device.outputs.webhook import Webhook

ON = Answer(state="on", label="dent", confidence=0.9, active=True)
OFF = Answer(state="off", label="ok", confidence=0.9)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Recorded:
    """A sink that fails on purpose."""

    max_attempts: int | None = None

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.answers, self.closed = failures, [], False
        self.gate = threading.Event()
        self.gate.set()

    def deliver(self, answer: Answer) -> None:
        self.gate.wait(20)
        if self.failures:
            self.failures -= 1
            raise OutputError("http://user:secret@host: refused")
        self.answers.append(answer)

    def close(self) -> None:
        self.closed = True


def deliver(sink: object, **arguments: object) -> Delivery:
    delivery = Delivery("test", sink, pauses_s=(0.01, 0.02), **arguments)  # type: ignore[arg-type]
    delivery.start()
    return delivery


def test_the_newest_wins_and_put_never_waits() -> None:
    sink = Recorded()
    sink.gate.clear()
    with deliver(sink) as delivery:
        delivery.put(ON)
        until(lambda: delivery._waiting is None)
        for number in range(500):
            delivery.put(msgspec.structs.replace(OFF, since=float(number)))
        sink.gate.set()
        until(lambda: len(sink.answers) == 2)
    assert [answer.since for answer in sink.answers] == [0.0, 499.0]
    assert sink.closed


def test_failures_are_counted_and_tried_again_without_secrets() -> None:
    sink, changes = Recorded(failures=3), []
    with deliver(sink, on_change=lambda: changes.append(delivery.fault)) as delivery:
        delivery.put(ON)
        until(lambda: sink.answers)
        until(lambda: not delivery.fault)
    assert delivery.errors == 3 and sink.answers == [ON]
    assert [bool(fault) for fault in changes] == [True, False], "reported when it begins and when it ends"
    assert "secret" not in changes[0] and "refused" in changes[0]


def test_a_bounded_sink_gives_an_answer_up_and_takes_the_next() -> None:
    sink = Recorded(failures=4)
    sink.max_attempts = 4
    with deliver(sink) as delivery:
        delivery.put(ON)
        until(lambda: delivery.errors == 4)
        time.sleep(0.1)
        assert not sink.answers and delivery.fault
        delivery.put(OFF)
        until(lambda: sink.answers == [OFF])


def test_the_last_answer_is_tried_at_the_end() -> None:
    sink = Recorded()
    delivery = deliver(sink)
    delivery.put(OFF)
    delivery.close()
    assert sink.answers == [OFF] and sink.closed and not delivery.thread.alive


# --- webhook ---------------------------------------------------------------------------------------------------------


class Server:
    """A real HTTP server that records what is posted."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.posts: list[tuple[str, dict[str, str], object]] = []
        self.replies: list[tuple[int, dict[str, str]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.posts.append((self.path, dict(self.headers), body))
                status, headers = owner.replies.pop(0) if owner.replies else (204, {})
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()


def hook(url: str, **fields: object) -> Webhook:
    return Webhook(OutputSection(kind="webhook", url=url, **fields))  # type: ignore[arg-type]


def test_an_answer_is_posted_with_its_secret_header(server: Server, tmp_path: Path) -> None:
    (secret := tmp_path / "header").write_text("Authorization: Bearer abc.def\n")
    secret.chmod(0o600)
    hook(f"http://127.0.0.1:{server.port}/line/7?x=1", header_file=str(secret)).deliver(ON)
    [(path, headers, body)] = server.posts
    assert path == "/line/7?x=1" and headers["Authorization"] == "Bearer abc.def"
    assert headers["Content-Type"] == "application/json" and body == msgspec.to_builtins(ON)
    secret.chmod(0o644)
    with pytest.raises(OSError, match="chmod 600"):
        hook(f"http://127.0.0.1:{server.port}/", header_file=str(secret)).deliver(ON)
    secret.write_text("no header\n")
    secret.chmod(0o600)
    with pytest.raises(OutputError, match="must be a header"):
        hook(f"http://127.0.0.1:{server.port}/", header_file=str(secret)).deliver(ON)
    assert len(server.posts) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308, 404, 500])
def test_redirects_are_not_followed_and_errors_are_errors(status: int, server: Server) -> None:
    other = Server()
    server.replies = [(status, {"Location": f"http://127.0.0.1:{other.port}/stolen"})]
    with pytest.raises(OutputError, match=f"HTTP {status}"):
        hook(f"http://127.0.0.1:{server.port}/").deliver(ON)
    assert not other.posts
    other.http.shutdown()


@pytest.mark.parametrize("how", ["silent", "drip"])
def test_one_time_limit_for_everything(how: str) -> None:
    """Also for a server that sends a byte at a time, which no limit of a single read ends."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve() -> None:
        peer, _ = listener.accept()
        with peer:
            for byte in b"HTTP/1.1 200 OK\r\nX: " + b"y" * 10_000:
                if how == "drip":
                    try:
                        peer.sendall(bytes([byte]))
                    except OSError:
                        return
                if done.wait(0.05):
                    return

    threading.Thread(target=serve, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(OutputError, match=r"no answer within 0\.3 s"):
        hook(f"http://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.3).deliver(ON)
    assert time.monotonic() - started < 10
    done.set()
    listener.close()


def test_https_is_verified(tmp_path: Path) -> None:
    certificate, key = tmp_path / "c.pem", tmp_path / "k.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    subprocess.run([*make, "-keyout", key, "-out", certificate, *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(context)
    url = f"https://localhost:{server.port}/"
    with pytest.raises(OutputError, match="CERTIFICATE_VERIFY_FAILED"):
        hook(url).deliver(ON)
    hook(url, ca=str(certificate)).deliver(ON)
    assert len(server.posts) == 1
    with pytest.raises(OutputError, match="a PEM file"):
        hook(url, ca=str(key)).deliver(ON)
    with pytest.raises(OutputError, match="CERTIFICATE_VERIFY_FAILED"):
        hook(url.replace("localhost", "127.0.0.1"), ca=str(certificate)).deliver(ON)
    server.http.shutdown()


def test_a_server_that_comes_back_gets_the_newest_answer_alone(server: Server) -> None:
    server.replies = [(503, {})] * 2
    with deliver(hook(f"http://127.0.0.1:{server.port}/")) as delivery:
        delivery.put(ON)
        until(lambda: delivery.delivered)
        assert [body["state"] for _, _, body in server.posts] == ["on"] * 3  # type: ignore[index]
        assert delivery.errors == 2 and not delivery.fault


# --- gpio ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pins() -> Iterator[MockFactory]:
    previous, Device.pin_factory = Device.pin_factory, MockFactory()
    yield Device.pin_factory
    Device.pin_factory.reset()
    Device.pin_factory = previous


def gpio(**fields: object) -> Gpio:
    return Gpio(OutputSection(kind="gpio", labels=("dent",), pin=17, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("active_high", [True, False])
@pytest.mark.parametrize("safe", ["off", "on"])
def test_a_pin_follows_the_level(safe: str, active_high: bool, pins: MockFactory) -> None:
    sink, pin = gpio(safe=safe, active_high=active_high), pins.pin(17)
    sink.deliver(Answer(state="safe", active=safe == "on"))
    assert pin.function == "output"
    assert pin.state == ((safe == "on") == active_high)
    sink.deliver(ON)
    assert pin.state == active_high
    sink.deliver(OFF)
    assert pin.state != active_high
    sink.close()
    sink.close()
    assert pin.function == "input", "a resistor on the board decides while nothing runs"


def test_the_safe_level_is_set_at_the_end(pins: MockFactory) -> None:
    states = []
    pin = pins.pin(17)
    delivery = Delivery("gpio 1", gpio(safe="on"))
    delivery.start()
    delivery.put(OFF)
    until(lambda: delivery.delivered == 1)
    states.append(bool(pin.state))
    pin.clear_states()
    delivery.put(Answer(state="offline", active=True))
    delivery.close()
    assert states == [False]
    assert True in [bool(state.state) for state in pin.states], "it was not made safe before it was released"


def test_a_pin_in_use_and_a_board_without_pins(pins: MockFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gpio()
    first.deliver(ON)
    with pytest.raises(OutputError, match="GPIO 17 cannot be opened"):
        gpio().deliver(ON)
    first.close()
    gpio().deliver(ON)
    import sys

    monkeypatch.setitem(sys.modules, "gpiozero", None)
    with pytest.raises(OutputError, match=r"pip install 'eyas-device\[gpio\]'"):
        gpio().deliver(ON)
