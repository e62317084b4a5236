"""A new agent by a signed release: built beside the one in use, proven, switched, watched, and back if it is bad."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from eyas_device import __version__
from eyas_device.config import Config, DeviceSection, UpdateSection
from eyas_device.updates import agent_release
from eyas_device.updates.agent_mirror import MIRROR, REQUEST
from eyas_device.updates.agent_offer import offer_agent
from eyas_device.updates.agent_release import AgentUpdater, AgentUpdateRecord, Done
from eyas_device.updates.environment import BUILD, UNPACK
from eyas_device.updates.progress import write_progress
from eyas_device.updates.records import read_agent
from eyas_device.updates.release import AGENT, Channel
from eyas_device.updates.slots import Slots
from eyas_host.fleet.updates.agent import publish_agent
from eyas_host.fleet.updates.repository import Repository
from tests.support.fleet_parts import wait_until
from tests.support.paths import ROOT
from tests.support.repositories import make_repository
from tests.support.wheels import build

pytestmark = pytest.mark.timeout(1800)
"""An environment is built and examined by four programs, in which a busy machine takes its time."""
PLATFORM = f"cp{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}"
GOOD, BROKEN, DEAD = "90.1.0", "90.2.0", "90.3.0"
"""An agent that works, one that does not start as a service, and one whose checks fail already."""


def write_libraries(folder: Path) -> None:
    """A wheel that stands for all libraries: it leads to those of this environment."""
    with zipfile.ZipFile(folder / "libraries-1-py3-none-any.whl", "w") as archive:
        archive.writestr("libraries.pth", sysconfig.get_paths()["purelib"] + "\n")


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> folder of its wheels."""
    found = {}
    for version in (__version__, GOOD, BROKEN, DEAD):
        source = tmp_path_factory.mktemp("source") / "device"
        shutil.copytree(ROOT / "device", source, ignore=shutil.ignore_patterns("__pycache__"))
        package = source / "eyas_device"
        text = (package / "__init__.py").read_text()
        (package / "__init__.py").write_text(text.replace(f'"{__version__}"', f'"{version}"'))
        if version == BROKEN:
            verb = package / "commands/run.py"
            verb.write_text(verb.read_text().replace("    config = _config(args)\n", "    raise SystemExit(3)\n", 1))
        if version == DEAD:
            verb = package / "commands/check.py"
            verb.write_text(
                verb.read_text().replace("    if args.config is not", "    return 1\n    if args.config is not")
            )
        folder = tmp_path_factory.mktemp("wheels")
        build(source, folder)
        write_libraries(folder)
        found[version] = folder
    return found


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory, wheels: dict[str, Path]) -> Path:
    """An environment as a flash leaves it. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("flashed")
    (folder / "wheels").symlink_to(wheels[__version__])
    shutil.copy(UNPACK, folder / "unpack.py")
    arguments = [str(folder / "venv"), sys.executable, str(folder), "", "", "unpack"]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(["sh", "-euc", BUILD, "sh", *arguments], check=True, capture_output=True, env=clean)
    return folder / "venv"


class Machine:
    """A device with a flashed environment, and a system that starts real agents."""

    def __init__(self, folder: Path, environment: Path, bundle: Path) -> None:
        self.opt, self.root_state, self.state = folder / "opt", folder / "root-state", folder / "state"
        self.opt.mkdir()
        self.config_path = folder / "device.toml"
        (self.opt / "venv-old").symlink_to(environment)
        (self.opt / "venv").symlink_to("venv-old")
        Slots(self.state).install(bundle)
        self.process: subprocess.Popen[bytes] | None = None
        self.config_path.write_text(
            f'[device]\nstate = "{self.state}"\n[camera]\nsource = "fake:?live=1&fps=50&frames=1000000&size=64x48"\n'
        )
        self.log: list[str] = []

    def as_user(self, words: Sequence[str], timeout_s: float) -> Done:
        self.log.append(f"{Path(words[0]).parts[-3]} {words[1]}")
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
        return Done(done.returncode, done.stdout, done.stderr)

    def restart(self) -> str:
        self.stop()
        self.log.append(f"restart {(self.opt / 'venv').readlink()}")
        command = [self.opt / "venv/bin/eyas-device", "run", "--config", self.config_path]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while read_agent(self.state) is None:
            if self.process.poll() is not None:
                return "the service does not start"
            time.sleep(0.1)
        wait_until(lambda: bool((agent := read_agent(self.state)) and agent.model), 600, "the agent runs its model")
        return ""

    def problem(self) -> str:
        return "" if self.process is not None and self.process.poll() is None else "the service does not stay up"

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(300)


@pytest.fixture
def machine(
    tmp_path: Path, environment: Path, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """A device whose service is down."""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # it would come before what an environment holds
    machine = Machine(tmp_path, environment, pristine_bundle)
    yield machine
    machine.stop()


@pytest.fixture
def running(machine: Machine) -> Machine:
    """The device whose service runs."""
    assert machine.restart() == ""
    return machine


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return make_repository(tmp_path / "fleet")


@pytest.fixture
def config(machine: Machine, repository: Repository, tmp_path: Path) -> Config:
    (tmp_path / "root.json").write_bytes(repository.root())
    update = UpdateSection(url=str(repository.folder), root=str(tmp_path / "root.json"))
    return Config(device=DeviceSection(name="cam-1", state=str(machine.state)), update=update)


def take(machine: Machine, config: Config) -> AgentUpdateRecord:
    """Both sides, one after the other, as the units run them."""
    offer_agent(config, root_state=machine.root_state)
    return updater(machine, config).run_once()


def updater(machine: Machine, config: Config) -> AgentUpdater:
    return AgentUpdater(config, machine.config_path, opt=machine.opt, state=machine.root_state, system=machine)


def test_a_good_agent_is_built_proven_switched_and_kept(
    running: Machine, config: Config, repository: Repository, wheels: dict[str, Path]
) -> None:
    assert take(running, config).state == "idle", "no release of the agent is published"
    publish_agent(repository, {PLATFORM: wheels[GOOD], "cp399-riscv": wheels[GOOD]}, channel="stable")
    record = take(running, config)
    assert (record.state, record.model, record.reason) == ("committed", f"{AGENT} {GOOD}", "")
    assert (record.channel, record.group) == ("stable", "default") and record.checked > 0
    linked = (running.opt / "venv").readlink()
    assert str(linked) == record.environment != "venv-old" == record.previous
    new = record.environment
    assert running.log[1:] == [f"{new} check", f"{new} doctor", "venv doctor", f"restart {new}"]
    done = subprocess.run(
        [running.opt / "venv/bin/eyas-device", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == GOOD
    assert (running.state / "updates" / REQUEST).exists()


@pytest.mark.parametrize(("version", "state"), [(BROKEN, "rolled back"), (DEAD, "refused")])
def test_a_bad_agent_goes_back_by_itself_and_is_not_tried_again(
    version: str, state: str, running: Machine, config: Config, repository: Repository, wheels: dict[str, Path]
) -> None:
    publish_agent(repository, {PLATFORM: wheels[version]}, channel="stable")
    record = take(running, config)
    assert record.state == state, record
    assert (running.opt / "venv").readlink() == Path("venv-old") and running.problem() == ""
    before = len(running.log)
    assert take(running, config).state == state and len(running.log) == before


def test_what_the_service_s_user_wrote_is_never_trusted(
    machine: Machine, config: Config, repository: Repository, wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Another repository in place of ours, wheels exchanged, links to root's files: nothing is built."""
    publish_agent(repository, {PLATFORM: wheels[GOOD]}, channel="stable")
    offer_agent(config, root_state=machine.root_state)
    mirror = machine.state / "updates" / MIRROR
    for blob in (path for path in (mirror / "blobs").glob("*/*")):
        content = blob.read_bytes()
        blob.unlink()
        blob.write_bytes(content[:-1] + b"x")
    record = updater(machine, config).run_once()
    assert record.state == "failed" and "not what was signed" in record.reason
    foreign = make_repository(tmp_path / "foreign")
    publish_agent(foreign, {PLATFORM: wheels[DEAD]}, channel="stable")
    shutil.rmtree(mirror)
    shutil.copytree(foreign.folder, mirror)
    updater(machine, config).run_once()
    shutil.rmtree(mirror)
    mirror.symlink_to("/proc/self")
    updater(machine, config).run_once()
    assert [path.name for path in machine.opt.glob("venv-*")] == ["venv-old"]
    assert (machine.opt / "venv").readlink() == Path("venv-old") and machine.log == []


def test_a_power_cut_after_the_switch_is_judged_at_the_next_boot(
    running: Machine, config: Config, repository: Repository, wheels: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_agent(repository, {PLATFORM: wheels[BROKEN]}, channel="stable")
    offer_agent(config, root_state=running.root_state)

    def cut() -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "restart", cut)
        with pytest.raises(KeyboardInterrupt):
            updater(running, config).run_once()
    running.stop()  # the board boots, and its service does not stay up
    assert str((running.opt / "venv").readlink()) != "venv-old"
    record = updater(running, config).run_once()
    assert record.state == "rolled back" and (running.opt / "venv").readlink() == Path("venv-old")
    assert running.problem() == ""


def test_a_cut_before_the_switch_is_no_commitment(
    running: Machine, config: Config, repository: Repository, wheels: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_agent(repository, {PLATFORM: wheels[GOOD]}, channel="stable")
    offer_agent(config, root_state=running.root_state)

    def cut(self: AgentUpdater, name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AgentUpdater, "_link", cut)
        patch.setattr(AgentUpdater, "_proof", lambda *_: "")  # once is enough, after the cut
        with pytest.raises(KeyboardInterrupt):
            updater(running, config).run_once()
    assert (running.opt / "venv").readlink() == Path("venv-old")
    assert updater(running, config).run_once().state == "committed"


def test_a_check_that_is_late_on_a_busy_board_refuses_no_agent(
    machine: Machine, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red by its time limit now and then is no fault of the new agent; red each time is."""
    new, old = machine.opt / "venv-new", machine.opt / "venv"
    (machine.state / "slots/current").unlink()

    def proof(*reds: set[str]) -> str:
        answers = iter(reds)

        def as_user(words: Sequence[str], timeout_s: float) -> Done:
            red = next(answers) if str(new) in words[0] else {"broker"}
            return Done(int(bool(red)), msgspec.json.encode({"findings": [_red(name) for name in red]}).decode())

        monkeypatch.setattr(machine, "as_user", as_user)
        return updater(machine, config)._proof(new, old)

    late, broken = {"golden", "broker"}, {"libraries", "golden", "broker"}
    assert proof({"broker"}) == "" == proof(late, {"libraries"}) == proof(broken, late, late, {"broker"})
    assert proof(broken, broken, late, late) == "the new agent's doctor is red where the present one's is not: golden"


def _red(name: str) -> dict[str, str]:
    return {"check": name, "status": "red"}


def test_releases_of_the_agent_that_are_not_for_this_device(
    machine: Machine, config: Config, repository: Repository, wheels: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_agent(repository, {"cp399-riscv": wheels[GOOD]}, channel="stable")
    assert offer_agent(config, root_state=machine.root_state) == ""
    assert not (machine.state / "updates" / REQUEST).exists()
    publish_agent(repository, {PLATFORM: wheels[__version__]})
    repository.set_channel("stable", Channel(model=AGENT, target=f"agent/{__version__}/release.json"))
    assert offer_agent(config, root_state=machine.root_state) == "", "it runs already, as a flash has brought it"
    monkeypatch.setattr(agent_release, "__version__", "91.0.0")
    repository.set_channel("stable", Channel(model=AGENT, target=f"agent/{GOOD}/release.json"))
    assert offer_agent(config, root_state=machine.root_state) == "", "older than what runs"


def test_an_update_of_a_model_reads_the_record_of_no_agent(machine: Machine) -> None:
    write_progress(machine.root_state, AgentUpdateRecord(state="committed", environment="venv-1"))
    content = msgspec.json.decode((machine.root_state / "updates/update.json").read_bytes())
    assert content["environment"] == "venv-1"
