"""The spool on a disk that is full, read-only, failing or not there, and what a killed process leaves behind."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from eyas_device.telemetry.messages import Event, Header, Result, Status, Window
from eyas_device.telemetry.spool.rows import Rows
from eyas_device.telemetry.spool.spool import FILE, Held, Spool, SpoolError, SpoolLimits, SpoolState
from tests.device.telemetry.test_spool import Clock, all_of, event, lost, window, windows
from tests.support.small_disk import card, mounted

Identity = tuple[str, int]


def identity(held: Held) -> Identity:
    message = msgspec.json.decode(held.payload, type=Header)
    assert message.sequence == held.sequence
    return message.spool, message.sequence


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with mounted(tmp_path / "small", "size=1m") as disk:
        yield disk


def fill(disk: Path) -> Path:
    """Leave no room at all."""
    path = disk / "other"
    with path.open("wb", buffering=0) as stream:
        for size in (4096, 1):
            try:
                while True:
                    stream.write(b"x" * size)
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return path


_DELIVERS = """
import sys
from pathlib import Path
import msgspec
from eyas_device.telemetry.messages import Header, Window
from eyas_device.telemetry.spool.spool import Spool
spool = Spool(Path(sys.argv[1]), device="d", boot=sys.argv[2])
for line in sys.stdin:
    first, number = map(int, line.split())
    for frames in range(first, first + number):
        spool.append(Window(frames=frames))
        held = spool.pending("window")
        for each in held:
            message = msgspec.json.decode(each.payload, type=Window)
            print(message.spool, message.sequence, message.frames)
        spool.forget([each.sequence for each in held])
    print(spool.state.name, flush=True)
"""


class Store:
    """What a collector stores, the first message of each identity: identity -> number of the message."""

    def __init__(self) -> None:
        self.stored: dict[Identity, int] = {}
        self.next = 0

    def take(self, line: str) -> None:
        spool, sequence, number = line.split()
        self.stored.setdefault((spool, int(sequence)), int(number))


class Device:
    """A device in a process of its own whose messages are all delivered and acknowledged at once."""

    def __init__(self, folder: Path, store: Store, boot: str = "b") -> None:
        command = [sys.executable, "-c", _DELIVERS, str(folder), boot]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._store = store

    def deliver(self, number: int) -> str:
        """Append and deliver so many windows; return the spool's state."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{self._store.next} {number}\n")
        self._store.next += number
        for line in self._process.stdout:
            if " " not in line:
                return line.strip()
            self._store.take(line)
        raise AssertionError("the device died")

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)


def restart_twice(folder: Path, store: Store, boots: str) -> None:
    """Kill it twice more: the restart itself leaves no trouble either. Nothing may be lost."""
    for boot in boots:
        device = Device(folder, store, boot)
        device.deliver(60)
        device.kill()
    assert set(store.stored.values()) == set(range(store.next)), "some were taken for others, and dropped"


@pytest.mark.parametrize("boots", ["aa", "bc"])
def test_nothing_is_taken_for_another_after_a_full_disk_and_a_kill(small: Path, boots: str) -> None:
    """Delivered from memory, acknowledged, killed: the collector would drop what comes under the same identity."""
    store = Store()
    device = Device(small / "spool", store, "a")
    assert device.deliver(5) == "ON_DISK"
    other = fill(small)
    assert device.deliver(50) == "DISK_FAILED"
    device.kill()
    other.unlink()
    restart_twice(small / "spool", store, boots)


@pytest.mark.parametrize("boots", ["aa", "bc"])
def test_nothing_is_taken_for_another_when_the_disk_was_full_from_the_start(small: Path, boots: str) -> None:
    store, other = Store(), fill(small)
    device = Device(small / "spool", store, "a")
    assert device.deliver(50) == "UNUSABLE"
    device.kill()
    other.unlink()
    device = Device(small / "spool", store, "a")
    assert device.deliver(50) == "ON_DISK"
    device.kill()
    other = fill(small)
    device = Device(small / "spool", store, "a")
    device.deliver(50)
    device.kill()
    other.unlink()
    restart_twice(small / "spool", store, boots)


@pytest.mark.parametrize("boots", ["aa", "bc"])
def test_nothing_is_taken_for_another_after_a_disk_turned_read_only(tmp_path: Path, boots: str) -> None:
    """It is as at the last sync when it is mounted again, as after a power cut."""
    store = Store()
    with card(tmp_path / "card") as sd:
        device = Device(sd.folder / "spool", store, "a")
        assert device.deliver(30) == "ON_DISK"
        sd.make_read_only()
        assert device.deliver(50) == "DISK_FAILED"
        device.kill()
        sd.unmount()
        sd.mount()
        restart_twice(sd.folder / "spool", store, boots)


def test_nothing_is_taken_for_another_after_damage_while_it_is_open(small: Path) -> None:
    store = Store()
    device = Device(small / "spool", store)
    device.deliver(50)
    path = small / "spool" / FILE
    path.write_bytes(os.urandom(path.stat().st_size))
    device.deliver(50)
    device.kill()
    restart_twice(small / "spool", store, "ab")


def test_no_identity_is_used_twice_after_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hardest cut: the disk is as the last sync left it, and thousands of messages were delivered since."""
    now, disk = tmp_path / "now", tmp_path / "disk"
    sync = Rows.sync

    def kept(rows: Rows) -> None:
        sync(rows)
        subprocess.run(["rm", "-rf", disk], check=True)
        subprocess.run(["cp", "-r", now, disk], check=True)

    monkeypatch.setattr(Rows, "sync", kept)
    used: set[Identity] = set()
    for boot in ("first", "second", "third"):
        spool = Spool(now, device="d", boot=boot)
        for _ in range(300):
            spool.append(Result())
            (held,) = spool.pending("cmd/result")
            assert identity(held) not in used
            used.add(identity(held))
            spool.forget([held.sequence])
        spool._disk.close()  # type: ignore[union-attr]
        subprocess.run(["rm", "-rf", now], check=True)
        subprocess.run(["cp", "-r", disk, now], check=True)
    assert len(used) == 900


def test_a_full_disk_lets_messages_wait_in_memory(small: Path) -> None:
    clock = Clock()
    with Spool(small / "spool", device="d", clock=clock) as spool:
        first = spool.append(window(1))
        other = fill(small)
        sequences = [spool.append(window(number)) for number in range(40)]
        assert spool.state is SpoolState.DISK_FAILED and "full" in spool.detail
        assert [held.sequence for held in all_of(spool, "window")] == [first, *sequences]
        spool.forget([first, sequences[0], sequences[-1]])
        assert [held.sequence for held in all_of(spool, "window")] == sequences[1:-1]
        spool.remember_result("command", 2e9, b"{}", now=1.8e9)
        other.unlink()
        clock.now += 60
        spool.maintain()
        assert spool.state is SpoolState.ON_DISK
        assert spool._memory is None, "nothing waits in memory any more"
    with Spool(small / "spool", device="d") as spool:
        assert [held.sequence for held in all_of(spool, "window")] == sequences[1:-1]
        assert spool.command_result("command") == b"{}", "not executed again"


def test_a_disk_that_is_full_at_the_start_is_used_when_it_has_room(small: Path) -> None:
    clock, folder = Clock(), small / "spool"
    with Spool(folder, device="d") as spool:
        earlier = spool.append(window(1))
        identities = [identity(held) for held in all_of(spool, "window")]
    other = fill(small)
    with Spool(folder, device="d", clock=clock) as spool:
        assert spool.state is SpoolState.UNUSABLE and spool.state.is_fault
        waiting = [spool.append(window(2)), spool.append(event())]
        assert spool.command_result("x") is None and not spool.take_quota("2026-01-01", 9)
        clock.now += 100.0
        spool.maintain()
        assert spool.state is SpoolState.UNUSABLE
        other.unlink()
        clock.now += 100.0
        spool.maintain()
        assert spool.state is SpoolState.ON_DISK
        newest = spool.append(window(3))
        held = all_of(spool, "window")
        assert {each.sequence for each in held} == {earlier, waiting[0], newest}
        assert {identity(each) for each in held} > set(identities)
        assert {identity(each)[0] for each in held} <= spool.ids, "all of them can be acknowledged"
        assert held[-1].sequence == newest == max(earlier, *waiting, newest), "numbers increase within a process"
        spool.forget(each.sequence for each in held)
        spool.forget([waiting[1]])
        assert not all_of(spool, "window") and not all_of(spool, "event")
        assert spool._memory is None
    with Spool(folder, device="d") as spool:
        assert not all_of(spool, "window")


def test_a_read_only_disk_costs_no_memory_for_what_is_delivered(tmp_path: Path) -> None:
    with card(tmp_path / "card") as sd, Spool(sd.folder / "spool", device="d") as spool:
        before = [spool.append(window(number)) for number in range(60)]
        sd.make_read_only()
        for number in range(500):
            spool.forget([spool.append(window(number % 20))])
            spool.remember_result(str(number), 2e9 + number, b"x" * 60_000, now=1.8e9)
        spool.forget(before[:30])
        assert spool.state is SpoolState.DISK_FAILED
        assert len(spool._forgotten) == 30, "what the disk holds, and nothing else"
        assert spool._memory is not None and spool._memory.used() < 4 << 20
        assert spool.command_result("499") == b"x" * 60_000
        assert spool.command_result("0") == b"", "known, but not kept"
        assert [held.sequence for held in all_of(spool, "window")] == before[30:]


@pytest.mark.parametrize("folder", [None, "unusable"])
def test_without_a_folder_memory_is_bounded_as_on_a_failing_disk(tmp_path: Path, folder: str | None) -> None:
    (tmp_path / "file").write_text("")
    limits = SpoolLimits(max_bytes=64 << 20)
    with Spool(folder and tmp_path / "file" / "spool", device="d", limits=limits) as spool:
        assert spool.state is (SpoolState.IN_MEMORY if folder is None else SpoolState.UNUSABLE)
        for number in range(60):
            spool.append(event(number, image=200_000))
        total = 2500
        for number in range(total):
            spool.append(window(number % 50))
        assert spool.used() <= 4 << 20
        kept = windows(spool)
        gone = lost(spool)
        assert sum(each.frames for each in kept) == total, "windows are merged before they are dropped"
        assert gone["merged"] > 0 and gone["event"] > 20
        spool.maintain()
        spool.sync()


def test_counters_survive_a_damaged_file(tmp_path: Path) -> None:
    """Losses that were not reported yet when the file turns out to be damaged."""
    with Spool(tmp_path, device="d") as spool:
        for number in range(300):
            spool.append(event(number))
        spool.refuse(all_of(spool, "event")[0])
        spool.refuse(all_of(spool, "event")[0])
        _damage(spool, tmp_path / FILE)
        spool.append(window())
        (found,) = windows(spool)
        assert found.lost == {"event": 2, "corrupt": 1}
        assert found.spool == spool.id
        spool.append(window())
        assert windows(spool)[-1].lost == {}


def test_the_losses_that_a_dropped_window_carries_are_reported_by_another(tmp_path: Path) -> None:
    clock = Clock()
    with Spool(tmp_path, device="d", clock=clock, limits=SpoolLimits(max_days=1.0)) as spool:
        spool.append(event())
        spool.refuse(all_of(spool, "event")[0])
        spool.append(window())
        assert windows(spool)[0].lost == {"event": 1}
        clock.now += 2 * 86_400
        spool.maintain()
        assert not windows(spool)
        spool.append(window())
        assert windows(spool)[0].lost == {"event": 1, "window": 1}


def test_what_cannot_be_read_does_not_hide_the_rest_of_a_read_only_disk(tmp_path: Path) -> None:
    with card(tmp_path / "card") as sd, Spool(sd.folder / "spool", device="d") as spool:
        first, second = spool.append(window(1)), spool.append(window(2))
        spool._disk._db.execute("UPDATE messages SET payload = x'ff00' WHERE sequence = ?", (first,))  # type: ignore[union-attr]
        sd.make_read_only()
        for _ in range(2):
            assert [held.sequence for held in spool.pending("window")] == [second]
        assert spool.get(first) is None
        assert lost(spool) == {"corrupt": 1}


def test_damage_and_a_disk_that_takes_no_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with Spool(tmp_path, device="d", clock=clock) as spool:
        for number in range(300):
            spool.append(window(number))
        used = {identity(held) for held in all_of(spool, "window")}
        _damage(spool, tmp_path / FILE)
        with monkeypatch.context() as patch:

            def fails(*args: Any) -> None:
                raise OSError(errno.EROFS, "Read-only file system")

            patch.setattr(Path, "rename", fails)
            waiting = spool.append(window())
            assert spool.state is SpoolState.UNUSABLE
        clock.now += 60.0
        spool.maintain()
        assert spool.state is SpoolState.ON_DISK
        newest = spool.append(window())
        held = {each.sequence: identity(each) for each in all_of(spool, "window")}
        assert {waiting, newest} <= set(held) and waiting < newest
        assert not {held[waiting], held[newest]} & used
        assert {held[waiting][0], held[newest][0]} <= spool.ids


def test_a_spool_that_another_process_takes_meanwhile(small: Path) -> None:
    """Only the start refuses: a running agent goes on in memory."""
    clock, other = Clock(), fill(small)
    with Spool(small / "spool", device="d", clock=clock) as spool:
        other.unlink()
        with Spool(small / "spool", device="d"):
            clock.now += 60.0
            spool.maintain()
            assert spool.state is SpoolState.UNUSABLE and "another process" in spool.detail
            with pytest.raises(SpoolError):
                Spool(small / "spool", device="d")
        clock.now += 60.0
        spool.maintain()
        assert spool.state is SpoolState.ON_DISK


def test_files_of_the_schema_before_are_taken_over(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d") as spool:
        spool.append(window(1))
        first = spool.id
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("UPDATE meta SET value = 1 WHERE key = 'schema'")
        db.execute("DELETE FROM meta WHERE key = 'block'")
        db.execute("UPDATE messages SET sequence = 4711")
    db.close()
    with Spool(tmp_path, device="d") as spool:
        assert spool.id == first
        assert spool.append(window(2)) > 4711
        assert next(held.sequence for held in spool.pending("window")) == 4711


def test_every_message_carries_the_boards_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    answers = itertools.cycle([True, False, None])
    monkeypatch.setattr("eyas_device.telemetry.spool.spool.is_synchronised", lambda: next(answers))
    with Spool(tmp_path, device="d", clock=clock, boot="0123456789abcdef") as spool:
        for uptime, message in enumerate([Status(), Window(), Event(), Result()]):
            clock.now = 100.25 + uptime
            spool.append(message)
        found = [
            json.loads(held.payload)
            for kind in ("status", "window", "event", "cmd/result")
            for held in spool.pending(kind)
        ]
        assert [each["uptime_s"] for each in found] == [100.25, 101.25, 102.25, 103.25]
        assert {each["boot"] for each in found} == {"01234567"}
        assert [each["synchronised"] for each in found] == [True, False, None, True]
    with Spool(None, device="d") as spool:
        spool.append(Window())
        (stamped,) = windows(spool)
        up = float(Path("/proc/uptime").read_text().split()[0])
        assert abs(stamped.uptime_s - up) < 60 and stamped.uptime_s > 0
        assert Path("/proc/sys/kernel/random/boot_id").read_text().startswith(stamped.boot)


def _damage(spool: Spool, path: Path) -> None:
    """Overwrite all pages but the first one while the file is open."""
    assert spool._disk is not None
    spool._disk.checkpoint()
    size = path.stat().st_size
    with path.open("r+b") as stream:
        stream.seek(4096)
        stream.write(os.urandom(size - 4096))
    spool._disk._db.execute("PRAGMA shrink_memory")
