"""Board and sensors: four machines written from the kernel's documentation (see boards/README.md), and this one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eyas_device.board import (
    Board,
    Throttle,
    Vitals,
    board_kind,
    decode_throttled,
    read_board,
    read_memory,
    read_power,
    read_pressure,
    read_system,
    read_vitals,
)
from eyas_device.board.power import decode_pmic
from eyas_device.support.processes import run_command
from tests.support.paths import BOARDS

NAMES = ("pi4", "pi5", "orin-nano", "x86")


class Recording(NamedTuple):
    """A board: a tree of files, and what its commands print."""

    root: Path
    run: Callable[[Sequence[str], float], str | None]


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[str], Recording]:
    """Write a board's files as a tree."""

    def write(name: str) -> Recording:
        tree = msgspec.toml.decode((BOARDS / f"{name}.toml").read_bytes(), type=dict[str, dict[str, str]])
        assert len(tree["files"]) > 10
        for path, text in tree["files"].items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(text.encode())
        return Recording(tmp_path, lambda command, _: tree.get("commands", {}).get(" ".join(command)))

    return write


def test_pi4(recorded: Callable[[str], Recording]) -> None:
    root, run = recorded("pi4")
    assert read_board(root) == Board(
        model="Raspberry Pi 4 Model B Rev 1.4",
        soc="brcm,bcm2711",
        processor="Cortex-A72",
        cores=4,
        memory_mb=3979.9,
        max_frequency_mhz=1800.0,
    )
    system = read_system(root)
    assert (system.name, system.kernel) == ("Debian GNU/Linux 12 (bookworm)", "6.6.51+rpt-rpi-v8")
    vitals = read_vitals(root, run=run)
    assert vitals.temperature_c == 80.83 and vitals.temperatures_c == {"cpu-thermal": 80.83}
    assert vitals.frequencies_mhz == (1500.0, 1500.0, 600.0, 1500.0) and vitals.frequency_mhz == 1275.0
    assert vitals.governor == "ondemand"
    assert vitals.throttle == Throttle(("under-voltage", "throttled"), ("under-voltage", "throttled"))
    assert vitals.throttled == ("under-voltage", "throttled")
    assert read_power(root, run=run) is None  # no sensor, and no such command
    assert read_pressure(root) is None


def test_pi5(recorded: Callable[[str], Recording]) -> None:
    root, run = recorded("pi5")
    board = read_board(root)
    assert (board.model, board.soc, board.processor) == ("Raspberry Pi 5 Model B Rev 1.0", "brcm,bcm2712", "Cortex-A76")
    vitals = read_vitals(root, run=run)
    assert vitals.temperature_c == 62.35  # the processor's, not the fan controller's
    assert vitals.throttle == Throttle((), ("frequency capped", "throttled", "soft temperature limit"))
    assert vitals.throttled == ()
    power = read_power(root, run=run)
    assert power is not None
    assert power.rails_w["VDD_CORE"] == pytest.approx(3.016 * 0.893756, abs=1e-4)
    assert power.watts == pytest.approx(sum(power.rails_w.values()), abs=1e-3) and 3.5 < power.watts < 4.5
    assert "EXT5V" not in power.rails_w  # a voltage without a current
    assert "5 V rail" in power.note


def test_orin(recorded: Callable[[str], Recording]) -> None:
    root, run = recorded("orin-nano")
    board = read_board(root)
    assert board.model.startswith("NVIDIA Jetson Orin Nano")
    assert (board.soc, board.processor, board.cores) == ("nvidia,tegra234", "Cortex-A78AE", 6)
    vitals = read_vitals(root, run=run)
    assert vitals.temperature_c == 49.59
    assert list(vitals.temperatures_c) == ["cpu-thermal", "gpu-thermal", "soc0-thermal", "tj-thermal"]
    assert vitals.throttle is None and vitals.throttled == ()
    power = read_power(root, run=run)
    assert power is not None
    assert power.watts == pytest.approx(5.056 * 2.048, abs=1e-3)  # the module alone, not the rails that it feeds
    assert set(power.rails_w) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    pressure = read_pressure(root)
    assert pressure is not None and (pressure.avg10, pressure.total_us) == (1.25, 90210455)


def test_x86(recorded: Callable[[str], Recording]) -> None:
    root, run = recorded("x86")
    board = read_board(root)
    assert board.model == "Intel(R) Client Systems NUC11TNHi5"
    assert board.processor == "11th Gen Intel(R) Core(TM) i5-1135G7 @ 2.40GHz"
    vitals = read_vitals(root, run=run)
    assert vitals.temperature_c == 53.0  # the package, not the case
    assert vitals.governor == "powersave" and vitals.throttle is None
    assert read_power(root, run=run) is None


@pytest.mark.parametrize(("board", "kind"), [("pi4", "pi4"), ("pi5", "pi5"), ("orin-nano", "jetson")])
def test_the_kind_of_a_board(board: str, kind: str, recorded: Callable[[str], Recording]) -> None:
    assert board_kind(recorded(board)[0]) == kind


def test_the_kind_of_any_other_board_is_its_architecture(
    recorded: Callable[[str], Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert board_kind(recorded("x86")[0]) == "x86"
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert board_kind(recorded("x86")[0]) == "riscv64"


def test_a_placeholder_is_not_a_name(recorded: Callable[[str], Recording]) -> None:
    root, _ = recorded("x86")
    (root / "sys/devices/virtual/dmi/id/product_name").write_text("To Be Filled By O.E.M.\n")
    assert read_board(root).model == "11th Gen Intel(R) Core(TM) i5-1135G7 @ 2.40GHz"


def test_other_power_chips(tmp_path: Path) -> None:
    chip = tmp_path / "sys/class/hwmon/hwmon3"
    chip.mkdir(parents=True)
    (chip / "name").write_text("ina226\n")
    (chip / "power1_input").write_text("4250000\n")
    power = read_power(tmp_path, run=lambda command, timeout_s: None)
    assert power is not None and power.watts == 4.25 and power.rails_w == {"ina226 power1": 4.25}


def test_missing_files_are_not_measured(tmp_path: Path) -> None:
    """A machine without any file, and whose commands would hang."""

    def never(command: Sequence[str], timeout_s: float) -> str | None:
        raise AssertionError(f"{command} has no business on this machine")

    assert read_vitals(tmp_path, run=never) == Vitals()
    assert read_power(tmp_path, run=never) is None and read_pressure(tmp_path) is None
    assert read_memory(root=tmp_path) is None
    assert read_board(tmp_path).model


_HOSTILE = (
    b"",
    b"\0",
    b"nan",
    b"inf\n",
    b"-1e999",
    b"99999999999999999999",
    b"12 34",
    b"\xff\xfe\x00",
    b"0x1p3",
    b"processor\t: \nCPU part\t: 0xzz\nModel\t:\n",
    b"some avg10=x avg60=0 avg300=0 total=-1",
    "٣٤".encode(),
)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_malformed_files_are_not_measured(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    name = data.draw(st.sampled_from(NAMES))
    tree = msgspec.toml.decode((BOARDS / f"{name}.toml").read_bytes(), type=dict[str, dict[str, str]])
    root = tmp_path_factory.mktemp("board")
    for path, text in tree["files"].items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        kind = data.draw(st.sampled_from(("as it is", "hostile", "folder", "missing")))
        if kind == "folder":
            file.mkdir()
        elif kind != "missing":
            hostile = st.one_of(st.sampled_from(_HOSTILE), st.binary(max_size=40))
            file.write_bytes(text.encode() if kind == "as it is" else data.draw(hostile))
    output = data.draw(st.one_of(st.none(), st.text(max_size=80), st.just("VDD_A current(0)=1e9A VDD_V volt(0)=..V")))
    vitals, power = read_vitals(root, run=lambda *_: output), read_power(root, run=lambda *_: output)
    assert vitals.temperature_c is None or -60 <= vitals.temperature_c <= 150
    assert all(1 <= mhz <= 20_000 for mhz in vitals.frequencies_mhz or ())
    assert power is None or 0 <= power.watts < 1e5
    pressure = read_pressure(root)
    assert pressure is None or pressure.total_us >= 0
    assert read_system(root).bits in (32, 64)
    board = read_board(root)
    assert board.model.isprintable() and board.cores >= 1


def test_a_pipe_in_place_of_a_sensor_does_not_block(recorded: Callable[[str], Recording]) -> None:
    root, run = recorded("pi4")
    sensor = root / "sys/class/thermal/thermal_zone0/temp"
    sensor.unlink()
    os.mkfifo(sensor)
    started = time.monotonic()
    assert read_vitals(root, run=run).temperature_c is None
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("output", "now", "since"),
    [
        ("throttled=0x0", (), ()),
        ("throttled=0xf000f\n", 4, 4),
        ("80008", ("soft temperature limit",), ("soft temperature limit",)),
        ("throttled=0x20002", ("frequency capped",), ("frequency capped",)),
    ],
)
def test_throttle_bits(output: str, now: object, since: object) -> None:
    throttle = decode_throttled(output)
    assert throttle is not None
    for expected, found in ((now, throttle.now), (since, throttle.since_boot)):
        assert len(found) == expected if isinstance(expected, int) else found == expected


@pytest.mark.parametrize("output", [None, "", "throttled=", "throttled=0xzz", "VCHI initialization failed", "1 2"])
def test_malformed_throttle_bits(output: str | None) -> None:
    assert decode_throttled(output) is None


def test_malformed_power_readings() -> None:
    assert decode_pmic(None) is None
    assert decode_pmic("Command not registered") is None
    assert decode_pmic("EXT5V_V volt(24)=5.13880000V") is None
    assert decode_pmic("3V3_SYS_A current(1)=0.04098700A") is None


def test_this_machine() -> None:
    board, system, memory = read_board(), read_system(), read_memory()
    assert board.cores >= 1 and board.model and system.bits in (32, 64)
    assert memory is not None and 5 < memory.rss_mb <= memory.peak_rss_mb


def test_commands_have_a_time_limit() -> None:
    assert run_command(("echo", "well"), 10.0) == "well\n"
    assert run_command(("false",), 10.0) is None
    assert run_command(("/no/such/command",), 10.0) is None
    started = time.monotonic()
    assert run_command(("sleep", "60"), 0.2) is None
    assert time.monotonic() - started < 20
