"""Several cameras on one machine: real agents with configurations in the instances' folder do not touch each other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from eyas_device.updates.slots import Slots
from tests.device.agent.test_app import versioned

_PROGRAM = """
import sys
from pathlib import Path
from eyas_device import config
config.INSTANCES, config.STATE = Path(sys.argv[1]), sys.argv[2]
from eyas_device.cli import main
sys.exit(main(sys.argv[3:]))
"""
"""The verb, with the folders of the test in place of /etc/eyas/devices and /var/lib/eyas."""


def test_two_cameras_run_their_own_models_and_one_may_die(pristine_bundle: Path, tmp_path: Path) -> None:
    configs, state = tmp_path / "devices", tmp_path / "state"
    configs.mkdir()
    command = [sys.executable, "-c", _PROGRAM, str(configs), str(state)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def verb(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [*command, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)

    agents: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, version in (("line-7", "1.2.3"), ("press", "4.5.6")):
            (configs / f"{name}.toml").write_text(
                f'[camera]\nsource = "fake:?live=1&fps=20&frames=1000000&size=64x48"\n[loop]\nfps = {len(name)}\n'
            )
            (state / "devices" / name).mkdir(parents=True)
            bundle = versioned(pristine_bundle, tmp_path / f"bundle-{name}", version)
            installed = verb("install", bundle, "--config", configs / f"{name}.toml")
            assert installed.returncode == 0, installed.stderr
            agents[name] = subprocess.Popen(
                [*command, "run", "--config", str(configs / f"{name}.toml")],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        deadline = time.monotonic() + 60
        running: dict[str, str] = {}
        while len(running) < 2:
            assert time.monotonic() < deadline, running
            for name in agents:
                record = state / "devices" / name / "agent.json"
                if record.is_file() and (model := json.loads(record.read_text())["model"]):
                    running[name] = model
            time.sleep(0.05)
        assert running == {"line-7": "tiny-shapes 1.2.3", "press": "tiny-shapes 4.5.6"}
        agents["line-7"].kill()
        agents["line-7"].wait(20)
        slots = verb("slots", "--config", configs / "press.toml")
        assert "tiny-shapes 4.5.6" in slots.stdout and "running" in slots.stdout and "1.2.3" not in slots.stdout
        assert agents["press"].poll() is None
        assert [path.name for path in state.iterdir()] == ["devices"], "something lies outside of both state folders"
        agents["press"].send_signal(signal.SIGTERM)
        assert agents["press"].wait(30) == 0
    finally:
        for agent in agents.values():
            agent.kill()
            agent.wait()
    assert Slots(state / "devices" / "press").current() is not None
