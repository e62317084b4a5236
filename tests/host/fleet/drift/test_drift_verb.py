"""`eyas drift` and the monitor inside a collector, with a real broker and a web server."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.client import CallbackAPIVersion, Client
from sqlalchemy.exc import OperationalError

from eyas_host.fleet.broker.client import BrokerAccess
from eyas_host.fleet.drift import page as pages
from eyas_host.fleet.drift import service
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.errors import DriftError
from eyas_host.fleet.drift.notify import Notifier
from eyas_host.fleet.drift.service import DriftService, line
from eyas_host.fleet.store.database import Store
from tests.support.brokers import Broker, free_port
from tests.support.drift_parts import TUNING, copy_of
from tests.support.fleet_parts import wait_until
from tests.support.inside import eyas

LEARNING = ("--profile-days", "1", "--calibration-days", "1")
ALARM = Alarm(id="1", device="cam-7", site="north", state="confirmed", cause="dirty lens", advice="clean it")


@pytest.fixture
def posts() -> Iterator[tuple[str, queue.Queue[bytes]]]:
    """A web server: its address, and the bodies that were posted to `/ok`; `/moved` redirects."""
    bodies: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200 if self.path == "/ok" else 302)
            if self.path == "/ok":
                bodies.put(body)
            else:
                self.send_header("Location", "/ok")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    server.server_close()


def test_the_verb_prints_who_drifts(tmp_path: Path, raw_fleet: str) -> None:
    url = copy_of(raw_fleet, tmp_path)
    done = eyas(tmp_path, "drift", "--store", url, *LEARNING, "--json")
    rows = [json.loads(text) for text in done.out.splitlines()]
    assert (done.code, len(rows)) == (0, 20)
    assert [row["device"] for row in rows if row["alarm"]] == ["cam-7"]
    done = eyas(tmp_path, "drift", "--store", url, *LEARNING, "--check")
    assert done.code == 1
    assert done.out.splitlines()[-1] == "20 devices: 1 confirmed, 19 stable"
    assert "cam-7: dirty, moved or defocused lens (confirmed" in done.out
    assert "cam-8" not in done.out
    done = eyas(tmp_path, "drift", "cam-8", "--site", "north", "--store", url, *LEARNING)
    assert "cam-8" in done.out and "stable" in done.out
    done = eyas(tmp_path, "drift", "--accept", "cam-7", "--store", url, *LEARNING, "--check")
    assert (done.code, done.out.splitlines()[-1]) == (0, "20 devices: 1 learning, 19 stable")


def test_mistakes_of_a_user_are_one_line(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    done = eyas(tmp_path, "drift", "--store", url)
    assert (done.code, "there is no store" in done.err) == (2, True)
    with Store(url):
        pass
    assert "no devices; they appear when" in eyas(tmp_path, "drift", "--store", url).out
    for address in ("cam", "ftp://host/x", "http://", "https:///path", "http://[1"):
        with pytest.raises(DriftError, match="--webhook"):
            Notifier(webhook=address)
        with pytest.raises(DriftError, match="--page-url"):
            Notifier(page_url=address)


def test_an_unknown_device_or_site_names_those_that_there_are(tmp_path: Path, fleet: str) -> None:
    url = copy_of(fleet, tmp_path)
    for arguments in (["cam-99"], ["--site", "west"], ["--accept", "cam-99"]):
        done = eyas(tmp_path, "drift", *arguments, "--store", url, *LEARNING)
        assert done.code == 2
        assert "there are: " in done.err and "Traceback" not in done.err


def test_the_service_tells_log_broker_and_web_server(
    tmp_path: Path, raw_fleet: str, posts: tuple[str, queue.Queue[bytes]]
) -> None:
    said: list[str] = []
    retained: queue.Queue[tuple[str, bytes]] = queue.Queue()
    broker = Broker(tmp_path).start()
    try:
        shown = "https://eyas.example/drift.html"
        notifier = Notifier(BrokerAccess(broker=f"127.0.0.1:{broker.port}"), f"{posts[0]}/ok", shown)
        page = tmp_path / "www" / "drift.html"
        with DriftService(copy_of(raw_fleet, tmp_path), 0.2, notifier, said.append, TUNING, page):
            body = msgspec.json.decode(posts[1].get(timeout=60), type=Alarm)
            written = page.read_text(encoding="utf-8")
            wait_until(lambda: said, 30, "a line of the log")
        client = Client(CallbackAPIVersion.VERSION2)
        client.on_message = lambda c, u, m: retained.put((m.topic, m.payload))
        client.connect("127.0.0.1", broker.port)
        client.subscribe("eyas/+/+/drift")
        client.loop_start()
        topic, payload = retained.get(timeout=30)
        client.disconnect()
        client.loop_stop()
    finally:
        broker.stop()
    assert (body.device, body.site) == ("cam-7", "north")
    assert topic == "eyas/north/cam-7/drift"
    assert msgspec.json.decode(payload, type=Alarm).device == "cam-7"
    assert body.page == msgspec.json.decode(payload, type=Alarm).page == f"{shown}#alarm-{body.id}"
    assert f'id="alarm-{body.id}"' in written  # the page is there before anybody is sent to it
    assert any("drift of cam-7" in text for text in said)


def test_what_could_not_be_delivered_is_delivered_later(posts: tuple[str, queue.Queue[bytes]]) -> None:
    notifier = Notifier(BrokerAccess(broker=f"127.0.0.1:{free_port()}"), f"{posts[0]}/moved")
    problems = notifier.deliver([ALARM])
    assert len(problems) == 2
    assert "1 alarms wait for the broker" in problems[0] and "wait for http://" in problems[1]
    notifier._webhook = f"{posts[0]}/ok"
    assert len(notifier.deliver()) == 1
    assert msgspec.json.decode(posts[1].get(timeout=5), type=Alarm) == ALARM
    assert posts[1].empty()


def test_the_service_goes_on_when_the_store_comes_back(tmp_path: Path) -> None:
    said: list[str] = []
    url = f"sqlite:///{tmp_path / 'late.db'}"
    with DriftService(url, 0.05, Notifier(), said.append, TUNING) as running:
        wait_until(lambda: said, 20, "a complaint")
        with Store(url):
            pass
        wait_until(lambda: running._problems == [], 20, "a turn")
    assert len(said) == 1 and "there is no store" in said[0]


def test_the_page_is_written_once_an_hour_and_where_it_cannot_be_it_waits(
    tmp_path: Path, fleet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    folder = tmp_path / "www"
    folder.write_text("not a folder")
    with DriftService(copy_of(fleet, tmp_path), 0.05, Notifier(), said.append, TUNING, folder / "drift.html"):
        wait_until(lambda: said, 30, "a complaint")
        folder.unlink()
        wait_until((folder / "drift.html").is_file, 30, "the page")
        first = (folder / "drift.html").stat().st_ino
        wait_until(lambda: len(said) == 1, 5, "one complaint")
        monkeypatch.setattr(service, "_PAGE_S", 0.0)
        assert (folder / "drift.html").stat().st_ino == first
    assert said[0].startswith("drift: the page waits: ") and "drift.html" in said[0]
    assert len(list(folder.iterdir())) == 1
    with DriftService(
        f"sqlite:///{tmp_path / 'copy.db'}", 0.05, Notifier(), said.append, TUNING, folder / "drift.html"
    ):
        wait_until(lambda: (folder / "drift.html").stat().st_ino != first, 30, "the next page")


@pytest.mark.parametrize(
    "error", [OperationalError("SELECT", {}, Exception("locked")), OSError(5, "Input/output error")]
)
def test_alarms_are_delivered_where_the_page_cannot_be_drawn(
    tmp_path: Path,
    raw_fleet: str,
    posts: tuple[str, queue.Queue[bytes]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    """The turn that opened them is stored: no other one reports them."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pages, "write_page", fail)
    said: list[str] = []
    notifier = Notifier(webhook=f"{posts[0]}/ok")
    with DriftService(copy_of(raw_fleet, tmp_path), 0.2, notifier, said.append, TUNING, tmp_path / "drift.html"):
        assert msgspec.json.decode(posts[1].get(timeout=60), type=Alarm).device == "cam-7"
    assert any(text.startswith("drift: the page waits: ") for text in said)


def test_a_collector_that_looks_for_no_drift_draws_and_posts_nothing(tmp_path: Path) -> None:
    done = eyas(tmp_path, "collect", "--drift", "0", "--page", "drift.html", "--webhook", "http://127.0.0.1:9/")
    assert done.code == 2 and done.err.endswith("--webhook, --page: --drift 0 looks for no drift\n")
    assert list(tmp_path.iterdir()) == []


def test_an_alarm_in_a_line() -> None:
    assert line(ALARM) == "drift of cam-7: dirty lens (confirmed, ; this device alone); clean it"
    closed = msgspec.structs.replace(ALARM, state="closed", why_closed="usual for a day")
    assert line(closed) == "drift of cam-7 closed: usual for a day"
