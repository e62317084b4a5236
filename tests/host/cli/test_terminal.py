"""What devices, brokers and files say cannot control the terminal, whatever verb shows it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
from paho.mqtt.client import CallbackAPIVersion, Client

import eyas_host
from eyas_host.fleet.connect.ssh import FleetError
from eyas_host.fleet.deploy import bench, flash
from tests.support.brokers import Broker
from tests.support.inside import eyas

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\r\x7f"
_CLEAN = {"to_json", "escape_json", "clean", "redact"}
_ROOMS = ("cli", "fleet")


def harmless(text: str) -> bool:
    """Whether a terminal only prints the text."""
    return all(line.isprintable() for line in text.split("\n"))


def called(node: ast.AST) -> str:
    """Name of the function that is called; empty for anything else."""
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def test_no_verb_prints_what_is_not_cleaned() -> None:
    """`show` and `say` clean; `print` is left to constants, to JSON and to what was cleaned."""
    root, seen = Path(eyas_host.__file__).parent, 0
    for path in (path for room in _ROOMS for path in (root / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                seen += 1
                calls = {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
                constant = not any(isinstance(part, ast.FormattedValue) for part in ast.walk(node))
                known = constant or calls & _CLEAN or path.name == "app.py"
                assert known, f"{path}:{node.lineno}: use show"
    assert seen > 3, "something was looked at"


def test_what_a_device_says_during_a_flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = SimpleNamespace(
        target="root@cam", status="failed", detail=f"python: {EVIL}", seconds=1.0, sent_bytes=0, dependency_bytes=0,
        warnings=(EVIL,), ok=False,
    )  # fmt: skip
    monkeypatch.setattr(flash, "flash", lambda *arguments, **options: [result])
    done = eyas(tmp_path, "flash", "root@cam", "--bundle", ".")
    assert done.code == 1 and "python: \\x1b[2J" in done.out and harmless(done.out + done.err)

    def fails(*arguments: object, **options: object) -> None:
        raise FleetError(f"no figures: {EVIL}", "root@cam")

    monkeypatch.setattr(bench, "bench", fails)
    done = eyas(tmp_path, "bench", "root@cam")
    assert done.code in (1, 2) and "\\x1b[2J" in done.err and harmless(done.out + done.err)


def test_a_topic_that_a_broker_retains(tmp_path: Path) -> None:
    broker = Broker(tmp_path).start()
    client = Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    client.publish("eyas/\u202e\u200b[2J/cam-7/status", b"x", qos=1, retain=True).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()
    done = eyas(tmp_path, "forget", "cam-7", "--broker", f"127.0.0.1:{broker.port}")
    broker.stop()
    assert "removed" in done.out and harmless(done.out + done.err), done


def test_folders_of_images(tmp_path: Path) -> None:
    for label in (f"a{EVIL}", "b"):
        (tmp_path / "images" / label).mkdir(parents=True)
        (tmp_path / "images" / label / f"x{EVIL}.png").write_bytes(b"no image")
    done = eyas(tmp_path, "new", "images")
    assert done.code != 0 and harmless(done.out + done.err), done
