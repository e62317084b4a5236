"""The store: what is in it is there once, and stays."""

from __future__ import annotations

import sqlite3
import time
import uuid
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from eyas_device.telemetry.messages import Status, Window, encode
from eyas_host.fleet.store.database import Batch, QuarantinedMessage, Store, StoreError
from eyas_host.fleet.store.ranges import as_ranges, union
from eyas_host.fleet.store.retention import Retention, expire
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.fleet_parts import event, window

SPOOL = str(uuid.UUID(int=7))
NOW = 1_800_000_000.0
DAY = 86400.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'fleet.db'}"


def validated(message: object, kind: str = "window", device: str = "cam-1") -> ValidMessage:
    verdict = validate(f"eyas/s/{device}/{kind}", encode(message))  # type: ignore[arg-type]
    assert isinstance(verdict, ValidMessage), verdict
    return verdict


def windows(numbers: range, device: str = "cam-1", **more: object) -> list[ValidMessage]:
    return [validated(window(device, SPOOL, n, **more), device=device) for n in numbers]


def test_duplicates_are_stored_once(url: str) -> None:
    with Store(url) as store:
        assert store.add(Batch(NOW, windows(range(10)))) == 10
        assert store.add(Batch(NOW, windows(range(5, 15)))) == 5
        assert store.add(Batch(NOW, windows(range(3)) + windows(range(3)))) == 0
    with Store(url) as again:
        assert [w.sequence for w in again.windows()] == list(range(15))
        assert again.counts() == {"window": 15, "quarantine": 0}
        assert again.sequences("cam-1", SPOOL) == list(range(15))


def test_queries_by_device_kind_and_time(url: str) -> None:
    with Store(url) as store:
        hard = validated(event("cam-1", SPOOL, 50), "event")
        store.add(Batch(NOW, [*windows(range(4)), *windows(range(4), "cam-2"), hard]))
        assert {w.device for w in store.windows()} == {"cam-1", "cam-2"}
        assert [w.sequence for w in store.windows("cam-2", since=1_700_000_002.0)] == [2, 3]
        assert [e.label for e in store.events()] == ["crack"]
        assert list(store.events("cam-2")) == []


def test_unknown_fields_of_a_message_are_stored(url: str, tmp_path: Path) -> None:
    payload = encode(window("cam-1", SPOOL, 1))[:-1] + b',"of_a_newer_agent":[1]}'
    verdict = validate("eyas/s/cam-1/window", payload)
    assert isinstance(verdict, ValidMessage)
    with Store(url) as store:
        store.add(Batch(NOW, [verdict]))
    rows = sqlite3.connect(tmp_path / "fleet.db").execute("select payload from messages").fetchall()
    assert rows == [(payload.decode(),)]


def test_status_of_devices(url: str) -> None:
    def status(state: str, sequence: int, spool: str = SPOOL) -> ValidMessage:
        message = Status(device="cam-1", spool=spool, sequence=sequence, state=state, model=f"m {sequence}")  # type: ignore[arg-type]
        return validated(message, "status")

    with Store(url) as store:
        store.add(Batch(NOW, windows(range(1), "cam-0")))
        store.add(Batch(NOW, [status("online", 3)]))
        store.add(Batch(NOW + 1, [status("online", 2)]))
        silent, known = store.devices()
        assert (silent.device, silent.status_received, silent.last_seen) == ("cam-0", 0.0, NOW)
        assert (known.status.state, known.status.model, known.status_received) == ("online", "m 3", NOW), (
            "a late, older status changes nothing"
        )
        store.add(Batch(NOW + 2, [status("lost", -1, "")]))
        assert store.devices()[1].status.state == "lost"
        store.add(Batch(NOW + 3, [status("online", 3)]))
        assert store.devices()[1].status.state == "lost", "a duplicate status changes nothing"
        store.add(Batch(NOW + 4, [status("online", 4)]))
        assert store.devices()[1].status.state == "online"
        store.add(Batch(NOW + 5, [status("offline", 0, str(uuid.UUID(int=8)))]))
        assert store.devices()[1].status.state == "offline", "a new spool counts from 0"
        assert store.counts()["status"] == 4, "last wills are not stored"


def test_quarantine_stores_the_reason_and_the_first_bytes(url: str) -> None:
    with Store(url) as store:
        store.add(Batch(NOW, (), [QuarantinedMessage("eyas/s/d/window", "no window", b"\xff\x00" + b"x" * 100_000)]))
        (kept,) = store.quarantined()
    assert (kept.topic, kept.reason) == ("eyas/s/d/window", "no window")
    assert kept.payload.startswith(b"\\xff\\x00xx")
    assert len(kept.payload) < 20_000


def test_a_commit_is_durable_and_concurrent(url: str, tmp_path: Path) -> None:
    with Store(url) as one, Store(url) as other:
        assert one.add(Batch(NOW, windows(range(5)))) + other.add(Batch(NOW, windows(range(5)))) == 5
        with one.begin() as connection:
            facts = [connection.exec_driver_sql(f"PRAGMA {p}").scalar_one() for p in ("journal_mode", "synchronous")]
    assert facts == ["wal", 2], "acknowledged messages must survive a power cut"


def test_a_locked_store_raises_and_stores_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eyas_host.fleet.store.tables.BUSY_S", 0)
    with Store(url) as store:
        blocker = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            store.add(Batch(NOW, windows(range(3))))
        blocker.execute("ROLLBACK")
        assert store.add(Batch(NOW, windows(range(3)))) == 3


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("fleet.db", "URL is needed"),
        ("oracle://x", "only sqlite, postgresql"),
        ("sqlite:////nowhere/at/all/fleet.db", "unable to open"),
    ],
)
def test_a_store_that_cannot_be_opened(url: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        Store(url)


def test_foreign_tables_and_other_versions_are_refused(url: str, tmp_path: Path) -> None:
    with Store(url):
        pass
    database = sqlite3.connect(tmp_path / "fleet.db")
    database.execute("UPDATE eyas_store SET version = 99")
    database.commit()
    with pytest.raises(StoreError, match="version 99"):
        Store(url)
    foreign = sqlite3.connect(tmp_path / "foreign.db")
    foreign.execute("CREATE TABLE messages (x)")
    foreign.commit()
    with pytest.raises(StoreError, match="another program"):
        Store(f"sqlite:///{tmp_path / 'foreign.db'}")


def test_a_password_is_not_shown() -> None:
    with pytest.raises(StoreError) as refused:
        Store("postgresql+nodriver://user:secret@host/db")
    assert "secret" not in str(refused.value)


def test_old_windows_are_merged_by_hour_and_not_stored_again(url: str) -> None:
    counts = {"counts": {"crack": 2}, "frames": 2, "latency_bins": {100: 2}}
    old = [validated(window("cam-1", SPOOL, n, time=NOW - 90 * DAY + 60 * n, **counts)) for n in range(120)]
    new = [validated(window("cam-1", SPOOL, 200, time=NOW - 60, **counts))]
    with Store(url) as store:
        store.add(Batch(NOW - 90 * DAY, old))
        store.add(Batch(NOW - 60, new))
        expired = expire(store, Retention(windows_days=30), now=NOW)
        assert (expired.merged, expired.deleted) == (120, 0)
        left = list(store.windows())
        assert [w.merged for w in left if w.sequence != 200] in ([60, 60], [40, 60, 20], [20, 60, 40])
        assert sum(w.frames for w in left) == 242
        assert sum(w.counts["crack"] for w in left) == 242
        assert store.add(Batch(NOW, old)) == 0, "expired messages are not stored again"
        assert expire(store, Retention(windows_days=30), now=NOW).merged == 0
        assert sum(w.frames for w in store.windows()) == 242
        late = [validated(window("cam-1", SPOOL, n, time=NOW - 90 * DAY + 60 * n, **counts)) for n in range(120, 130)]
        store.add(Batch(NOW - 80 * DAY, late))
        expire(store, Retention(windows_days=30), now=NOW)
        assert sum(w.frames for w in store.windows()) == 262, "late windows are merged into the hour"


def test_old_events_and_quarantined_messages_are_deleted(url: str) -> None:
    with Store(url) as store:
        invalid = [QuarantinedMessage("t", "r", b"")]
        hard = [validated(event("cam-1", SPOOL, n), "event") for n in range(3)]
        store.add(Batch(NOW - 400 * DAY, hard, invalid))
        store.add(Batch(NOW, [validated(event("cam-1", SPOOL, 3), "event")], invalid))
        expired = expire(store, Retention(events_days=365, quarantine_days=30), now=NOW)
        assert (expired.deleted, expired.quarantined) == (3, 1)
        assert [e.sequence for e in store.events()] == [3]
        assert store.add(Batch(NOW, hard)) == 0


def test_merged_windows_are_windows(url: str) -> None:
    with Store(url) as store:
        store.add(Batch(1.0, [validated(window("cam-1", SPOOL, n, time=5.0)) for n in range(2)]))
        expire(store, Retention(windows_days=1), now=time.time())
        (merged,) = store.windows()
    assert isinstance(merged, Window)
    assert merged.merged == 2


def test_ranges() -> None:
    assert as_ranges([5, 1, 2, 3, 9, 8, 2]) == [(1, 3), (5, 5), (8, 9)]
    assert union([(4, 6), (1, 3), (10, 12), (11, 11)]) == [(1, 6), (10, 12)]
    assert as_ranges([]) == []
