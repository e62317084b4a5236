"""Which model runs: the seams between installation, agent, signals and commands, with real bundles and processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from eyas_device.agent import active as active_module
from eyas_device.agent.app import Agent
from eyas_device.agent.probation import HEALTHY_FRAMES, HEALTHY_S, Probation
from eyas_device.bundle import MANIFEST
from eyas_device.cli import main as cli
from eyas_device.config import CameraSection, Config, DeviceSection, ModelSection
from eyas_device.errors import EXIT_CHECK_FAILED, EXIT_CONFIG, BundleError, CheckFailed, EyasError
from eyas_device.predict import Classifier
from eyas_device.runtimes.selection import SavedSelection, library_versions, write_selection
from eyas_device.updates import golden as golden_module
from eyas_device.updates import judge as judge_module
from eyas_device.updates.activate import attempt_key, open_model
from eyas_device.updates.judge import prove
from eyas_device.updates.records import MAX_ATTEMPTS, Lock, read_agent
from eyas_device.updates.slots import SlotError, Slots

LIVE = "fake:?live=1&fps=40&frames=1000000&size=64x48"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def make(pristine_bundle: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a bundle of LiteRT's artefacts alone, of another version and with other fields of the manifest."""

    def make(version: str, **fields: object) -> Path:
        target = tmp_path / f"bundle-{version}"
        shutil.copytree(pristine_bundle, target)
        manifest = msgspec.json.decode((target / MANIFEST).read_bytes())
        manifest["artefacts"] = [a for a in manifest["artefacts"] if a["runtime"] == "litert"]
        manifest |= {"version": version, "use": {"litert": "litert-int8"}, **fields}
        (target / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return target

    return make


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Versions whose models take 80 ms an image here."""
    versions: set[str] = set()
    real = golden_module.compare_to_golden

    def compare(classifier: Classifier, golden: object) -> golden_module.GoldenResult:
        result = real(classifier, golden)  # type: ignore[arg-type]
        known = classifier.bundle.manifest.version in versions
        return msgspec.structs.replace(result, latency_ms=80.0) if known else result

    monkeypatch.setattr(golden_module, "compare_to_golden", compare)
    return versions


def configured(state: Path, *, source: str = LIVE, **model: object) -> Config:
    return Config(
        device=DeviceSection(name="cam", state=str(state)),
        camera=CameraSection(source=source),
        model=msgspec.convert(model, ModelSection),
    )


def running(state: Path, config: Config) -> str:
    """The version that an agent would run."""
    with open_model(config, counted=True) as model:
        return model.classifier.bundle.manifest.version


# --- the same judgement everywhere -----------------------------------------------------------------------------------


def test_an_installation_asks_what_the_agent_asks(state: Path, make: Callable[..., Path], slow: set[str]) -> None:
    config, slots = configured(state, max_latency_ms=50.0), Slots(state)

    def check(root: Path) -> None:
        prove(root, config.model, state)

    slots.install(make("1.0.0"), check=check)
    slow.add("2.0.0")
    with pytest.raises(CheckFailed, match=r"80\.0 ms an image here; 50 ms are allowed"):
        slots.install(make("2.0.0"), check=check)
    assert running(state, config) == "1.0.0"
    (file := state / "device.toml").write_text(f'[device]\nstate = "{state}"\n[model]\nmax_latency_ms = 50.0\n')
    assert cli(["install", str(state.parent / "bundle-2.0.0"), "--config", str(file)]) == EXIT_CHECK_FAILED
    assert cli(["check", str(state.parent / "bundle-2.0.0"), "--config", str(file)]) == EXIT_CHECK_FAILED
    assert cli(["check", str(state.parent / "bundle-1.0.0"), "--config", str(file)]) == 0
    empty = slots.states()[1]
    assert (empty.good, empty.name) == (False, "") and "tiny-shapes 2.0.0: " in empty.refused
    assert "80.0 ms" in empty.refused


def test_the_slot_in_use_survives_every_later_update(state: Path, make: Callable[..., Path], slow: set[str]) -> None:
    config, slots = configured(state, max_latency_ms=50.0), Slots(state)
    slots.install(make("1.0.0"))
    slots.install(make("2.0.0"))
    slow.add("2.0.0")  # the board is slower than when it was installed
    with open_model(config, counted=True) as model:
        assert model.classifier.bundle.manifest.version == "1.0.0"
        assert model.record.refused_model == "tiny-shapes 2.0.0" and "80.0 ms" in model.record.refused_reason
        with pytest.raises(CheckFailed):
            slots.install(make("3.0.0", golden_tolerance=0.0))
        assert slots.inactive().name == "b"
    assert running(state, config) == "1.0.0", "an update that failed erased the slot that was in use"
    slots.install(make("4.0.0"))
    assert running(state, config) == "4.0.0"


def test_a_refused_slot_is_the_one_to_replace_also_while_no_agent_runs(
    state: Path, make: Callable[..., Path], slow: set[str]
) -> None:
    config, slots = configured(state, max_latency_ms=50.0), Slots(state)
    slots.install(make("1.0.0"))
    slots.install(make("2.0.0"))
    slow.add("2.0.0")
    assert running(state, config) == "1.0.0"
    states = slots.states()
    assert [s.good for s in states] == [True, False] and states[1].problem.startswith("refused: ")
    with pytest.raises(CheckFailed):
        slots.install(make("3.0.0", golden_tolerance=0.0))
    assert running(state, config) == "1.0.0"


def test_a_slot_that_is_run_is_not_written_to_and_one_that_is_written_is_not_run(
    state: Path, make: Callable[..., Path]
) -> None:
    slots = Slots(state)
    slots.install(make("1.0.0"))
    slots.install(make("2.0.0"))
    third = make("3.0.0")
    with slots.hold("a") or pytest.fail("free"), slots.hold("b") or pytest.fail("free"), pytest.raises(SlotError):
        slots.install(third)
    with Lock.acquire(slots.folder / ".b.lock") or pytest.fail("free"):
        assert running(state, configured(state)) == "1.0.0"
    assert running(state, configured(state)) == "2.0.0"


# --- exceptions, crashes, kills and hangs count alike ----------------------------------------------------------------


def test_any_exception_of_a_runtime_leads_to_the_other_slot(
    state: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = Slots(state)
    slots.install(make("1.0.0"))
    slots.install(make("2.0.0"))
    real = golden_module.compare_to_golden

    def fails(classifier: Classifier, golden: object) -> golden_module.GoldenResult:
        if classifier.bundle.manifest.version == "2.0.0":
            raise RuntimeError("tensorflow/lite: Node number 3 failed to invoke")
        return real(classifier, golden)  # type: ignore[arg-type]

    monkeypatch.setattr(golden_module, "compare_to_golden", fails)
    assert running(state, configured(state)) == "1.0.0"
    assert "RuntimeError: tensorflow/lite: Node number 3" in slots.states()[1].refused


_DIES = """
import os, signal, sys, time
from eyas_device.updates import golden
real = golden.compare_to_golden
def dies(classifier, data):
    if classifier.bundle.manifest.version == "2.0.0":
        if sys.argv[1] == "abort": os.abort()
        if sys.argv[1] == "kill": os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does without memory
        time.sleep(600)
    return real(classifier, data)
golden.compare_to_golden = dies
from eyas_device.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("how", ["abort", "kill", "hang"])
def test_a_model_that_ends_the_process_gives_way_after_three_attempts(
    how: str, state: Path, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = Slots(state)
    slots.install(make("1.0.0"))
    slots.install(make("2.0.0"))
    (config := tmp_path / "device.toml").write_text(
        f'[device]\nstate = "{state}"\n[camera]\nsource = "fake:?frames=3&size=64x48"\n'
    )
    attempts = slots.folder / "b.attempts"
    command = [sys.executable, "-c", _DIES, how, "run", "--config", str(config)]
    for _ in range(MAX_ATTEMPTS - 1):  # counted before the load: one real end shows what three leave behind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(judge_module, "check_loaded", _ends)
            with pytest.raises(SystemExit):
                open_model(configured(state), counted=True)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if how == "hang":
        deadline = time.monotonic() + 30
        while slots.attempts("b") < MAX_ATTEMPTS or '"runtime":"litert"' not in attempts.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()  # as systemd does when the start takes too long
    process.communicate(timeout=60)
    assert process.returncode < 0
    assert slots.attempts("b") == MAX_ATTEMPTS
    assert '"runtime":"litert"' in attempts.read_text(), "it is unknown what ended the process"
    if how != "abort":
        return  # what follows is the same
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny-shapes 1.0.0" in done.stderr
    assert "tiny-shapes 2.0.0 was refused: 3 attempts to run it ended before it was healthy" in done.stderr
    assert cli(["slots", "--state", str(state)]) == 0
    assert "3 attempts to run it ended" in capsys.readouterr().out
    slots.install(tmp_path / "bundle-2.0.0")  # the same again, on purpose
    assert slots.attempts("b") == 0 and slots.states()[1].good


def _ends(*_: object, **__: object) -> None:
    raise SystemExit


def test_two_slots_that_both_end_the_process_are_tried_in_turns(state: Path, make: Callable[..., Path]) -> None:
    slots = Slots(state)
    slots.install(make("1.0.0"))
    slots.install(make("2.0.0"))
    tried = []
    for _ in range(2 * MAX_ATTEMPTS + 4):
        tried.append(slots.candidates()[0])
        slots.count_attempt(tried[-1], "")
    assert "".join(tried).startswith("b" * MAX_ATTEMPTS + "a" * MAX_ATTEMPTS)
    assert set(tried[2 * MAX_ATTEMPTS :]) == {"a", "b"}, "one of them was given up for good"
    assert slots.candidates("other settings or libraries")[0] == "b", "a change is a reason to try again"


def test_a_runtime_that_ends_the_process_from_both_slots_gives_way_to_another(
    state: Path, pristine_bundle: Path, edit_manifest: Callable[..., None], bundle_root: Path
) -> None:
    """As after an upgrade of a library that crashes: no slot is better than the other, but another runtime is."""
    slots = Slots(state)
    slots.install(pristine_bundle, check=lambda root: None)
    edit_manifest(version="2.0.0")
    slots.install(bundle_root, check=lambda root: None)
    config, key = configured(state), attempt_key(configured(state))
    for expected in "bbbaaa":
        name = slots.candidates(key)[0]
        assert name == expected
        slots.count_attempt(name, key)
        slots.note_runtime(name, key, "litert")
    with open_model(config, counted=True) as model:
        assert model.record.slot == "b" and model.classifier.runtime.name != "litert"
        assert model.record.selection == "another runtime; litert ended the agent again and again"
        assert slots.attempts("b") == MAX_ATTEMPTS + 1
        slots.end_attempt("b", healthy=False)
    assert slots.attempts("b") == MAX_ATTEMPTS and slots.deadly_runtimes("b", key) == {"litert"}
    assert slots.deadly_runtimes("b", "another version of the library") == set()


def test_a_probation_ends_after_frames_or_after_time_in_the_dark_or_not_at_all(state: Path) -> None:
    now = [0.0]
    slots = Slots(state)
    slots.folder.mkdir()
    probation = Probation(slots, clock=lambda: now[0])
    slots.count_attempt("a", "")
    probation.begin("a")
    now[0] = HEALTHY_S - 1
    probation.on_tick()
    assert slots.attempts("a") == 1
    now[0] = HEALTHY_S
    probation.on_tick()
    assert slots.attempts("a") == 0, "the dark is no fault of the model"
    slots.count_attempt("a", "")
    probation.begin("a")
    for _ in range(HEALTHY_FRAMES):
        assert slots.attempts("a") == 1
        probation.on_prediction(None)  # type: ignore[arg-type]
    assert slots.attempts("a") == 0
    for _ in range(2):
        slots.count_attempt("a", "")
    probation.begin("a")
    probation.stopped()
    assert slots.attempts("a") == 1, "a stop on purpose takes back its own attempt only"


def test_a_stop_on_purpose_and_a_source_that_ends_do_not_count(state: Path, make: Callable[..., Path]) -> None:
    slots = Slots(state)
    slots.install(make("1.0.0"))
    for _ in range(MAX_ATTEMPTS + 1):
        with Agent(configured(state, source="fake:?frames=2&size=64x48")) as agent:
            agent.run()
    with pytest.raises(EyasError):
        Agent(configured(state, source="nonsense:"))
    assert slots.attempts("a") == 0


# --- which runtime ---------------------------------------------------------------------------------------------------


def saved(bundle: Path, **changes: object) -> SavedSelection:
    from eyas_device.bundle import sha256

    selection = SavedSelection(
        name="tiny-shapes",
        version="1.0.0",
        manifest_sha256=sha256(bundle / MANIFEST),
        runtime="litert",
        artefact="litert-fp32",
        threads=1,
        latency_ms=1.0,
        versions=library_versions(),
    )
    return msgspec.structs.replace(selection, **changes)


def test_a_selection_that_fails_gives_way_to_the_bundles_preference_and_that_is_said(
    state: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = make("1.0.0")
    Slots(state).install(bundle)
    write_selection(state, saved(bundle))
    with open_model(configured(state)) as model:
        assert model.record.artefact == "litert-fp32" and model.record.selection == "the saved selection"
    real = golden_module.compare_to_golden

    def fp32_differs(classifier: Classifier, golden: object) -> golden_module.GoldenResult:
        result = real(classifier, golden)  # type: ignore[arg-type]
        wrong = classifier.artefact.name == "litert-fp32"
        return msgspec.structs.replace(result, status="failed", note="a probability differs") if wrong else result

    monkeypatch.setattr(golden_module, "compare_to_golden", fp32_differs)
    with open_model(configured(state)) as model:
        assert model.record.artefact == "litert-int8"
        assert model.record.selection.startswith("the bundle's preference; litert-fp32 on litert was refused: ")
    with pytest.raises(CheckFailed):
        open_model(configured(state, artefact="litert-fp32"))


def test_another_runtime_is_the_last_resort(
    state: Path, pristine_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = golden_module.compare_to_golden

    def litert_breaks(classifier: Classifier, golden: object) -> golden_module.GoldenResult:
        if classifier.runtime.name == "litert":
            raise RuntimeError("a delegate failed")
        return real(classifier, golden)  # type: ignore[arg-type]

    monkeypatch.setattr(golden_module, "compare_to_golden", litert_breaks)
    with open_model(configured(state, bundle=str(pristine_bundle))) as model:
        assert model.classifier.runtime.name != "litert"
        assert model.record.selection.startswith("another runtime; litert-int8 on litert was refused: RuntimeError: ")


def test_a_selection_is_for_the_versions_that_it_was_measured_with(state: Path, make: Callable[..., Path]) -> None:
    bundle = make("1.0.0")
    Slots(state).install(bundle)
    write_selection(state, saved(bundle, versions={**library_versions(), "ai-edge-litert": "0.0.1"}))
    with open_model(configured(state)) as model:
        assert model.record.selection == "the bundle's preference"


# --- reloads ---------------------------------------------------------------------------------------------------------


def test_signals_during_a_reload_become_one_more_after_it(
    state: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, total = [0], [0], [0]

    def slowly(*args: object, **options: object) -> object:
        now[0] += 1
        total[0] += 1
        most[0] = max(most[0], now[0])
        time.sleep(0.3)
        opened = open_model(*args, **options)  # type: ignore[arg-type]
        now[0] -= 1
        return opened

    monkeypatch.setattr(active_module, "open_model", slowly)
    config = configured(state, bundle=str(make("1.0.0")))
    with Agent(config) as agent:

        def hang_up() -> None:
            for _ in range(6):
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(0.02)

        threading.Timer(0.3, hang_up).start()
        threading.Timer(2.0, agent.loop.stop).start()
        agent.run()
    assert most[0] == 1, "models were loaded side by side"
    assert 2 <= total[0] <= 3


class Running:
    """An agent in a process of its own."""

    def __init__(self, config: Path) -> None:
        command = [sys.executable, "-m", "eyas_device", "run", "--config", str(config)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def end(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=30)[0]


def test_a_reload_that_falls_back_is_said_by_log_slots_record_and_exit_code(
    state: Path, make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = Slots(state)
    slots.install(make("1.0.0"))
    text = f'[device]\nstate = "{state}"\n[camera]\nsource = "{LIVE}"\n'
    (config := tmp_path / "device.toml").write_text(text)
    reload = ["reload", "--config", str(config), "--timeout", "60"]
    with pytest.raises(EyasError, match="no agent runs"):
        cli_raises(reload)
    agent = Running(config)
    try:
        deadline = time.monotonic() + 30
        while not ((record := read_agent(state)) and record.model):
            assert time.monotonic() < deadline and agent.process.poll() is None
            time.sleep(0.05)
        slots.install(make("2.0.0"))
        assert cli_raises(reload) == 0
        assert "tiny-shapes 2.0.0: litert-int8 on litert" in capsys.readouterr().out
        assert [s.running for s in slots.states()] == [False, True]

        slots.install(make("3.0.0", golden_tolerance=0.0), check=lambda root: None)  # good where it was checked
        assert cli_raises(reload) == 1
        out = capsys.readouterr().out
        assert out.startswith("tiny-shapes 2.0.0: ") and "tiny-shapes 3.0.0 was refused: " in out
        cli_raises(["slots", "--state", str(state)])
        shown = capsys.readouterr().out
        assert "3.0.0        not good: refused: " in shown and "good, running" in shown
        assert "the agent runs tiny-shapes 2.0.0" in shown and "it refused tiny-shapes 3.0.0: " in shown

        config.write_text(text + '[model]\nartefact = "litert-fp32"\n')  # read again by a reload
        slots.roll_back()
        assert cli_raises(reload) == 0
        assert "tiny-shapes 2.0.0: litert-fp32 on litert" in capsys.readouterr().out
        config.write_text(text + "[model]\nsauce = 1\n")
        assert cli(reload) == EXIT_CONFIG
        assert cli_raises(["reload", "--state", str(state)]) == 1
        out = capsys.readouterr().out
        assert "tiny-shapes 2.0.0: litert-fp32" in out and "nothing changed: " in out and "sauce" in out
    finally:
        log = agent.end()
    assert "tiny-shapes 3.0.0 was refused: " in log and "the model stays as it is: " in log
    assert read_agent(state) is None and slots.attempts("b") == 0


def cli_raises(arguments: list[str]) -> int:
    """The exit code of a command, whose errors are raised."""
    import argparse
    import importlib

    verb = importlib.import_module(f"eyas_device.commands.{arguments[0]}")
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return int(verb.main(parser.parse_args(arguments[1:])))


def test_a_disk_that_takes_nothing_keeps_no_model_from_running(
    state: Path, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Slots(state).install(make("1.0.0"))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("eyas_device.updates.records.atomic_write", read_only)
    monkeypatch.setattr(Lock, "acquire", read_only)
    assert running(state, configured(state)) == "1.0.0"
    shutil.rmtree(state / "slots")
    with pytest.raises(BundleError, match="no good slot yet"):
        open_model(configured(state), counted=True)
