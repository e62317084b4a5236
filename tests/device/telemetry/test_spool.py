"""The spool: what survives a kill, a full and a failing disk, a damaged file; what is evicted and counted."""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.messages import (
    GROWTH,
    KINDS,
    Event,
    Header,
    Profile,
    Result,
    Status,
    Window,
    decode,
    encode,
)
from eyas_device.telemetry.spool.eviction import GUARD
from eyas_device.telemetry.spool.rows import Rows, _is_kind
from eyas_device.telemetry.spool.spool import BLOCK, FILE, Held, Spool, SpoolError, SpoolLimits, SpoolState
from tests.support.system_parts import require


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def window(number: int = 0, **fields: Any) -> Window:
    """About 1.5 KB, hard to compress."""
    rng = random.Random(number)
    bins = {100 + n: rng.randrange(1, 999) for n in range(18)}
    tenths = {f"label-{n}": tuple(rng.randrange(999) for _ in range(10)) for n in range(10)}
    return Window(
        **{
            "model": "m 1",
            "seconds": 30.0,
            "frames": 1,
            "confidence": tenths,
            "latency_bins": bins,
            "latency_ms": LogHistogram(GROWTH, bins=bins, max_ms=50.0).summary(),
            **fields,
        }
    )


def event(number: int = 0, image: int = 2000) -> Event:
    return Event(label=str(number), image=os.urandom(image // 2).hex())


def all_of(spool: Spool, kind: str) -> list[Held]:
    found: list[Held] = []
    while more := spool.pending(kind, after=found[-1].sequence if found else -1):
        found += more
    return found


def windows(spool: Spool) -> list[Window]:
    return [decode(held.payload, Window) for held in all_of(spool, "window")]


def lost(spool: Spool) -> dict[str, int]:
    """All reported losses: in the windows, and in the next one."""
    spool.append(window())
    total: dict[str, int] = {}
    for each in windows(spool):
        for what, number in each.lost.items():
            total[what] = total.get(what, 0) + number
    return total


def test_messages_come_back_in_order_with_their_identity(tmp_path: Path) -> None:
    before = time.time()
    with Spool(tmp_path, device="d") as spool:
        sequences = [spool.append(m) for m in (window(1), event(), Profile(), Result(id="x"), window(2))]
        first = sequences[0]
        assert sequences == [first + n for n in range(5)]
        assert [held.sequence for held in spool.pending("window")] == [first, first + 4]
        assert [held.sequence for held in spool.pending("window", after=first)] == [first + 4]
        message = decode(spool.pending("cmd/result")[0].payload, Result)
        assert (message.device, message.spool, message.sequence, message.id) == ("d", spool.id, first + 3, "x")
        assert before <= message.time <= time.time()
        assert str(uuid.UUID(spool.id)) == spool.id
        spool.forget([first, first + 1])
        assert spool.get(first) is None
        held = spool.get(first + 4)
        assert held is not None and decode(held.payload, Window).confidence == window(2).confidence
    with Spool(tmp_path, device="d") as again:
        assert again.id == spool.id
        assert [held.sequence for held in again.pending("window")] == [first + 4]
        assert again.append(window()) > first + 4
    assert (tmp_path / FILE).stat().st_mode & 0o077 == 0


def test_only_the_newest_status_is_kept(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d") as spool:
        *_, newest = (spool.append(Status(state="online")) for _ in range(3))
        assert [held.sequence for held in spool.pending("status")] == [newest]


def test_sequences_go_on_when_all_messages_have_arrived(tmp_path: Path) -> None:
    used: list[int] = []
    for _ in range(3):
        with Spool(tmp_path, device="d", boot="b") as spool:
            sequences = [spool.append(window()), spool.append(window())]
            assert sequences[1] == sequences[0] + 1
            assert min(sequences) > max(used, default=-1)
            spool.forget(sequences)
            used += sequences


_KILLED = """
import sys, time
from pathlib import Path
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.messages import Window
spool = Spool(Path(sys.argv[1]), device="d")
print(spool.id, flush=True)
number = 0
while True:
    print(spool.append(Window(frames=number)), flush=True)
    number += 1
    spool.maintain()
    time.sleep(0.001)
"""


def test_a_killed_process_loses_nothing_that_was_appended(tmp_path: Path) -> None:
    appended: list[int] = []
    names = set()
    for _ in range(3):
        command = [sys.executable, "-c", _KILLED, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        names.add(process.stdout.readline().strip())
        reader = threading.Timer(0.5, process.send_signal, [signal.SIGKILL])
        reader.start()
        appended += [int(line) for line in process.stdout.read().split("\n")[:-1]]
        process.wait(10)
    assert len(names) == 1
    gaps = [(before, after) for before, after in itertools.pairwise(appended) if after != before + 1]
    assert [after // BLOCK - before // BLOCK for before, after in gaps] == [1, 1], "one block for each start"
    with Spool(tmp_path, device="d") as spool:
        there = {held.sequence for held in all_of(spool, "window")}
    assert len(appended) > 30
    assert set(appended) <= there


def test_no_sequence_is_used_twice_after_a_power_cut(tmp_path: Path) -> None:
    """The disk keeps what was synced; what came later was sent, but is forgotten with its number."""
    spool = Spool(tmp_path / "now", device="d", boot="first")
    spool.append(window())
    spool.sync()
    shutil.copytree(tmp_path / "now", tmp_path / "disk")
    used = [spool.append(window()) for _ in range(50)]
    spool.close()
    with Spool(tmp_path / "disk", device="d", boot="second") as after:
        assert after.id == spool.id
        assert after.append(window()) > max(used)
        assert next(held.sequence for held in after.pending("window")) < min(used)


@pytest.mark.parametrize("damage", ["noise", "header", "pages", "schema"])
def test_a_damaged_file_is_moved_aside(tmp_path: Path, damage: str) -> None:
    with Spool(tmp_path, device="d", boot="first") as spool:
        for number in range(60):
            spool.append(window(number))
        first = spool.id
    path = tmp_path / FILE
    if damage == "noise":
        path.write_bytes(os.urandom(5000))
    elif damage == "header":
        path.write_bytes(b"x" * 100 + path.read_bytes()[100:])
    elif damage == "pages":
        data = path.read_bytes()
        path.write_bytes(data[:4096] + os.urandom(len(data) - 4096))
    else:
        with sqlite3.connect(path) as db:
            db.execute("UPDATE meta SET value = 99 WHERE key = 'schema'")
        db.close()
    with Spool(tmp_path, device="d", boot="second") as spool:
        assert spool.append(window()) >= 0
        spool.append(window())
        assert spool.id != first
        assert [decode(h.payload, Window).spool for h in spool.pending("window")] == [spool.id] * 2
        assert spool.state is SpoolState.ON_DISK
        assert lost(spool) == {"corrupt": 1}
    assert len(list(tmp_path.glob(f"{FILE}.corrupt-*"))) == 1


def test_damage_while_it_is_open(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d") as spool:
        for number in range(300):
            spool.append(window(number))
        first = spool.id
        spool._disk.checkpoint()
        data = (tmp_path / FILE).read_bytes()
        with (tmp_path / FILE).open("r+b") as stream:
            stream.seek(4096)
            stream.write(os.urandom(len(data) - 4096))
        spool._disk._db.execute("PRAGMA shrink_memory")
        for _ in range(3):
            spool.pending("window", limit=100)
        sequence = spool.append(window())
        assert spool.id != first
        assert [held.sequence for held in spool.pending("window")] == [sequence]


def test_two_agents_do_not_share_a_spool(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d"), pytest.raises(SpoolError, match="another process"):
        Spool(tmp_path, device="d")


def test_a_closed_spool_ignores_calls(tmp_path: Path) -> None:
    spool = Spool(tmp_path, device="d")
    spool.close()
    spool.close()
    assert spool.append(window()) == -1
    assert spool.pending("window") == []
    assert spool.get(0) is None
    assert spool.command_result("x") is None
    spool.forget([1])
    spool.remember_result("x", 1.0, b"", now=0.0)
    spool.maintain()
    assert not list(tmp_path.glob("*.corrupt*"))


def test_seven_days_at_a_window_every_thirty_seconds_fit_without_merging(tmp_path: Path) -> None:
    cpu = time.process_time()
    with Spool(tmp_path, device="d") as spool:
        created = [window(number) for number in range(200)]
        for number in range(20_160):
            spool.append(created[number % 200])
        held = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert held < 64 << 20
        assert len(all_of(spool, "window")) == 20_160
        assert all(each.merged == 1 and not each.lost for each in windows(spool)[:500])
    assert (time.process_time() - cpu) / 20_160 < 0.005


def test_windows_are_merged_before_anything_is_dropped(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d", limits=SpoolLimits(max_bytes=1 << 20)) as spool:
        total = 4000
        for number in range(total):
            spool.append(window(number % 50))
            assert spool.used() <= 1 << 20
        kept = windows(spool)
        assert sum(each.merged for each in kept) == total
        assert sum(each.frames for each in kept) == total
        assert [each.merged for each in kept[:GUARD]] == [1] * GUARD, "they may have been sent"
        assert kept[GUARD + 1].merged > kept[-1].merged, "the farther back, the coarser"
        assert len({each.sequence for each in kept}) == len(kept)
        assert sum(each.lost.get("merged", 0) for each in kept) + spool._losses.counts.get("merged", 0) == total - len(
            kept
        )
        assert set().union(*(each.lost for each in kept)) == {"merged"}
    held = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert held <= 1 << 20


@pytest.mark.parametrize("seed", range(4))
def test_the_size_is_measured_before_it_can_be_above_the_bound(seed: int, tmp_path: Path) -> None:
    """Writes of every kind and size, deletions between them: `uses_more_than` answers as the file's own pages do."""
    rng = random.Random(seed)
    sequence, day = 0, 0
    with Rows(tmp_path / "x.db") as rows:
        for _ in range(1500):
            choice = rng.random()
            with rows.transaction:
                if choice < 0.7:
                    sequence += rng.choice((1, 1, 1, BLOCK))
                    kind = rng.choice(("window", "window", "event", "profile", "status", "cmd/result"))
                    payload = rng.randbytes(int(10 ** rng.uniform(1.0, 4.6)))
                    rows.put(Held(sequence, kind, 1, b"{" + payload, 0.0))
                elif choice < 0.8:
                    rows.delete(range(sequence - 5, sequence))
                elif choice < 0.9:
                    rows.remember_result(str(uuid.uuid4()), rng.random(), rng.randbytes(rng.randrange(9000)), now=0.0)
                else:
                    day += 1
                    rows.set_quota(f"{day:09d}", 1, days=8)
                    rows.set_meta("lost", "x" * rng.randrange(3000))
            for size in (rows.used() - 4096, rows.used(), rows.used() + rng.randrange(1 << 20)):
                assert rows.uses_more_than(size) == (rows.used() > size)


def test_windows_of_different_models_stay_apart(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d", limits=SpoolLimits(max_bytes=1 << 20)) as spool:
        for number in range(3000):
            spool.append(window(number % 50, model=f"m {number // 1000}"))
        kept = windows(spool)
        for model in range(3):
            assert sum(each.frames for each in kept if each.model == f"m {model}") == 1000


def test_then_images_then_events_are_evicted(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d", limits=SpoolLimits(max_bytes=4 << 20)) as spool:
        for number in range(600):
            spool.append(event(number, image=20_000))
        events = [decode(held.payload, Event) for held in all_of(spool, "event")]
        assert len(events) == 600, "without their images all of them fit"
        bare = [not each.image for each in events]
        assert not any(bare[:GUARD]) and not any(bare[-20:]) and all(bare[GUARD : GUARD + 100])
        assert events[GUARD].image_policy["image"] == "removed: the spool was full"
        for number in range(7000):
            spool.append(event(number, image=0))
            spool.append(Profile(versions={"a": "b" * 200}))
        assert spool.used() <= 4 << 20
        held = len(all_of(spool, "profile"))
        gone = lost(spool)  # of what was evicted before: its own window may evict more, which the next one would report
        assert gone["images"] > 100
        assert gone["event"] > 100
        assert held + gone.get("profile", 0) == 7000


def test_messages_expire_by_a_clock_that_never_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    with Spool(tmp_path, device="d", limits=SpoolLimits(max_days=1.0), clock=clock, boot="a") as spool:
        monkeypatch.setattr("time.time", lambda: 0.0)  # 1970
        spool.append(window())
        clock.now += 60_000
        monkeypatch.setattr("time.time", lambda: 4e9)
        spool.append(window())
        spool.maintain()
        assert len(spool.pending("window")) == 2
    clock.now = 5.0  # the machine was restarted
    with Spool(tmp_path, device="d", limits=SpoolLimits(max_days=1.0), clock=clock, boot="b") as spool:
        clock.now += 30_000
        spool.maintain()
        assert len(spool.pending("window")) == 1
        assert lost(spool) == {"window": 1}


def test_results_are_remembered_until_their_command_expires(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d") as spool:
        spool.remember_result("a", 100.0, b"first", now=0.0)
        assert spool.command_result("a") == b"first"
    with Spool(tmp_path, device="d") as spool:
        assert spool.command_result("a") == b"first"
        spool.remember_result("b", 300.0, b"second", now=200.0)
        assert spool.command_result("a") is None
        for number in range(1100):
            spool.remember_result(str(number), 1000.0 + number, b"", now=200.0)
        assert spool.command_result("b") is None and spool.command_result("1099") == b""


def test_the_quota_is_kept_across_restarts_and_jumps_of_the_clock(tmp_path: Path) -> None:
    for _ in range(2):
        with Spool(tmp_path, device="d") as spool:
            assert spool.take_quota("2026-05-01", 4) and spool.take_quota("1970-01-01", 4)
            assert spool.take_quota("2026-05-01", 4)
    with Spool(tmp_path, device="d") as spool:
        assert not spool.take_quota("2026-05-01", 4)
        assert spool.take_quota("2026-05-02", 4)


def test_random_files_never_stop_it(tmp_path: Path) -> None:
    rng = random.Random(3)
    with Spool(tmp_path / "good", device="d") as spool:
        for number in range(40):
            spool.append(window(number))
    good = (tmp_path / "good" / FILE).read_bytes()
    for number in range(30):
        folder = tmp_path / str(number)
        folder.mkdir()
        data = bytearray(good)
        for _ in range(rng.randrange(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (folder / FILE).write_bytes(data[: rng.randrange(len(data))] if number % 3 == 0 else data)
        if number % 5 == 0:
            (folder / f"{FILE}-wal").write_bytes(rng.randbytes(3000))
        with Spool(folder, device="d", boot="other") as spool:
            spool.append(window())
            spool.maintain()
            all_of(spool, "window")
            all_of(spool, "event")
            spool.command_result("x")
            assert spool.append(window()) in [held.sequence for held in all_of(spool, "window")]


_SYNCS = """
import sys, time
from pathlib import Path
from eyas_device.telemetry.spool.spool import Spool
from eyas_device.support.histogram import LogHistogram
from eyas_device.telemetry.messages import Window
now = [0.0]
spool = Spool(Path(sys.argv[1]), device="d", clock=lambda: now[0])
print("begin", flush=True)
for second in range(600):
    if second % 10 == 0:
        spool.forget([spool.append(Window(frames=second)) - 1])
    spool.maintain()
    now[0] += 1.0
print("end", flush=True)
"""


def test_ten_minutes_of_windows_take_sixty_syncs_at_most(tmp_path: Path) -> None:
    require("strace")
    log = tmp_path / "strace"
    trace = ["strace", "-f", "-o", str(log), "-e", "trace=fsync,fdatasync,sync_file_range,write"]
    command = [*trace, sys.executable, "-c", _SYNCS, str(tmp_path / "spool")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if "ptrace" in done.stderr.lower() or not log.exists():
        pytest.skip("strace may not trace in this container")
    assert done.returncode == 0, done.stderr
    between = log.read_text().partition('"begin')[2].partition('"end')[0]
    syncs = len(re.findall(r"\b(?:fsync|fdatasync|sync_file_range)\(", between))
    assert 30 <= syncs <= 60


def test_every_kind_of_message_has_a_place(tmp_path: Path) -> None:
    with Spool(tmp_path, device="d") as spool:
        for kind, message in KINDS.items():
            created: Header = message()
            sequence = spool.append(created)
            (held,) = spool.pending(kind)
            assert (held.sequence, held.kind) == (sequence, kind)
            assert len(encode(created)) < len(held.payload)


def test_an_append_writes_one_page(tmp_path: Path) -> None:
    """A card wears out by what is written; the log grows by a frame of 4 KiB and 24 bytes for each changed page."""
    with Spool(tmp_path, device="d") as spool:
        for _ in range(20):
            spool.append(Window())
        log = tmp_path / f"{FILE}-wal"
        before = log.stat().st_size
        for _ in range(10):
            spool.append(Window())
        grown = (log.stat().st_size - before) / (4096 + 24)
        assert 10 <= grown <= 12, "now and then a new page"
        for kind in ("event", "status"):
            plan = spool._disk._db.execute(  # type: ignore[union-attr]
                f"EXPLAIN QUERY PLAN SELECT * FROM messages WHERE {_is_kind(kind)} AND sequence > ?", (kind, 0)
            ).fetchall()
            assert "messages_but_windows" in str(plan)
