"""Who runs what: each reason for being behind, hostile words from devices, and eighty columns."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path
from typing import Any

from eyas_device.telemetry.messages import Status, Update, encode
from eyas_host.fleet.inventory import inventory, lines, summary
from eyas_host.fleet.store.database import Batch, DeviceRecord, Store
from eyas_host.fleet.store.validate import ValidMessage, validate
from tests.support.inside import eyas

NOW = 1_800_000_000.0


def record(name: str, version: str = "1.0.0", update: dict[str, Any] | None = None, **fields: Any) -> DeviceRecord:
    made: dict[str, Any] = {"device": name, "state": "online", "model": f"shapes {version}" if version else ""}
    if update is not None:
        made["update"] = Update(**({"channel": "stable", "checked": NOW} | update))
    return DeviceRecord(name, fields.pop("site", "hall"), NOW, NOW, Status(**(made | fields)))


def why(*others: DeviceRecord) -> dict[str, str]:
    newest = record("newest", "2.0.0", {"state": "committed"})
    return {one.device: one.why if one.behind else f"({one.why})" for one in inventory([newest, *others], NOW)}


def test_each_device_that_is_behind_says_why() -> None:
    refused = {"state": "refused", "model": "shapes 2.0.0", "reason": "is for pi5; this board is pi3"}
    found = why(
        record("wave", update={}),
        record("board", update=refused),
        record("back", update={"state": "rolled back", "model": "shapes 2.0.0", "reason": "not finite"}),
        record("off", update={}, state="lost"),
        record("busy", update={"state": "probation", "model": "shapes 2.0.0"}),
        record("deaf", update={"checked": NOW - 9 * 86_400}),
        record("never", update={"checked": 0.0, "clock": "it is 1970"}),
        record("dark", "", {}, refused_reason="no bundle"),
    )
    assert found == {
        "newest": "()",
        "wave": "2.0.0 is there; not in a wave of it yet",
        "board": "shapes 2.0.0 refused: is for pi5; this board is pi3",
        "back": "shapes 2.0.0 rolled back: not finite",
        "off": "not connected",
        "busy": "shapes 2.0.0: probation",
        "deaf": "has not reached the repository for 9 days",
        "never": "has not reached the repository; clock: it is 1970",
        "dark": "no model runs: no bundle",
    }


def test_the_agent_s_own_update_is_said_beside_the_model_s() -> None:
    agent = {"model": "eyas-agent 9.0.0", "state": "rolled back", "reason": "the service does not start"}
    busy = Update(**(agent | {"state": "probation", "reason": ""}))
    found = why(
        record("back", "2.0.0", {}, agent="0.9.0", agent_update=Update(**agent)),
        record("busy", update={"state": "probation", "model": "shapes 2.0.0"}, agent_update=busy),
        record("done", "2.0.0", {}, agent="9.0.0", agent_update=Update(state="committed", model="eyas-agent 9.0.0")),
    )
    assert found["back"] == "(eyas-agent 9.0.0: rolled back: the service does not start)"
    assert found["busy"] == "shapes 2.0.0: probation; eyas-agent 9.0.0: probation"
    assert found["done"] == "()"
    [one] = inventory([record("back", "2.0.0", {}, agent="0.9.0", agent_update=Update(**agent))], NOW)
    assert (one.agent, one.agent_update) == ("0.9.0", "rolled back")
    assert " 0.9.0 " in lines([one], 120)[1]


def test_other_channels_and_ssh_alone_are_not_compared() -> None:
    assert why(record("other", update={"channel": "canary"}))["other"] == "()"
    by_ssh = [record("a", "2.0.0"), record("b", "1.0.0")]
    [behind, _] = inventory(by_ssh, NOW)
    assert behind.behind and "no updates over the air" in behind.why
    assert summary(inventory(by_ssh, NOW))[-1] == "2 devices, 1 behind"


def test_the_table_has_eighty_columns_and_nothing_that_a_terminal_obeys() -> None:
    hostile = {"state": "refused", "model": "m\x1b[31m", "reason": "\x1b]0;title\x07" + "long " * 60}
    devices = inventory([record("x" * 60, "9" * 40, hostile, site="s" * 40), record("cam")], NOW)
    text = lines(devices, 80)
    assert max(map(len, text)) <= 80
    assert "\x1b" not in "".join(text) and "\x07" not in "".join(text)


def test_the_verb(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'fleet.db'}"
    assert eyas(tmp_path, "fleet").code == 2
    with Store(url) as store:
        assert "no devices" in eyas(tmp_path, "fleet").out
        for number, (name, version) in enumerate((("cam-1", "1.0.0"), ("cam-2", "2.0.0"))):
            one = record(name, version, {}, spool=str(uuid.uuid4()), sequence=number, time=time.time())
            valid = validate(f"eyas/hall/{name}/status", encode(one.status))
            assert isinstance(valid, ValidMessage)
            store.add(Batch(time.time(), [valid]))
    done = eyas(tmp_path, "fleet", "--behind", "--json")
    assert [json.loads(line)["device"] for line in done.out.splitlines()] == ["cam-1"]
    done = eyas(tmp_path, "fleet", "--site", "hall")
    assert done.code == 0 and done.out.splitlines()[-1] == "2 devices, 1 behind"
