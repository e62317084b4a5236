"""A flash of an enrolled device, with real mosquitto, OpenSSH server and agents: its files arrive, or nothing."""

from __future__ import annotations

import grp
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from eyas_device.config import read_config
from eyas_device.errors import ConfigError, EyasError
from eyas_device.telemetry.local import AgentStatus, CameraReport, LinkReport
from eyas_device.telemetry.mqtt_client import LinkState
from eyas_host.fleet.broker.enroll import CREDENTIALS, enroll
from eyas_host.fleet.broker.expel import expel
from eyas_host.fleet.broker.kit import Kit, prepare
from eyas_host.fleet.connect.ssh import CommandResult
from eyas_host.fleet.deploy.journal import Journal
from eyas_host.fleet.deploy.report import judge_status
from tests.support.brokers import free_port
from tests.support.fleet_parts import Processes, listens, needs_mosquitto, wait_until
from tests.support.inside import eyas
from tests.support.ssh_board import LIVE, Board, device_toml

FILES = tuple(CREDENTIALS.values())


@pytest.fixture(scope="module")
def kit(open_folder: Path) -> Iterator[Kit]:
    """A running broker."""
    program = needs_mosquitto()
    made = prepare(open_folder / "fleet", port=free_port())
    processes = Processes(open_folder)
    process = processes.start(program, "-c", str(made.config))
    wait_until(lambda: listens(made.port) or process.poll() is not None, 15, "a listening broker")
    yield made
    processes.close()


def broker_of(kit: Kit) -> str:
    return f"127.0.0.1:{kit.port}"


def credentials(board: Board) -> dict[str, bytes]:
    """The credentials on the device."""
    folder = board.root / "etc/eyas/credentials"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def own(kit: Kit, name: str) -> dict[str, bytes]:
    """The credentials that a device was enrolled with."""
    return {file: (kit.folder / "devices" / name / file).read_bytes() for file in FILES}


def named(service: dict[str, object], kit: Kit, name: str) -> dict[str, object]:
    """Options of a flash that brings what a device was enrolled with."""
    return {**service, "config": None, "name": name, "kit": kit.folder}


def watch_keys(root: Path, stop: threading.Event, open_keys: list[str]) -> None:
    """Note every moment at which others could read a private key below `root`."""
    while not stop.is_set():
        try:
            for path in root.rglob("*client.key*"):
                parents = [parent for parent in path.parents if root in parent.parents]
                closed = any(not parent.stat().st_mode & stat.S_IXOTH for parent in parents)
                if path.stat().st_mode & 0o007 and not closed:
                    open_keys.append(str(path))
        except OSError:  # what was just listed is gone
            continue


def test_from_an_enrolled_name_to_a_connected_device(
    board: Board, bundle_root: Path, service: dict[str, object], kit: Kit, tmp_path: Path
) -> None:
    enroll(kit.folder, "cam-7", site="hall-2", camera=LIVE, broker=broker_of(kit))
    stop, open_keys = threading.Event(), list[str]()
    watcher = threading.Thread(target=watch_keys, args=(board.root, stop, open_keys))
    watcher.start()
    try:
        [result] = board.flash(bundle_root, **named(service, kit, "cam-7"))
    finally:
        stop.set()
        watcher.join()
    assert result.detail.endswith("new: model, credentials, configuration, service"), result
    assert result.warnings == ()
    assert any(line.endswith(f"broker {broker_of(kit)} is connected") for line in board.lines), board.lines
    assert any("camera fake:" in line and line.endswith("delivers") for line in board.lines)
    assert open_keys == [], "a private key could be read by others for a moment"
    folder = board.root / "etc/eyas/credentials"
    group = grp.getgrgid(os.getgid()).gr_name
    modes = {path.name: (stat.S_IMODE(path.stat().st_mode), path.group()) for path in (folder, *folder.iterdir())}
    assert modes == {
        "credentials": (0o750, group),
        "ca.crt": (0o644, group),
        "client.crt": (0o644, group),
        "client.key": (0o640, group),
    }
    assert stat.S_IMODE((board.root / "etc/eyas/device.toml").stat().st_mode) == 0o640
    assert credentials(board) == own(kit, "cam-7")
    config = read_config(board.root / "etc/eyas/device.toml")
    assert (config.device.site, config.device.name, config.device.state) == ("hall-2", "cam-7", str(board.state))

    [again] = board.flash(bundle_root, **named(service, kit, "cam-7"))
    assert (again.status, again.sent_bytes, again.warnings) == ("unchanged", 0, ())
    assert (tmp_path / "systemctl.log").read_text().splitlines().count("restart eyas-device") == 1

    before = credentials(board)
    enroll(kit.folder, "cam-7")
    [renewed] = board.flash(bundle_root, **named(service, kit, "cam-7"))
    assert renewed.detail.endswith("new: credentials"), renewed
    assert credentials(board) == own(kit, "cam-7") != before
    assert (tmp_path / "systemctl.log").read_text().splitlines().count("restart eyas-device") == 2

    enroll(kit.folder, "cam-7", root=b'{"signed": {"_type": "root"}}')
    [trusting] = board.flash(bundle_root, **named(service, kit, "cam-7"))
    assert trusting.detail.endswith("new: credentials, configuration"), trusting
    pinned = read_config(board.root / "etc/eyas/device.toml").update.root
    assert pinned == str(folder / "root.json")
    assert (folder / "root.json").read_bytes() == b'{"signed": {"_type": "root"}}'
    assert stat.S_IMODE((folder / "root.json").stat().st_mode) == 0o644

    (folder / "client.key").chmod(0o600)
    [mended] = board.flash(bundle_root, **named(service, kit, "cam-7"))
    assert mended.detail.endswith("new: credentials"), "the service could not read its key"


def test_credentials_are_part_of_the_roll_back(
    board: Board,
    bundle_root: Path,
    edit_manifest: Callable[..., None],
    service: dict[str, object],
    kit: Kit,
    tmp_path: Path,
) -> None:
    enroll(kit.folder, "cam-8", camera=LIVE, broker=broker_of(kit))
    [first] = board.flash(bundle_root, **named(service, kit, "cam-8"))
    assert first.ok, first
    (board.root / "etc/eyas/credentials/password").write_text("of the user")
    before, config = credentials(board), (board.root / "etc/eyas/device.toml").read_text()
    enroll(kit.folder, "cam-8", site="hall-9")
    edit_manifest(version="2.0.0")
    (tmp_path / "systemctl.log.broken").write_text("b")
    [result] = board.flash(bundle_root, **named(service, kit, "cam-8"))
    assert (result.status, result.detail) == ("rolled back", "the service does not start: Job failed.; rolled back")
    assert credentials(board) == before
    assert (board.root / "etc/eyas/device.toml").read_text() == config
    assert not list((board.root / "opt/eyas").iterdir()), "a key is left of a flash that was rolled back"


def test_a_camera_and_a_broker_that_do_not_answer_are_warnings(
    board: Board, bundle_root: Path, service: dict[str, object], kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eyas_host.fleet.deploy.report._WAIT_S", 3.0)
    port = free_port()
    enroll(kit.folder, "cam-9", camera="v4l2:/dev/video-none", broker=f"127.0.0.1:{port}")
    [result] = board.flash(bundle_root, **named(service, kit, "cam-9"))
    assert (result.status, result.ok) == ("flashed", True), result
    camera, broker = result.warnings
    assert "camera v4l2:/dev/video-none does not deliver (" in camera and "doctor" in camera
    assert f"broker 127.0.0.1:{port}: " in broker and "doctor" in broker


def test_without_a_service_it_says_what_to_start_by_hand(board: Board, bundle_root: Path, kit: Kit) -> None:
    enroll(kit.folder, "cam-10", camera="fake:?frames=5", broker=broker_of(kit))
    [result] = board.flash(bundle_root, name="cam-10", kit=kit.folder)
    assert result.status == "flashed", result
    [by_hand] = result.warnings
    config = board.root / "etc/eyas/device.toml"
    assert by_hand.startswith(f"no service is installed below {board.root}: start it by hand: ")
    command = by_hand.partition("by hand: ")[2]
    assert f"run --config '{config}'" in command
    assert any("broker: " in line and "accepts this certificate" in line for line in board.lines), board.lines
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("state", LinkState)
def test_a_broker_without_a_collector_is_no_trouble(state: LinkState) -> None:
    """On the way through, the collector comes after the first flash."""
    link = LinkReport(broker="10.1.2.3:8883", state=f"{state.value}: more")
    if state is LinkState.CONNECTED:
        link = LinkReport(broker="10.1.2.3:8883", state=state.value)
    works, troubles = judge_status(AgentStatus(camera=CameraReport(state="delivering", source="v4l2:0"), link=link))
    connected = state in (LinkState.CONNECTED, LinkState.NO_COLLECTOR)
    assert (len(works), len(troubles)) == ((2, 0) if connected else (1, 1))
    assert ("eyas collect" in works[-1]) == (state is LinkState.NO_COLLECTOR)


Spoil = Callable[[Path], object]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda fleet: expel(fleet, "cam-7"), "revoked, cam-7 was expelled; `eyas enroll cam-7 --yes`"),
        (lambda fleet: enroll(fleet, "cam-7", days=-1), "client.crt: expired"),
        (
            lambda fleet: shutil.copy(fleet / "devices/cam-8/client.key", fleet / "devices/cam-7"),
            "certificate, key and authority do not belong together",
        ),
        (
            lambda fleet: [shutil.copy(fleet / "devices/cam-8" / f, fleet / "devices/cam-7") for f in FILES],
            "is cam-8's, but",
        ),
        (lambda fleet: (fleet / "devices/cam-7/client.key").unlink(), "cam-7 lacks client.key"),
        (lambda fleet: (fleet / "devices/cam-7/client.crt").write_text("damaged"), "damaged"),
        (lambda fleet: shutil.rmtree(fleet / "devices/cam-7"), "cam-7 is not enrolled in"),
        (lambda fleet: shutil.rmtree(fleet), "`eyas broker --kit"),
        (lambda fleet: enroll(fleet, "cam-7", camera=None), None),
    ],
)
def test_what_does_not_fit_is_refused_before_a_device_is_touched(
    board: Board, bundle_root: Path, tmp_path: Path, spoil: Spoil, words: str | None
) -> None:
    fleet = tmp_path / "fleet"
    prepare(fleet)
    for name in ("cam-7", "cam-8"):
        enroll(fleet, name, camera=LIVE, broker="server.lan")
    spoil(fleet)
    if words is None:
        assert board.flash(bundle_root, name="cam-7", kit=fleet, dry_run=True)[0].status == "planned"
    else:
        with pytest.raises(EyasError) as caught:
            board.flash(bundle_root, name="cam-7", kit=fleet)
        assert words in str(caught.value) and "\n" not in str(caught.value)
    assert list(board.root.iterdir()) == []


def test_a_configuration_without_a_camera_is_refused(board: Board, bundle_root: Path, tmp_path: Path) -> None:
    config = tmp_path / "device.toml"
    config.write_text('[device]\nname = "cam"\n')
    with pytest.raises(ConfigError, match=r"\[camera\] source is missing"):
        board.flash(bundle_root, config=config)
    assert list(board.root.iterdir()) == []


def test_one_name_is_one_device(board: Board, bundle_root: Path, tmp_path: Path) -> None:
    with pytest.raises(EyasError, match="--name cam-7 is one device, but 2 are given"):
        board.flash(bundle_root, board.name, "root@another", name="cam-7", kit=tmp_path)


def test_a_configuration_of_ones_own_with_the_credentials_of_a_name(
    board: Board, bundle_root: Path, service: dict[str, object], kit: Kit, tmp_path: Path
) -> None:
    enroll(kit.folder, "cam-11", camera=LIVE, broker=broker_of(kit))
    there = board.root / "etc/eyas/credentials"
    telemetry = f'[telemetry]\nbroker = "{broker_of(kit)}"\n' + "".join(
        f'{key} = "{there}/{file}"\n' for key, file in CREDENTIALS.items()
    )
    config = tmp_path / "device.toml"
    config.write_text(device_toml(board, telemetry))
    options = {**named(service, kit, "cam-11"), "config": config}
    with pytest.raises(EyasError, match=r"is cam-11's, but .* name = 'cam'"):
        board.flash(bundle_root, **options)
    config.write_text(device_toml(board, telemetry).replace('"cam"', '"cam-11"'))
    [result] = board.flash(bundle_root, **{**options, "name": None})
    assert result.status == "failed"
    for file in FILES:
        assert f"{there}/{file}" in result.detail
    assert "named in the configuration, but missing there; bring them with --name" in result.detail
    assert not (board.root / "opt").exists()
    [result] = board.flash(bundle_root, **options)
    assert result.ok and result.warnings == (), result
    config.write_text(config.read_text().replace("client.key", "other.key"))
    with pytest.raises(EyasError, match=r"\[telemetry\] key must be"):
        board.flash(bundle_root, **options)


def test_the_verb_prints_warnings_and_succeeds(board: Board, bundle_root: Path, kit: Kit, tmp_path: Path) -> None:
    enroll(kit.folder, "cam-12", camera="fake:?frames=5", broker=broker_of(kit))
    ssh = [word for option in board.access.options for word in ("--ssh-option", option)]
    words = ["--name", "cam-12", "--kit", kit.folder, "--bundle", bundle_root, "--python", sys.executable]
    done = eyas(tmp_path, "flash", board.name, *words, "--root", board.root, "--identity", board.key, *ssh)
    assert done.code == 0, done.err
    assert f"{board.name}: flashed: " in done.out
    assert f"{board.name}: warning: no service is installed below" in done.out


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """A journal on this machine."""

    def script(text: str, *arguments: str) -> CommandResult:
        done = subprocess.run(
            ["sh", "-euc", text, "sh", *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        return CommandResult(done.returncode, done.stdout, done.stderr)

    made = Journal(script, str(tmp_path / ".before"))
    made.begin(resumed=False)
    return made


@pytest.mark.parametrize("python", [sys.executable, "/bin/false"])
def test_a_folder_is_replaced_and_restored(journal: Journal, tmp_path: Path, python: str) -> None:
    """With `/bin/false` as on a file system that cannot exchange two names."""
    target, new = tmp_path / "etc/credentials", tmp_path / "new"
    new.mkdir()
    for file in FILES:
        (new / file).write_text("new")

    def put() -> str:
        result = journal.put_folder(str(new), str(target), private=["client.key"], group="", python=python)
        assert result.code == 0, result
        return result.out.strip()

    assert put() == "created"
    assert journal.restore_folder(str(target), python=python).code == 0
    assert not target.exists()
    journal.begin(resumed=False)
    target.mkdir(parents=True)
    for file in (*FILES, "password"):
        (target / file).write_text("old")
    before = {path.name: path.read_text() for path in target.iterdir()}
    assert put() == "changed"
    after = {path.name: path.read_text() for path in target.iterdir()}
    assert after == {**before, **dict.fromkeys(FILES, "new")}
    assert stat.S_IMODE((target / "client.key").stat().st_mode) == 0o640
    assert journal.restore_folder(str(target), python=python).code == 0
    assert {path.name: path.read_text() for path in target.iterdir()} == before
    assert {path.name for path in target.parent.iterdir()} == {"credentials"}, "something is left"


def test_no_moment_has_a_certificate_with_another_key(journal: Journal, tmp_path: Path) -> None:
    target = tmp_path / "etc/credentials"
    stop, mixed, seen = threading.Event(), list[tuple[str, ...]](), set[tuple[str, ...]]()

    def look() -> None:
        while not stop.is_set():
            try:
                folder = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                mixed.append(("missing",))
                continue
            try:
                texts = tuple((Path(f"/proc/self/fd/{folder}") / file).read_text() for file in FILES)
            except FileNotFoundError:
                continue  # the folder of before is being removed
            finally:
                os.close(folder)
            seen.add(texts)
            mixed.extend([texts] if len(set(texts)) > 1 else [])

    watcher = threading.Thread(target=look)
    for round_ in range(12):
        new = tmp_path / f"new-{round_}"
        new.mkdir()
        for file in FILES:
            (new / file).write_text(str(round_))
        result = journal.put_folder(str(new), str(target), private=["client.key"], group="", python=sys.executable)
        assert result.code == 0, result
        if round_ == 0:
            watcher.start()
    time.sleep(0.1)
    stop.set()
    watcher.join()
    assert mixed == [] and len(seen) > 5
