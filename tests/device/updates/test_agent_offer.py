"""Which updater collects the agent's wheels: of several cameras that share an environment, the first one's alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from eyas_device import config
from eyas_device.cli import main
from eyas_device.updates import agent_offer, machine
from eyas_device.updates.progress import State, UpdateRecord


@pytest.mark.parametrize(
    ("first", "allowed", "state", "offers"),
    [
        (True, True, "committed", True),
        (True, True, "probation", False),
        (True, False, "committed", False),
        (False, True, "committed", False),
    ],
)
def test_only_the_first_camera_collects_where_root_allows_it_and_one_update_at_a_time(
    first: bool, allowed: bool, state: State, offers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[str] = []
    unit = tmp_path / "eyas-device-agent-update.path"
    if allowed:
        unit.touch()
    own = tmp_path / ("state" if first else "state/devices/press")
    own.mkdir(parents=True)
    monkeypatch.setattr(config, "STATE", str(tmp_path / "state"))
    monkeypatch.setattr(agent_offer, "ROOT_UNIT", unit)
    monkeypatch.setattr(agent_offer, "offer_agent", lambda *_, **__: offered.append("agent") or "")
    monkeypatch.setattr(machine.Updater, "run_once", lambda _: UpdateRecord(state=state))
    (settings := tmp_path / "device.toml").write_text(f'[device]\nstate = "{own}"\n[update]\nurl = "{tmp_path}"\n')
    assert main(["update", "--config", str(settings)]) == 0
    assert bool(offered) == offers
