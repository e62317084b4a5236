"""The first flash, against a real OpenSSH server on loopback: a flash works, or changes nothing."""

from __future__ import annotations

import getpass
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer
from typer.testing import CliRunner

from eyas_device.agent.service import RULES, UPDATER
from eyas_device.bundle import REFERENCE
from eyas_device.errors import BundleError, ConfigError
from eyas_device.updates.records import read_agent
from eyas_host.cli import devices
from eyas_host.fleet.connect.preflight import (
    Layout,
    inspect_device,
)
from eyas_host.fleet.connect.ssh import FleetError, Remote, SshAccess, Target
from eyas_host.fleet.deploy.bench import BenchSettings, bench, board_name
from eyas_host.fleet.deploy.flash import FlashSettings, flash
from eyas_host.fleet.deploy.installer import Installer
from eyas_host.fleet.deploy.plan import InstallPlan
from tests.support.brokers import free_port
from tests.support.bundles import edit, rewrite
from tests.support.ssh_board import Board, device_toml


def test_flash_and_again(board: Board, bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    [first] = board.flash(bundle_root)
    assert (first.status, first.ok, first.target) == ("flashed", True, board.name), first.detail
    assert first.detail == "tiny-shapes 1.2.3 in slot a; new: model"
    assert board.version() == "1.2.3"
    before = board.tree()
    [second] = board.flash(bundle_root)
    assert (second.status, second.sent_bytes) == ("unchanged", 0)
    assert board.tree() == before
    edit_manifest(version="1.2.4")
    [third] = board.flash(bundle_root)
    assert (third.status, board.version()) == ("flashed", "1.2.4"), third.detail
    assert third.sent_bytes < first.sent_bytes / 2, "unchanged files were sent again"
    assert {name.split("/")[0] for name in board.tree()} == {"var"}, "temporary files were left behind"
    for step in ("bundle sent", "golden check passed", "health"):
        assert any(step in line and line.startswith(board.name) for line in board.lines)


def test_a_damaged_local_bundle_is_refused_first(board: Board, bundle_root: Path) -> None:
    board.install(bundle_root)
    (bundle_root / "litert-int8.tflite").write_bytes(b"damaged")
    with pytest.raises(BundleError, match=r"litert-int8\.tflite"):
        board.flash(bundle_root)
    assert board.version() == "1.2.3"


def test_damage_in_transit(board: Board, bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    board.install(bundle_root)
    edit_manifest(version="2.0.0")
    model = board.root / "opt/eyas/incoming/bundle/litert-int8.tflite"
    board.tool("rsync", f'#!/bin/sh\n/usr/bin/rsync "$@"; code=$?\necho x >> "{model}"; exit $code\n')
    [result] = board.flash(bundle_root)
    assert result.status == "failed"
    assert "the bundle was refused on the device; its current bundle stays" in result.detail
    assert "litert-int8.tflite: 3218 bytes" in result.detail
    assert board.version() == "1.2.3"


def test_a_failed_golden_check(board: Board, bundle_root: Path, edit_manifest: Callable[..., None]) -> None:
    board.install(bundle_root)
    edit_manifest(version="2.0.0", golden_tolerance=0.0)
    [result] = board.flash(bundle_root)
    assert result.status == "failed"
    assert "the golden check failed on the device; its current bundle stays" in result.detail
    assert board.version() == "1.2.3"
    assert not (board.root / "opt/eyas/.flashing").exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda root: edit(root, labels=["stripes", "disc", "cross"]), "not what the golden images were packed with"),
        (lambda root: rewrite(root, REFERENCE, lambda a: a["scale"].fill(-1.0)), "reference.npz: malformed"),
    ],
)
def test_an_edited_manifest_and_a_malformed_reference(
    spoil: Callable[[Path], object], reason: str, board: Board, bundle_root: Path, pristine_bundle: Path
) -> None:
    board.install(pristine_bundle)
    spoil(edit(bundle_root, version="2.0.0"))
    [result] = board.flash(bundle_root)
    assert result.status == "failed"
    assert reason in result.detail and "its current bundle stays" in result.detail
    assert board.version() == "1.2.3"


def test_another_bundle_of_the_same_version_is_named(board: Board, bundle_root: Path, pristine_bundle: Path) -> None:
    board.install(pristine_bundle)
    edit(bundle_root, notices=["Trained again."])
    [result] = board.flash(bundle_root)
    assert result.status == "flashed"
    assert any("notice: slot a had another tiny-shapes 1.2.3" in line for line in board.lines)


def test_a_dry_run_changes_nothing(board: Board, bundle_root: Path) -> None:
    [result] = board.flash(bundle_root, dry_run=True)
    assert result.status == "planned"
    assert "send tiny-shapes 1.2.3" in result.detail
    assert list(board.root.iterdir()) == []
    board.install(bundle_root)
    before = board.tree()
    [result] = board.flash(bundle_root, dry_run=True)
    assert "nothing to do" in result.detail
    assert board.tree() == before


def test_two_devices_of_which_one_is_unreachable(board: Board, bundle_root: Path) -> None:
    dead = f"{getpass.getuser()}@127.0.0.1:{free_port()}"
    results = board.flash(bundle_root, dead, board.name)
    assert [result.status for result in results] == ["failed", "flashed"]
    assert "Connection refused" in results[0].detail
    assert "check that its SSH server runs" in results[0].detail
    assert board.version() == "1.2.3"


def test_a_wrong_key_and_an_unknown_host(board: Board, bundle_root: Path) -> None:
    wrong = msgspec.structs.replace(board.access, identity=board.folder / "other_key")
    [result] = board.flash(bundle_root, access=wrong)
    assert result.status == "failed"
    assert "Permission denied" in result.detail
    assert "ssh-copy-id" in result.detail
    unknown = msgspec.structs.replace(board.access, options=("UserKnownHostsFile=/dev/null", "IdentityAgent=none"))
    [result] = board.flash(bundle_root, access=unknown)
    assert "Host key verification failed" in result.detail
    assert "\n" not in result.detail


def test_no_space_and_a_clock_in_1970(board: Board, bundle_root: Path) -> None:
    board.tool("df", "#!/bin/sh\necho Filesystem 1024-blocks Used Available\necho /dev/x 1000 990 10\n")
    board.tool("date", "#!/bin/sh\necho 300\n")
    [result] = board.flash(bundle_root)
    assert result.status == "failed"
    assert "var/lib/eyas: 0 MB free" in result.detail
    assert "free some space" in result.detail
    (board.tools / "df").unlink()
    [result] = board.flash(bundle_root)
    assert result.ok
    assert any("its clock is" in line and "behind" in line for line in board.lines)


def test_no_agent_on_the_device(board: Board, bundle_root: Path) -> None:
    board.tool("python3", '#!/bin/sh\nexec env -u PYTHONPATH /usr/bin/python3 -S "$@"\n')
    [result] = board.flash(bundle_root, python=str(board.tools / "python3"))
    assert result.status == "failed"
    assert "No module named" in result.detail


def test_the_configuration_is_kept_without_config(board: Board, bundle_root: Path, tmp_path: Path) -> None:
    board.install(bundle_root)
    installed = board.root / "etc/eyas/device.toml"
    assert not installed.exists()
    config = tmp_path / "my device.toml"
    config.write_text('[camera]\nsource = "v4l2:0"\n')
    [result] = board.flash(bundle_root, config=config)
    assert result.detail.endswith("new: configuration")
    assert installed.read_text() == config.read_text()
    installed.write_text("# changed on site\n")
    assert board.flash(bundle_root)[0].status == "unchanged"
    assert installed.read_text() == "# changed on site\n"
    config.write_text("[camera]\nsauce = 1\n")
    with pytest.raises(ConfigError, match="sauce"):
        board.flash(bundle_root, config=config)


def test_the_service_is_installed_and_started(
    board: Board, bundle_root: Path, service: dict[str, object], tmp_path: Path
) -> None:
    [result] = board.flash(bundle_root, **service)
    assert result.detail.endswith("new: model, configuration, service"), result
    log = (tmp_path / "systemctl.log").read_text().splitlines()
    order = [line for line in log if line.split()[0] in ("daemon-reload", "enable", "restart")]
    assert order == [
        "enable --quiet eyas-device eyas-device-update",
        "restart eyas-device",
        "restart --no-block eyas-device-update",
    ]
    updater = board.root / "etc/systemd/system/eyas-device-update.service"
    assert updater.read_bytes() == UPDATER.read_bytes()
    assert (board.root / "etc/systemd/system/eyas-device.service").read_text() == (tmp_path / "unit").read_text()
    assert (board.root / "etc/udev/rules.d/70-eyas-camera.rules").read_bytes() == RULES.read_bytes()
    [again] = board.flash(bundle_root, **service)
    assert again.status == "unchanged"
    assert (tmp_path / "systemctl.log").read_text().splitlines().count("restart eyas-device") == 1
    (board.root / "opt/eyas/.flashing").touch()  # as a flash that was interrupted before the restart leaves it
    [unfinished] = board.flash(bundle_root, **service)
    assert unfinished.detail.endswith("new: the rest of an interrupted flash")
    assert (tmp_path / "systemctl.log").read_text().splitlines().count("restart eyas-device") == 2


def test_units_that_exchange_the_agent_come_where_they_are_asked_for_or_are(
    board: Board, bundle_root: Path, tmp_path: Path
) -> None:
    (board.root / "etc/eyas").mkdir(parents=True)
    layout, there = Layout(str(board.root)), board.root / "etc/eyas/device.toml"
    plan = InstallPlan(
        bundle=bundle_root, model="", manifest_sha256="", bundle_bytes=0, layout=layout, unit=UPDATER, wheel=UPDATER
    )
    plan = msgspec.structs.replace(plan, service=True)

    def exchanges(changed: InstallPlan = plan) -> bool:
        with Remote(Target.parse(board.name), board.access) as remote:
            return changed.exchanges_agent(inspect_device(remote, layout))

    for text, asked in (
        ("[camera]\nsource = 'fake:'\n", False),
        ("[model]\nagent = true\n[update]\nhours = ''\n", False),
        ("[update]\nurl = 'http://h/'\n agent = true # as the team wants it\n[model]\n", True),
        ("[update]\n#agent = true\n", False),
        ("[update]\nurl = 'http://h/'\n[model]\nagent = true\n", False),
    ):
        there.write_text(text)
        assert exchanges() == asked, text
    (brought := tmp_path / "brought.toml").write_text("[update]\nagent = true\n")
    assert exchanges(msgspec.structs.replace(plan, config=brought)), "what is brought counts, not what is there"
    assert not exchanges(msgspec.structs.replace(plan, config=brought, wheel=None)), "it is no environment of a flash"
    assert not exchanges(msgspec.structs.replace(plan, config=brought, service=False))
    for path in layout.agent_units:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("an older one")
    assert exchanges(), "root has installed them once: they are kept as they are here"
    with pytest.raises(FleetError, match=r"\[update\] agent: --python's environment cannot be exchanged"):
        brought.write_text("[camera]\nsource = 'fake:'\n[update]\nagent = true\n")
        board.flash(bundle_root, config=brought)


def test_further_cameras_on_the_device_restart_on_a_new_environment(
    board: Board, bundle_root: Path, service: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first one is healthy; without a new environment they go on undisturbed."""
    log = tmp_path / "systemctl.log"
    board.flash(bundle_root, **service)
    assert "try-restart" not in log.read_text()
    monkeypatch.setattr(Installer, "see_unchanged", lambda installer: None)
    monkeypatch.setattr(Installer, "use_environment", lambda installer: True)
    [result] = board.flash(bundle_root, **service)
    assert result.detail.endswith("new: environment"), result
    commands = log.read_text().splitlines()
    restart = commands.index("try-restart eyas-device@*.service")
    assert "restart eyas-device" in commands[:restart]
    assert commands[restart - 1].startswith(("show", "is-active")), "before the first one was seen to stay up"


def test_a_service_that_does_not_start_is_rolled_back(
    board: Board,
    bundle_root: Path,
    edit_manifest: Callable[..., None],
    service: dict[str, object],
    tmp_path: Path,
) -> None:
    board.install(bundle_root)
    (board.root / "etc/eyas").mkdir(parents=True)
    (board.root / "etc/eyas/device.toml").write_text(device_toml(board))
    edit_manifest(version="2.0.0")
    (tmp_path / "systemctl.log.broken").write_text("b")
    (tmp_path / "device.toml").write_text(device_toml(board, "[loop]\nfps = 5\n"))
    [result] = board.flash(bundle_root, **service)
    assert result.status == "rolled back"
    assert result.detail == "the service does not start: Job failed.; rolled back"
    assert board.version() == "1.2.3"
    assert (board.root / "etc/eyas/device.toml").read_text() == device_toml(board)
    record = read_agent(board.state)
    assert record is not None and record.model == "tiny-shapes 1.2.3", "the service is down"


def test_a_service_that_runs_another_model_than_the_one_that_was_sent_is_rolled_back(
    board: Board,
    bundle_root: Path,
    edit_manifest: Callable[..., None],
    service: dict[str, object],
    tmp_path: Path,
) -> None:
    """The bundle passes its check during the installation, and no more when the service loads it."""
    [first] = board.flash(bundle_root, **service)
    assert first.ok, first
    edit_manifest(version="2.0.0")
    unit = board.tools / "systemctl"
    fails = """
import sys
from eyas_device.updates import golden
real = golden.compare_to_golden
def compare(classifier, data):
    if classifier.bundle.manifest.version == "2.0.0":
        raise RuntimeError("a delegate failed")
    return real(classifier, data)
golden.compare_to_golden = compare
from eyas_device.cli import main
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "fails.py").write_text(fails)
    unit.write_text(unit.read_text().replace("-m eyas_device", shlex.quote(str(tmp_path / "fails.py"))))
    [result] = board.flash(bundle_root, **service)
    assert result.status == "rolled back", result
    assert "the service runs tiny-shapes 1.2.3 in place of tiny-shapes 2.0.0: " in result.detail
    assert "RuntimeError: a delegate failed; rolled back" in result.detail
    assert board.version() == "1.2.3"


@pytest.fixture
def in_use(
    board: Board, bundle_root: Path, edit_manifest: Callable[..., None], service: dict[str, object], tmp_path: Path
) -> dict[str, object]:
    """Settings of a flash of version 2.0.0 with another configuration, to a device with 1.2.3 and a configuration."""
    board.install(bundle_root)
    (board.root / "etc/eyas").mkdir(parents=True)
    (board.root / "etc/eyas/device.toml").write_text(device_toml(board))
    edit_manifest(version="2.0.0")
    (tmp_path / "device.toml").write_text(device_toml(board, "[loop]\nfps = 5\n"))
    return service


def interrupt(board: Board, bundle: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A flash whose workstation loses its power before the device's service restarts: nothing cleans up."""

    def die(*arguments: object, **options: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Installer, "health_problem", die)
        patch.setattr(Installer, "clean_up", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            board.flash(bundle, **options)
    assert board.version() == "2.0.0" and "fps = 5" in (board.root / "etc/eyas/device.toml").read_text()


@pytest.mark.parametrize("third", ["the same", "without a configuration", "another configuration", "another model"])
def test_a_failure_after_an_interrupted_flash_restores_what_was_known_to_work(
    board: Board,
    bundle_root: Path,
    edit_manifest: Callable[..., None],
    in_use: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    third: str,
) -> None:
    interrupt(board, bundle_root, in_use, monkeypatch)
    (tmp_path / "systemctl.log.broken").write_text("b")
    if third == "without a configuration":
        in_use = {**in_use, "config": None}
    elif third == "another configuration":
        (tmp_path / "device.toml").write_text(device_toml(board, "[loop]\nfps = 7\n"))
    elif third == "another model":
        edit_manifest(version="3.0.0")
    [result] = board.flash(bundle_root, **in_use)
    assert (result.status, result.detail) == ("rolled back", "the service does not start: Job failed.; rolled back")
    assert board.version() == "1.2.3"
    assert (board.root / "etc/eyas/device.toml").read_text() == device_toml(board)
    record = read_agent(board.state)
    assert record is not None and record.model == "tiny-shapes 1.2.3"
    assert not list((board.root / "opt/eyas").iterdir()), "nothing is left of a flash that was rolled back"


def test_an_interrupted_flash_can_be_completed(
    board: Board, bundle_root: Path, in_use: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(board, bundle_root, in_use, monkeypatch)
    [result] = board.flash(bundle_root, **in_use)
    assert result.status == "flashed" and board.version() == "2.0.0"
    assert not list((board.root / "opt/eyas").iterdir())


@pytest.mark.parametrize(
    ("tool", "fault", "failed"),
    [
        ("cp", '*"/.before/device.toml "*', "the configuration"),
        ("rm", '*"/eyas-device.service"', "the service's unit"),
    ],
)
def test_a_failed_roll_back_leaves_what_the_device_had_and_says_where(
    board: Board,
    bundle_root: Path,
    in_use: dict[str, object],
    tmp_path: Path,
    tool: str,
    fault: str,
    failed: str,
) -> None:
    """Each part is restored all the same, and the next flash can still go back."""
    board.tool(tool, f'#!/bin/sh\ncase "$*" in {fault}) echo broken >&2; exit 1 ;; esac\nexec /bin/{tool} "$@"\n')
    (tmp_path / "systemctl.log.broken").write_text("b")
    [result] = board.flash(bundle_root, **in_use)
    installed, kept = board.root / "etc/eyas/device.toml", board.root / "opt/eyas/.before/device.toml"
    assert result.status == "failed" and f"could not be rolled back: {failed} (broken)" in result.detail
    assert f"the earlier {installed} are in {kept.parent} on the device" in result.detail
    assert kept.read_text() == device_toml(board)
    assert ("fps = 5" in installed.read_text()) == (tool == "cp")
    assert board.version() == "1.2.3"
    (board.tools / tool).unlink()
    [again] = board.flash(bundle_root, **in_use)
    assert again.status == "rolled back", again.detail
    assert board.version() == "1.2.3" and installed.read_text() == device_toml(board)
    assert not kept.parent.exists()


def test_the_check_on_the_device_uses_its_own_settings(
    board: Board, bundle_root: Path, service: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "device.toml").write_text(device_toml(board, "[model]\nmax_latency_ms = 0.000001\n"))
    [result] = board.flash(bundle_root, **service)
    assert result.status == "failed"
    assert "ms are allowed (model.max_latency_ms)" in result.detail
    assert board.version() is None


def test_a_first_service_that_does_not_start_fails(
    board: Board, bundle_root: Path, service: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "systemctl.log.broken").write_text("a")
    [result] = board.flash(bundle_root, **service)
    assert result.status == "failed"
    assert result.detail.endswith("nothing to roll back to")
    (tmp_path / "systemctl.log.broken").unlink()
    assert board.flash(bundle_root, **service)[0].ok


def test_a_service_needs_a_configuration(board: Board, bundle_root: Path, service: dict[str, object]) -> None:
    [result] = board.flash(bundle_root, **{**service, "config": None})
    assert "install one with --config FILE" in result.detail
    assert board.version() is None


@pytest.mark.usefixtures("index")
def test_an_environment_for_an_offline_device(
    board: Board, bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    """End to end with a real environment: wheels downloaded here, nothing downloaded on the device."""
    options: dict[str, object] = {"python": None, "offline": True}
    [first] = board.flash(bundle_root, **options)
    assert first.status == "flashed", (first, board.lines)
    assert first.detail.endswith("new: model, environment")
    link = board.root / "opt/eyas/venv"
    assert (link / "eyas.stamp").is_file()
    assert board.flash(bundle_root, **options)[0].status == "unchanged"
    environment = link.resolve()
    (environment / "eyas.stamp").unlink()  # as an interrupted installation leaves it
    edit_manifest(version="2.0.0")
    [planned] = board.flash(bundle_root, dry_run=True, **options)
    assert "make " in planned.detail
    assert environment.name in planned.detail


def test_the_verb(board: Board, bundle_root: Path) -> None:
    app = typer.Typer()
    app.command()(devices.flash)
    options = [word for option in board.access.options for word in ("--ssh-option", option)]
    words = ["--bundle", str(bundle_root), "--python", sys.executable, "--root", str(board.root)]
    words += ["--identity", str(board.key), *options]
    done = CliRunner().invoke(app, [board.name, *words])
    assert done.exit_code == 0, done.output
    assert f"{board.name}: flashed: tiny-shapes 1.2.3 in slot a" in done.output
    dead = f"127.0.0.1:{free_port()}"
    done = CliRunner().invoke(app, [dead, *words])
    assert done.exit_code == 1
    assert f"{dead}: failed: cannot be reached" in done.output


def test_bench_fetches_the_result(board: Board, bundle_root: Path, tmp_path: Path) -> None:
    result = '{"board": {"model": "Raspberry Pi 5 Model B Rev 1.0"}, "results": []}'
    board.tool("agent", f"""#!/bin/sh\necho "$*" >> "{board.root}/asked"\necho '{result}'\n""")
    agent = str(board.tools / "agent")
    settings = BenchSettings(root=str(board.root), python=agent)
    out = bench(board.name, bundle_root, tmp_path / "results", settings, access=board.access)
    assert out == tmp_path / "results/raspberry-pi-5-model-b-rev-1-0.json"
    assert msgspec.json.decode(out.read_bytes())["results"] == []
    asked = (board.root / "asked").read_text().splitlines()[-1]
    assert asked.startswith("-m eyas_device bench --bundle ")
    assert asked.endswith("--json -")
    with pytest.raises(FleetError, match="flash it first"):
        bench(board.name, None, tmp_path, BenchSettings(root=str(board.root)), access=board.access)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"board": "///"}', "nothing", "[" * 100_000])
def test_output_without_a_board(text: str) -> None:
    with pytest.raises(FleetError):
        board_name(text, "here")


def test_a_result_shows_no_credentials(bundle_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent of yesterday quotes its camera's address as it is."""

    def refuse(target: Target, access: SshAccess) -> Remote:
        raise FleetError("camera rtsp://admin:S3cret@10.0.0.7/live: the host does not respond")

    monkeypatch.setattr("eyas_host.fleet.deploy.flash.Remote", refuse)
    monkeypatch.setattr("eyas_host.fleet.deploy.flash.build_wheel", lambda folder, wheels: folder / "x.whl")
    [result] = flash(["pi@camera-7"], bundle_root, FlashSettings(), say=lambda line: None)
    assert (result.status, "S3cret" in result.detail) == ("failed", False)
    assert "rtsp://***@10.0.0.7/live: the host does not respond" in result.detail
