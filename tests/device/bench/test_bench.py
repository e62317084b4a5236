"""Benchmarks on the device: what is measured, what is written and read back, and what is chosen because of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from eyas_device.bench import compare, measure, result, show
from eyas_device.bench.blocks import BlockTimes
from eyas_device.bench.choose import fastest
from eyas_device.bench.result import Bench, BenchError, Quantiles, Result, quantiles
from eyas_device.bench.run import BenchOptions, bench
from eyas_device.bench.start import measure_starts
from eyas_device.board import NOT_MEASURED, Throttle
from eyas_device.bundle import MANIFEST, Bundle, sha256
from eyas_device.commands import bench as command
from eyas_device.errors import BundleError, CheckFailed, EyasError, RuntimeUnavailable
from eyas_device.runtimes import Selection as Pair
from eyas_device.runtimes import choose, load
from eyas_device.runtimes.selection import (
    SELECTION_FILE,
    Measured,
    SavedSelection,
    library_versions,
    manifest_sha256,
    read_selection,
    write_selection,
)
from tests.support import tiny
from tests.support.paths import BOARDS

BOARD = BOARDS / "pi4.toml"


def run(*arguments: object) -> int:
    """The verb, as the command line calls it."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args([str(argument) for argument in arguments]))


@pytest.fixture(scope="module")
def complete(pristine_bundle: Path) -> Bench:
    """One short burst of everything, for several tests."""
    return bench(BenchOptions(bundle=pristine_bundle, everything=True, seconds=0.5, starts=1))


def test_a_burst_measures_everything(complete: Bench, pristine_bundle: Path) -> None:
    names = [(r.runtime, r.artefact) for r in complete.results]
    assert {("litert", "litert-fp32"), ("litert", "litert-int8"), ("onnx", "onnx-fp32")} <= set(names)
    assert len(names) == len(set(names)) >= 4
    for found in complete.results:
        assert found.passed is True and found.note == "" and found.runtime_version
        assert found.model is not None and found.model.count >= 3
        assert found.model.p10 <= found.model.p50 <= found.model.p90 <= found.model.p99 <= found.model.max
        assert tuple(found.loop) == result.STAGES
        assert found.loop["decode"].p50 > 0 and found.loop["prepare"].p50 > 0
        parts = sum(found.loop[stage].p50 for stage in result.STAGES[:-1])
        assert parts == pytest.approx(found.loop["total"].p50, rel=0.5)
        assert found.frames_per_second is not None and found.model_per_second is not None
        assert found.start is not None and found.start.runs == 1
        assert found.start.to_first_ms >= found.start.import_ms + found.start.load_ms
        assert found.start.rss_mb is not None and found.start.peak_rss_mb is not None
        assert 20 < found.start.rss_mb <= found.start.peak_rss_mb + 1
    asked = complete.settings
    assert (asked.bundle, asked.bundle_version, asked.threads, asked.mode) == ("tiny-shapes", "1.2.3", 1, "burst")
    assert asked.manifest_sha256 == sha256(pristine_bundle / MANIFEST) and asked.frame == "64x48"
    assert complete.versions["numpy"] == np.__version__
    assert any("tflite" in note or "onnx-cuda" in note for note in complete.notes) or len(names) > 4


def test_the_report_names_what_was_not_measured(complete: Bench) -> None:
    text = "\n".join(
        show.report_lines(replace(complete, power=None, results=(replace(complete.results[0], start=None),)))
    )
    assert f"power: {NOT_MEASURED}" in text
    assert text.count(NOT_MEASURED) >= 7
    whole = "\n".join(show.report_lines(complete))
    assert "litert: int8 is" in whole and "the spread" in whole
    assert "postprocess" in whole and all(r.artefact in whole for r in complete.results)


def test_candidates_are_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round has a turn of each candidate, and the first call of a turn is not recorded."""
    clock = count(step=0.01)  # every reading of the clock takes a hundredth of a second
    monkeypatch.setattr(measure, "perf_counter", lambda: next(clock))
    calls: list[tuple[str, str, bool]] = []

    class Stub:
        def __init__(self, name: str) -> None:
            self.name = name

        def time_model(self, pixels: object, *, record: bool) -> None:
            calls.append((self.name, "model", record))

        def time_frame(self, frame: object, *, record: bool) -> float:
            calls.append((self.name, "loop", record))
            return 1.0

    stubs: list[Any] = [Stub("a"), Stub("b")]
    image: Any = np.zeros((4, 4, 3), dtype=np.uint8)
    progress: list[float] = []
    measure.burst(stubs, image, [image], seconds=3.0, progress=progress.append)
    turns = [calls[0]] + [call for before, call in pairwise(calls) if call[:2] != before[:2]]
    assert len(turns) >= 8
    expected = [("a", "model"), ("a", "loop"), ("b", "model"), ("b", "loop")]
    assert [turn[:2] for turn in turns] == (expected * len(turns))[: len(turns)]
    assert not any(record for _, _, record in turns) and any(record for _, _, record in calls)
    assert progress[-1] == 1.0 and progress == sorted(progress)


def test_frames_of_a_camera(pristine_bundle: Path) -> None:
    spec = "fake:?frames=6&size=320x240&junk=1,2"
    found = bench(BenchOptions(bundle=pristine_bundle, camera=spec, seconds=0.2, starts=0, runtime="litert"))
    assert (found.settings.camera, found.settings.frame) == (spec, "320x240")
    assert len(found.results) == 1 and found.results[0].start is None
    with pytest.raises(BenchError, match="no frame that can be decoded"):
        bench(BenchOptions(bundle=pristine_bundle, camera="fake:?frames=1&junk=0", seconds=0.2, starts=0))


def test_sustained(pristine_bundle: Path, tmp_path: Path) -> None:
    tree = msgspec.toml.decode(BOARD.read_bytes(), type=dict[str, dict[str, str]])
    for path, text in tree["files"].items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(text.encode())
    intervals: list[result.Interval] = []
    options = BenchOptions(bundle=pristine_bundle, seconds=1.2, starts=0, sustained=True, interval_s=0.4)
    found = bench(options, root=tmp_path, run=lambda command, timeout_s: None, on_interval=intervals.append)
    sustained = found.sustained
    assert sustained is not None and tuple(intervals) == sustained.intervals and 2 <= len(intervals) <= 4
    for interval in intervals:
        assert interval.frames >= 1 and interval.p50 <= interval.p90 <= interval.p99
        assert interval.temperature_c == 80.83 and interval.frequency_mhz == 1275.0
        assert interval.throttled == ("under-voltage", "throttled") and interval.watts is None
    first, last = intervals[0].frames_per_second, intervals[-1].frames_per_second
    assert sustained.drop == pytest.approx(1 - last / first, abs=1e-3)
    assert found.board.model == "Raspberry Pi 4 Model B Rev 1.4"
    assert found.before.throttle == Throttle(("under-voltage", "throttled"), ("under-voltage", "throttled"))
    assert "under-voltage" in show.interval_line(intervals[0]) and NOT_MEASURED in show.interval_line(intervals[0])
    assert "drop from first to last" in "\n".join(show.report_lines(found))
    with pytest.raises(BenchError, match="one artefact"):
        bench(dataclasses.replace(options, everything=True))


def test_a_process_that_fails_has_no_start(pristine_bundle: Path) -> None:
    bundle = Bundle.open(pristine_bundle)
    good = choose(bundle, "litert")
    bad = Pair("litert", replace(good.artefact, name="gone"))
    found = measure_starts(bundle, [bad, good], threads=1, rounds=1, progress=lambda done: None)
    assert set(found) == {("litert", good.artefact.name)}


def test_an_artefact_that_does_not_load_is_left_out_with_a_reason(
    bundle_root: Path, edit_manifest: Callable[..., None]
) -> None:
    spoil(bundle_root, edit_manifest, "onnx-fp32.onnx", b"no model")
    found = bench(BenchOptions(bundle=bundle_root, everything=True, seconds=0.1, starts=0))
    notes = {r.artefact: r.note for r in found.results}
    assert "cannot be loaded" in notes["onnx-fp32"] and notes["litert-fp32"] == ""
    with pytest.raises(BundleError, match="cannot be loaded"):
        bench(BenchOptions(bundle=bundle_root, runtime="onnx", seconds=0.1, starts=0))


def spoil(root: Path, edit_manifest: Callable[..., None], name: str, data: bytes) -> None:
    """Replace a file of the bundle by another, with its right hash in the manifest."""
    (root / name).write_bytes(data)
    artefacts = json.loads((root / MANIFEST).read_text())["artefacts"]
    for file in (file for artefact in artefacts for file in artefact["files"] if file["path"] == name):
        file["sha256"], file["size_bytes"] = sha256(root / name), len(data)
    edit_manifest(artefacts=artefacts)


def test_nothing_to_measure(pristine_bundle: Path) -> None:
    with pytest.raises(RuntimeUnavailable, match="onnx-cuda"):
        bench(BenchOptions(bundle=pristine_bundle, runtime="onnx-cuda", everything=True, seconds=0.1))


# --- results, written and read back


def test_a_result_survives_the_file(complete: Bench, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    result.write(path, complete)
    assert result.read(path) == complete
    tree = json.loads(path.read_text())
    assert {"schema", "board", "os", "versions", "pressure", "settings", "results"} <= set(tree)
    assert tree["board"]["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2"),
        ({"schema": ...}, "schema None"),
        ({"settings": ...}, "settings"),
        ({"results": [{"runtime": "a", "artefact": "b"}]}, "precision"),
        ({"results": [{"runtime": "a", "artefact": "b", "precision": "c", "model_per_second": -1}]}, ">= 0"),
        ({"time": "now"}, "time"),
        ({"before": {"temperature_c": 1e999}}, "not a benchmark result"),
    ],
)
def test_a_result_is_validated(complete: Bench, tmp_path: Path, change: dict[str, object], message: str) -> None:
    tree = {**msgspec.to_builtins(complete), **change}
    path = tmp_path / "result.json"
    path.write_text(json.dumps({k: v for k, v in tree.items() if v is not ...}).replace("Infinity", "1e999"))
    with pytest.raises(BenchError, match=message):
        result.read(path)


def test_a_file_that_is_not_a_result(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="no such file"):
        result.read(tmp_path / "gone.json")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BenchError, match="no such file"):
        result.read(tmp_path / "pipe")
    deep = tmp_path / "deep.json"
    deep.write_text('{"schema":1,"board":' + "[" * 100_000)
    with pytest.raises(BenchError, match="deep"):
        result.read(deep)
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written"):
        result.write(tmp_path / "file" / "result.json", Quantiles(count=1, p10=1, p50=1, p90=1, p99=1, max=1))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.floats(0, 1), junk=st.binary(min_size=1, max_size=6))
def test_damaged_results_give_one_error(complete: Bench, tmp_path: Path, position: float, junk: bytes) -> None:
    data = bytearray(result.encode(complete))
    start = int(position * len(data))
    data[start : start + len(junk)] = junk
    path = tmp_path / "result.json"
    path.write_bytes(data)
    with suppress(BenchError):  # damage may also be a figure that is as plausible as the one before
        result.read(path)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=50))
def test_quantiles(times: list[float]) -> None:
    found = quantiles(times)
    assert found is not None and found.count == len(times)
    assert found.p50 == pytest.approx(float(np.median(times)), abs=1e-3) and found.max == round(max(times), 4)
    assert found.p10 <= found.p50 <= found.p90 <= found.p99 <= found.max
    assert quantiles([]) is None


# --- comparing


def spread(p50: float) -> Quantiles:
    return Quantiles(count=9, p10=0.9 * p50, p50=p50, p90=1.1 * p50, p99=2 * p50, max=3 * p50)


def with_model(found: Bench, **p50: float) -> Bench:
    results = [
        Result(runtime=name.split("_")[0], artefact=name.replace("_", "-"), precision="fp32", model=spread(time))
        for name, time in p50.items()
    ]
    return replace(found, results=tuple(results))


def row(lines: Iterator[str], start: str) -> str:
    found = [line for line in lines if line.startswith(start)]
    assert len(found) == 1, found
    return found[0]


def test_compare_marks_differences_beyond_the_spread(complete: Bench) -> None:
    a = with_model(complete, litert_fp32=1.0, onnx_fp32=2.0, openvino_fp32=4.0, litert_old=1.0)
    b = with_model(complete, litert_fp32=1.1, onnx_fp32=3.0, openvino_fp32=1.0, litert_new=1.0)
    lines = list(compare.comparison_lines(a, b))
    assert not [line for line in lines if line.startswith("different")]
    near, slow, fast = (row(iter(lines), f"{r} {r}-fp32 model") for r in ("litert", "onnx", "openvino"))
    assert " 1.10 " in near and near.endswith(" within the spread")
    assert " 1.50 " in slow and slow.endswith(" slower, beyond the spread")
    assert " 0.25 " in fast and fast.endswith(" faster, beyond the spread")
    assert row(iter(lines), "litert litert-old").split()[2:] == ["measured", *NOT_MEASURED.split()]
    assert row(iter(lines), "litert litert-new").split()[2:] == [*NOT_MEASURED.split(), "measured"]


def test_compare_lists_differences_of_the_setup(complete: Bench) -> None:
    asked = replace(complete.settings, manifest_sha256="0" * 64, threads=4, camera="fake:")
    other = replace(
        complete,
        settings=asked,
        versions={**complete.versions, "numpy": "0.1", "tflite-runtime": "9.9"},
        board=replace(complete.board, model="Another board"),
        results=(replace(complete.results[0], precision_hint="bf16"),),
    )
    differences = compare.differences(complete, other)
    for text in ("the bundle: tiny-shapes", "threads: 1 and 4", "the board:", "numpy:", "golden images and fake:"):
        assert any(text in line for line in differences), text
    assert any("tflite-runtime: not installed and 9.9" in line for line in differences)
    assert any("precision hint" in line for line in differences)
    assert compare.differences(complete, complete) == []
    assert any("threads" in line for line in compare.comparison_lines(complete, other) if line.startswith("different"))


# --- selection


def test_the_fastest_that_passes_the_golden_check(complete: Bench) -> None:
    def candidate(name: str, p50: float, passed: bool | None) -> Result:
        return Result(runtime="litert", artefact=name, precision="fp32", loop={"total": spread(p50)}, passed=passed)

    found = replace(
        complete,
        results=(candidate("slow", 3.0, True), candidate("right", 2.0, True), candidate("wrong", 1.0, False)),
    )
    choice = fastest(found)
    assert (choice.artefact, choice.latency_ms, choice.threads) == ("right", 2.0, 1)
    assert [m.artefact for m in choice.measured] == ["slow", "right", "wrong"]
    with pytest.raises(CheckFailed, match="no artefact passes"):
        fastest(replace(found, results=found.results[2:]))


@pytest.mark.parametrize(("int8_ms", "best"), [(1.9, "fp32"), (1.0, "int8")])
def test_integers_are_selected_only_where_they_are_faster_beyond_the_spread(
    complete: Bench, int8_ms: float, best: str
) -> None:
    results = tuple(
        Result(runtime="litert", artefact=name, precision=name, loop={"total": spread(p50)}, passed=True)
        for name, p50 in (("fp32", 2.0), ("int8", int8_ms))
    )
    assert fastest(replace(complete, results=results)).artefact == best


@given(st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=2, max_size=2))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_selection_is_the_rule_of_the_spread(complete: Bench, times: list[tuple[int, int, int]]) -> None:
    """Integers run where a float artefact's times from p10 to p90 and theirs share no point, and theirs are lower."""
    ranges = {name: sorted(three) for name, three in zip(("fp32", "int8"), times, strict=True)}
    results = tuple(
        Result(
            runtime="litert",
            artefact=name,
            precision=name,
            loop={"total": replace(spread(p50), p10=p10, p90=p90)},
            passed=True,
        )
        for name, (p10, p50, p90) in ranges.items()
    )
    (f10, _, f90), (i10, _, i90) = ranges["fp32"], ranges["int8"]
    shared = set(range(f10, f90 + 1)) & set(range(i10, i90 + 1))
    expected = "int8" if not shared and min(i10, f10) == i10 else "fp32"
    assert fastest(replace(complete, results=results)).artefact == expected


@pytest.fixture
def chosen(pristine_bundle: Path) -> SavedSelection:
    bundle = Bundle.open(pristine_bundle)
    return SavedSelection(
        name="tiny-shapes",
        version="1.2.3",
        manifest_sha256=manifest_sha256(bundle),
        runtime="litert",
        artefact="litert-fp32",
        threads=2,
        latency_ms=0.5,
        measured=(Measured(runtime="litert", artefact="litert-fp32", latency_ms=0.5, passed=True),),
        versions=library_versions(),
        time=1.0,
    )


def test_a_selection_is_saved(chosen: SavedSelection, pristine_bundle: Path, tmp_path: Path) -> None:
    bundle, state = Bundle.open(pristine_bundle), tmp_path / "new" / "state"
    assert read_selection(state, bundle) is None
    write_selection(state, replace(chosen, latency_ms=9.0))
    path = write_selection(state, chosen)
    assert read_selection(state, bundle) == chosen
    assert [entry.name for entry in state.iterdir()] == [SELECTION_FILE] and path == state / SELECTION_FILE
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "change",
    [
        {"manifest_sha256": "0" * 64},
        {"artefact": "gone"},
        {"artefact": "onnx-fp32"},
        {"runtime": "abacus"},
        {"runtime": "onnx-cuda", "artefact": "onnx-fp32"},
        {"versions": {"ai-edge-litert": "0.0.1"}},
    ],
)
def test_a_selection_for_another_bundle_is_ignored(
    chosen: SavedSelection, pristine_bundle: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    if change.get("runtime") == "onnx-cuda":
        with suppress(RuntimeUnavailable):
            load("onnx-cuda")
            pytest.skip("this machine has ONNX Runtime for CUDA")
    write_selection(tmp_path, replace(chosen, **change))
    assert read_selection(tmp_path, Bundle.open(pristine_bundle)) is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_selection_is_ignored(
    chosen: SavedSelection, pristine_bundle: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = write_selection(tmp_path, chosen).read_bytes()
    cut = data.draw(st.integers(0, len(whole) - 3))
    bundle = Bundle.open(pristine_bundle)
    (tmp_path / SELECTION_FILE).write_bytes(data.draw(st.sampled_from((whole[:cut], b"[" * 50_000, b"{}", b"null"))))
    assert read_selection(tmp_path, bundle) is None
    (tmp_path / SELECTION_FILE).write_bytes(whole[:cut] + data.draw(st.binary(min_size=1, max_size=3)) + whole[cut:])
    found = read_selection(tmp_path, bundle)
    assert found is None or (found.runtime, found.artefact) == (chosen.runtime, chosen.artefact)


def test_a_selection_that_is_not_a_file(pristine_bundle: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SELECTION_FILE)
    assert read_selection(tmp_path, Bundle.open(pristine_bundle)) is None


def test_a_failed_write_leaves_the_old_selection(
    chosen: SavedSelection, pristine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_selection(tmp_path, chosen)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(EyasError, match="No space left"):
        patched.setattr(os, "fsync", full)
        write_selection(tmp_path, replace(chosen, artefact="litert-int8"))
    assert read_selection(tmp_path, Bundle.open(pristine_bundle)) == chosen
    assert [entry.name for entry in tmp_path.iterdir()] == [SELECTION_FILE]
    with pytest.raises(EyasError, match="cannot be written"):
        write_selection(tmp_path / SELECTION_FILE / "below", chosen)


# --- the verb


def test_json_on_standard_output_is_nothing_but_json(pristine_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--bundle", pristine_bundle, "--seconds", 0.1, "--json", "-") == 0
    out, err = capsys.readouterr()
    found = msgspec.json.decode(out.encode(), type=Bench)
    assert found.board.model and len(found.results) == 1
    assert "the model alone" in err and found.results[0].artefact in err


def test_compare_from_files(complete: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result.write(tmp_path / "a.json", complete)
    result.write(tmp_path / "b.json", replace(complete, settings=replace(complete.settings, threads=2)))
    assert run("--compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    out = capsys.readouterr().out
    assert "different: threads: 1 and 2" in out and "B / A" in out


@pytest.mark.parametrize(
    ("fp32", "int8", "best"),
    [
        ((1.0, 2.0, 2.2), (0.5, 0.8, 1.1), "litert-fp32"),  # 2.5 times as fast, and within the spread
        ((1.0, 2.0, 2.2), (0.5, 0.8, 0.9), "litert-int8"),
    ],
)
def test_choose_saves_what_run_reads(
    fp32: tuple[float, ...],
    int8: tuple[float, ...],
    best: str,
    pristine_bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is measured has fixed timings (p10, p50 and p90 of whole frames, milliseconds)."""
    times = {"litert-fp32": fp32, "litert-int8": int8}

    def measured(options: BenchOptions, **more: Any) -> Bench:
        found = bench(dataclasses.replace(options, starts=1), **more)
        return replace(found, results=tuple(fixed(r, *times[r.artefact]) for r in found.results))

    def fixed(found: Result, p10: float, p50: float, p90: float) -> Result:
        total = replace(found.loop["total"], p10=p10, p50=p50, p90=p90)
        return replace(found, loop=found.loop | {"total": total})

    monkeypatch.setattr("eyas_device.bench.run.bench", measured)
    arguments = ("--bundle", pristine_bundle, "--choose", "--runtime", "litert", "--seconds", 0.1)
    assert run(*arguments, "--state", tmp_path) == 0
    choice = read_selection(tmp_path, Bundle.open(pristine_bundle))
    assert choice is not None and (choice.runtime, choice.artefact) == ("litert", best)
    assert choice.latency_ms == times[best][1]
    assert {m.artefact: m.latency_ms for m in choice.measured} == {name: p50 for name, (_, p50, _) in times.items()}
    assert f"selected: {best} on litert, {times[best][1]:.3f} ms" in capsys.readouterr().out


def test_a_wrong_prediction_is_code_1_and_never_selected(
    bundle_root: Path, edit_manifest: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_manifest(golden_tolerance=1e-12)
    arguments = ("--bundle", bundle_root, "--runtime", "litert", "--seconds", 0.1)
    assert run(*arguments) == 1
    assert "FAILED" in capsys.readouterr().out
    with pytest.raises(CheckFailed):
        run(*arguments, "--choose", "--state", tmp_path)
    assert not (tmp_path / SELECTION_FILE).exists()


def test_blocks_are_written(pristine_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "blocks.json"
    assert run("--bundle", pristine_bundle, "--artefact", "litert-int8", "--seconds", 0.2, "--blocks", file) == 0
    times = msgspec.json.decode(file.read_bytes(), type=BlockTimes)
    assert times.precision == "int8" and times.blocks[-1].outputs == ((1, tiny.CLASSES),)
    assert "sum of the blocks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no bundle"),
        (("--bundle", "B", "--choose", "--artefact", "x"), "omit --artefact"),
        (("--bundle", "B", "--seconds", "601"), "600 at most"),
        (("--bundle", "B", "--blocks", "f", "--all"), "omit --all"),
        (("--bundle", "/no/such/bundle"), "is /no/such/bundle a bundle"),
        (("--compare", "/no/a.json", "/no/b.json"), "no such file"),
    ],
)
def test_invalid_options(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(EyasError, match=message) as caught:
        run(*arguments)
    assert caught.value.exit_code == 2
