"""From `eyas publish` to a camera: signed on a host, served as files, installed by a process, run by a real agent."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eyas_device.updates.progress import POKE
from eyas_device.updates.records import read_agent
from eyas_device.updates.release import Bounds
from eyas_device.updates.slots import Slots
from eyas_host.fleet.updates.repository import Repository
from tests.support.blob_server import serving
from tests.support.fleet_parts import wait_until
from tests.support.nginx import nginx
from tests.support.repositories import change, make_repository, newest, open_repository, versioned

LIVE = "fake:?live=1&fps=20&frames=1000000&size=64x48"
BOUNDS = Bounds(frames=20, seconds=5.0, min_frames=5, shadow_every=2)


class Camera:
    """A device: its configuration, its state, and `eyas-device` in processes of their own."""

    def __init__(self, folder: Path, repository: Repository, bundle: Path) -> None:
        folder.mkdir()
        self.folder, self.state = folder, folder / "state"
        self.config = folder / "device.toml"
        (folder / "root.json").write_bytes(repository.root())
        self.slots = Slots(self.state)
        self.slots.install(bundle)
        self.follow("/nowhere")

    def follow(self, url: str, more: str = "") -> None:
        self.config.write_text(
            f'[device]\nname = "cam-1"\nstate = "{self.state}"\n[camera]\nsource = "{LIVE}"\n'
            f'[update]\nurl = "{url}"\nroot = "{self.folder}/root.json"\n{more}'
        )

    def run(self, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "eyas_device", *words, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)

    def update(self, *words: str) -> dict[str, Any]:
        """One look; its exit code is added to what it prints."""
        done = self.run("update", "--json", *words)
        assert done.returncode in (0, 1), done.stderr
        return {**json.loads(done.stdout), "code": done.returncode}

    @property
    def version(self) -> str:
        return next(state.version for state in self.slots.states() if state.current)

    @contextmanager
    def process(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        command = [sys.executable, "-m", "eyas_device", *words, "--config", str(self.config)]
        with (self.folder / f"{words[0]}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            finally:
                process.kill()

    def runs(self, version: str) -> bool:
        agent = read_agent(self.state)
        return agent is not None and agent.model.endswith(version)


@pytest.fixture(scope="session")
def pristine_kit(pristine_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kit whose channel `stable` wants 1.3.0. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("kit")
    repository = make_repository(folder / "fleet")
    repository.publish(pristine_bundle, channel="stable", probation=BOUNDS)
    newer = versioned(pristine_bundle, folder / "newer", "1.3.0")
    repository.publish(newer, channel="stable", probation=BOUNDS)
    return folder / "fleet"


@pytest.fixture
def repository(pristine_kit: Path, tmp_path: Path) -> Repository:
    return open_repository(Path(shutil.copytree(pristine_kit, tmp_path / "fleet")))


@pytest.fixture
def camera(repository: Repository, pristine_bundle: Path, tmp_path: Path) -> Camera:
    return Camera(tmp_path / "camera", repository, pristine_bundle)


def test_a_running_camera_takes_a_signed_release(camera: Camera, repository: Repository) -> None:
    with serving(repository.folder) as server, camera.process("run"):
        camera.follow(server.url)
        wait_until(lambda: camera.runs("1.2.3"), 120, "the agent runs")
        preview = camera.run("update", "--check")
        assert preview.returncode == 0 and "would install: tiny-shapes 1.3.0" in preview.stdout
        assert camera.version == "1.2.3"
        found = camera.update()
        assert (found["code"], found["model"]) == (0, "tiny-shapes 1.3.0"), found
        assert camera.version == "1.3.0" and camera.runs("1.3.0"), "the agent has been asked, and has answered"
        blobs = {path for path, _ in server.requests if path.startswith("/blobs/")}
        assert len(blobs) == 1, "of a new version with the same model, only the manifest is fetched"
        wait_until(lambda: camera.update()["state"] == "committed", 120, "it has proven itself on real frames")
        status = camera.run("update", "--status")
        assert "tiny-shapes 1.3.0" in status.stdout and "committed" in status.stdout


@pytest.mark.parametrize("mode", ["ranges", "no ranges"])
def test_a_camera_without_a_model_goes_on_where_the_link_broke(
    mode: str, camera: Camera, repository: Repository
) -> None:
    shutil.rmtree(camera.state)
    with serving(repository.folder) as server:
        camera.follow(server.url, 'model = "tiny-shapes"\n')
        variant = repository.releases()[-1].variants[0]
        cut = max(file.size_bytes for file in variant.files) - 1
        server.mode, server.cut = mode, cut
        broken = camera.update()
        assert (broken["code"], broken["state"]) == (1, "failed"), broken
        done = camera.update()
        assert (done["code"], done["attempts"], camera.version) == (0, 2, "1.3.0"), done
        resumed = [start for _, start in server.requests if start]
        assert len(resumed) == 1 and 0 < resumed[0] <= cut


def test_any_static_server_will_do_and_another_one_goes_on(
    camera: Camera, repository: Repository, tmp_path: Path
) -> None:
    """The link to the first breaks; nginx has the same files."""
    shutil.rmtree(camera.state)
    with serving(repository.folder) as server, nginx(repository.folder, tmp_path / "nginx") as other:
        camera.follow(server.url, 'model = "tiny-shapes"\n')
        server.cut = max(file.size_bytes for file in repository.releases()[-1].variants[0].files) - 1
        assert camera.update()["state"] == "failed"
        camera.follow(other.url, 'model = "tiny-shapes"\n')
        done = camera.update()
        assert (done["code"], camera.version) == (0, "1.3.0"), done
        answers = other.answers()
    [resumed] = [one for one in answers if one.status == 206]
    assert resumed.path.startswith("/blobs/") and resumed.sent_bytes == 1, "the byte that was missing"
    assert {one.status for one in answers} <= {200, 206, 404}, "404: the root that comes next is not there"


def test_a_stick_is_the_same_repository(camera: Camera, repository: Repository, tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    shutil.copytree(repository.folder, stick / "eyas")
    missing = camera.run("update", "--from", str(tmp_path / "empty"))
    assert missing.returncode == 2 and "is it mounted?" in missing.stderr and "Traceback" not in missing.stderr
    found = camera.update("--from", str(stick))
    assert (found["code"], camera.version) == (0, "1.3.0"), found
    assert camera.slots.release("b") is not None


def test_what_is_not_signed_by_us_is_refused_and_the_model_stays(
    camera: Camera, repository: Repository, pristine_bundle: Path, tmp_path: Path
) -> None:
    foreign = make_repository(tmp_path / "foreign")
    foreign.publish(versioned(pristine_bundle, tmp_path / "evil", "9.9.9"), channel="stable")
    camera.follow(str(foreign.folder))
    found = camera.update()
    assert (found["code"], found["state"], camera.version) == (1, "refused", "1.2.3"), found
    altered = Path(shutil.copytree(repository.folder, tmp_path / "altered"))
    change(newest(altered, "targets"), lambda content: content["signed"].update(version=99))
    camera.follow(str(altered))
    found = camera.update()
    assert (found["code"], found["state"], camera.version) == (1, "refused", "1.2.3"), found
    for blob in (path for path in (altered / "blobs").rglob("*") if path.is_file()):
        blob.write_bytes(bytes(blob.stat().st_size))
    shutil.rmtree(altered / "metadata")
    shutil.copytree(repository.folder / "metadata", altered / "metadata")
    found = camera.update()
    assert (found["code"], found["state"], camera.version) == (1, "refused", "1.2.3"), found
    assert "not what was signed" in found["reason"]
    camera.follow(str(repository.folder))
    found = camera.update()
    assert (found["code"], camera.version) == (0, "1.3.0"), "what was refused was the way there, not the release"


def test_a_revoked_release_is_left_by_a_running_camera(camera: Camera, repository: Repository) -> None:
    camera.follow(str(repository.folder))
    with camera.process("run"):
        wait_until(lambda: camera.runs("1.2.3"), 120, "the agent runs")
        camera.update()
        assert camera.runs("1.3.0")
        repository.revoke("1.3.0", reason="wrong labels")
        found = camera.update()
        assert (found["state"], camera.version) == ("rolled back", "1.2.3"), found
        assert found["reason"] == "tiny-shapes 1.3.0 was revoked: wrong labels"
        wait_until(lambda: camera.runs("1.2.3"), 60, "the earlier model runs")


def test_the_watcher_looks_at_once_when_it_is_poked_and_ends_its_look_with_itself(
    camera: Camera, repository: Repository
) -> None:
    camera.follow(str(repository.folder), "poll_s = 100000.0\n")
    (camera.state / "updates").mkdir()
    with camera.process("update", "--watch") as watcher:
        deadline = 0

        def poked() -> bool:
            nonlocal deadline
            deadline += 1
            (camera.state / "updates" / POKE).write_text(str(deadline))
            return camera.version == "1.3.0"

        wait_until(poked, 120, "the release is installed")
        assert watcher.poll() is None
    assert watcher.returncode == -signal.SIGTERM


def test_without_an_address_there_is_nothing_to_do(camera: Camera) -> None:
    camera.follow("")
    done = camera.run("update", "--watch", timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, "[update] url is empty: there is nothing to watch")
    done = camera.run("update")
    assert done.returncode == 2 and "[update] url: empty" in done.stderr
    assert camera.run("update", "--watch", "--now").returncode == 2
    assert [path.name for path in camera.state.iterdir()] == ["slots"], "nothing was written"
