"""The state of the last update: the updater's record, the agent's verdict, and when a change is noticed."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from eyas_device.agent import update_state
from eyas_device.agent.update_state import UpdateWatch, merge, poke
from eyas_device.commands.status import _rows
from eyas_device.config import UpdateSection
from eyas_device.telemetry.local import AgentStatus
from eyas_device.telemetry.messages import Update
from eyas_device.updates.agent_release import AgentUpdateRecord
from eyas_device.updates.progress import WAITS, write_progress
from eyas_device.updates.records import Verdict

SECTION = UpdateSection(url="https://updates.example", channel="canary", group="early")
NEW, OTHER = "1" * 64, "2" * 64
RUNNING = Verdict(model="shapes 2.0.0", identity=NEW, started=100.0)
PASSED = msgspec.structs.replace(RUNNING, state="passed", reason="500 predictions", ended=200.0)
FAILED = msgspec.structs.replace(RUNNING, state="failed", reason="too slow", ended=200.0)


def recorded(state: str, since: float, identity: str = NEW, **more: object) -> Update:
    fields = {"state": state, "since": since, "digest": identity[:12], "model": "shapes 2.0.0", "rollout": "r7", **more}
    return Update(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("update", "verdict", "state", "reason"),
    [
        (None, RUNNING, "probation", ""),
        (None, FAILED, "rolled back", "too slow"),
        (recorded("installing", 90.0), RUNNING, "probation", ""),
        (recorded("probation", 101.0), RUNNING, "probation", ""),
        (recorded("probation", 101.0, reason=f"{WAITS}; it was revoked"), RUNNING, "probation", "it was revoked"),
        (recorded("probation", 101.0, reason=WAITS), RUNNING, "probation", ""),
        (recorded("probation", 101.0, reason=WAITS), PASSED, "committed", ""),
        (recorded("probation", 101.0), PASSED, "committed", ""),
        (recorded("probation", 201.0), FAILED, "rolled back", "too slow"),
        (
            recorded("rolled back", 300.0, reason="switched back by hand"),
            PASSED,
            "rolled back",
            "switched back by hand",
        ),
        (recorded("refused", 300.0, reason="revoked"), PASSED, "refused", "revoked"),
        (recorded("downloading", 300.0, OTHER), PASSED, "downloading", ""),
        (recorded("failed", 50.0, OTHER, reason="no route"), FAILED, "rolled back", "too slow"),
        (recorded("hovering", 1.0, OTHER), None, "hovering", ""),
    ],
)
def test_the_newer_of_record_and_verdict_counts(
    update: Update | None, verdict: Verdict | None, state: str, reason: str
) -> None:
    merged = merge(update, verdict, SECTION)
    assert merged is not None and (merged.state, merged.reason) == (state, reason)
    assert (merged.channel, merged.group) == ("canary", "early")
    if update is not None:
        assert merged.rollout == ("r7" if merged.digest == update.digest else "")


def test_without_updates_there_is_nothing_to_say() -> None:
    assert merge(None, None, UpdateSection()) is None
    assert merge(None, None, SECTION) == Update(channel="canary", group="early")


def test_each_change_is_noticed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_state, "_CHECK_S", 0.0)
    verdict: list[Verdict | None] = [None]
    watch, changes = UpdateWatch(tmp_path, SECTION, lambda: verdict[0]), []
    watch.on_change = lambda: changes.append(watch.update.state if watch.update is not None else "")
    (tmp_path / "updates").mkdir()
    record = tmp_path / "updates" / "update.json"
    watch.on_tick()
    watch.on_tick()
    for data in (b"[", b"", b"[" * 100_000, b'{"state": 7}', b"{" + b" " * (1 << 20)):
        record.write_bytes(data)
        watch.on_tick()
    assert changes == ["idle"], "a damaged record counts as missing"
    for state, now in (("downloading", 50.0), ("installing", 60.0), ("probation", 70.0)):
        (tmp_path / "new").write_bytes(msgspec.json.encode(recorded(state, now, checked=now)))
        (tmp_path / "new").replace(record)
        watch.on_tick()
        watch.on_tick()
    verdict[0] = RUNNING
    watch.on_tick()
    verdict[0] = FAILED
    watch.on_tick()
    watch.on_tick()
    assert changes == ["idle", "downloading", "installing", "probation", "rolled back"]


def test_the_agent_s_own_update_is_reported_beside_the_model_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_state, "_CHECK_S", 0.0)
    changes: list[str] = []
    watch = UpdateWatch(tmp_path, SECTION, lambda: None, root_state=tmp_path / "root")
    watch.on_change = lambda: changes.append(watch.agent.state if watch.agent is not None else "")
    watch.on_tick()
    assert watch.agent is None and changes == [""]
    secret = "rtsp://user:secret@camera/1 " + "x" * 1000
    for state in ("installing", "probation", "rolled back"):
        record = AgentUpdateRecord(state=state, model="eyas-agent 9.0.0", reason=secret, environment="venv-1")  # type: ignore[arg-type]
        write_progress(tmp_path / "root", record)
        watch.on_tick()
        watch.on_tick()
    assert changes == ["", "installing", "probation", "rolled back"]
    assert watch.agent is not None and "secret" not in watch.agent.reason and len(watch.agent.reason) == 500
    assert watch.update == Update(channel="canary", group="early")
    shown = [text for _, text in _rows(AgentStatus(update=watch.update, agent_update=watch.agent))]
    assert any(text.startswith("eyas-agent 9.0.0 (): rolled back: ") for text in shown), shown


def test_a_poke_makes_its_folder_and_needs_no_disk(tmp_path: Path) -> None:
    poke(tmp_path)
    first = (tmp_path / "updates" / "poke").stat().st_mtime_ns
    time.sleep(0.01)
    poke(tmp_path)
    assert (tmp_path / "updates" / "poke").stat().st_mtime_ns > first
    poke(tmp_path / "missing" / "folder")


def test_the_status_verb_shows_the_update() -> None:
    update = merge(recorded("probation", 101.0), RUNNING, SECTION)
    rows = list(_rows(AgentStatus(update=update, probation="12 predictions in 3 s, 0 failed")))
    at = [name for name, _ in rows].index("update")
    assert rows[at][1].startswith("shapes 2.0.0 (111111111111): probation since ")
    assert rows[at][1].endswith("(channel canary, group early)")
    assert rows[at + 1] == ("", "12 predictions in 3 s, 0 failed")
    failed = dict(_rows(AgentStatus(update=merge(None, FAILED, UpdateSection()))))["update"]
    assert ": rolled back since " in failed and ": too slow (" in failed
    assert dict(_rows(AgentStatus(update=merge(None, None, SECTION))))["update"].startswith("none yet (channel canary")
