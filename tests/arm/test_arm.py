"""The device's programs on emulated aarch64 boards, beside the same programs on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path

import msgspec
import numpy as np
import pytest
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from eyas_device.bundle import GOLDEN, MANIFEST, Bundle, Manifest
from eyas_device.errors import EXIT_CHECK_FAILED
from eyas_device.runtimes import artefact_runtime
from tests.support.bundles import entry

from .boards import BOARDS, Board, Rows, eyas_here, rows

FRAMES = 20
INT8_SHARE = {"litert": 0.4, "onnx": 0.4, "tflite": 0.8}
"""Largest difference of a probability, as a part of the bundle's golden tolerance (usually 0.05). Int8 kernels that are
both right differ by a step here and there; those of tflite-runtime, three years older, by 1 or 2."""
FLOAT_DP = 0.001
"""Float arithmetic in another order; the same pixels are needed for it."""

Report = Callable[[str], None]
PAIRS = [pytest.param(board, name, id=f"{board}-{name}") for board in BOARDS for name in board.runtimes]
on_each_board = pytest.mark.parametrize("board", BOARDS, ids=str)
with_each_runtime = pytest.mark.parametrize(("board", "runtime"), PAIRS)


def same_answers(there: Rows, here: Rows, limit: float) -> str:
    """Assert that two runs answer alike; the answer says how much they differ."""
    assert [Path(row["source"]).name for row in there] == [Path(row["source"]).name for row in here]
    p, q = (np.array([row["probabilities"] for row in side]) for side in (there, here))
    difference = float(np.abs(p - q).max())
    best = np.sort(q, axis=1)
    clear = best[:, -1] - best[:, -2] > 2 * limit
    alike = p.argmax(axis=1) == q.argmax(axis=1)
    assert difference <= limit
    assert alike[clear].all()
    return f"{len(there)} images, largest difference of a probability {difference:.4f}, agreement {alike.mean():.3f}"


@on_each_board
def test_the_board_is_what_it_claims_to_be(board: Board) -> None:
    code = (
        "import json, platform, cv2, numpy, eyas_device; print(json.dumps([platform.machine(), "
        "platform.python_version().rpartition('.')[0], numpy.__version__, cv2.__version__, eyas_device.__file__]))"
    )
    [[machine, python, numpy, opencv, device]] = rows(board.python_run("-c", code))
    assert (machine, python, device) == ("aarch64", board.python, "/eyas/eyas_device/__init__.py")
    assert numpy == board.pins["numpy"]
    assert board.pins["opencv-python-headless"].startswith(f"{opencv}.")


@on_each_board
def test_every_wheel_is_for_this_python_and_pinned(board: Board) -> None:
    found = [PathDistribution(folder) for folder in board.wheels.glob("*.dist-info")]
    assert len(found) > 10
    for wheel in found:
        assert SpecifierSet(wheel.metadata.get("Requires-Python", "")).contains(f"{board.python}.0"), wheel.name
        assert board.pins[canonicalize_name(wheel.name)] == wheel.version


@with_each_runtime
def test_golden_images(board: Board, runtime: str, bundle: Path, report: Report) -> None:
    checked = rows(board.eyas("check", "/bundle", "--runtime", runtime, "--json", bundle=bundle))
    artefacts = Bundle.open(bundle).manifest.artefacts
    assert [row["artefact"] for row in checked] == [a.name for a in artefacts if a.runtime == artefact_runtime(runtime)]
    for row in checked:
        assert (row["status"], row["runtime"]) == ("ok", runtime)
        report(f"{board} {runtime}: {row['artefact']}, golden images, {row['max_dp']:.4f} from the recorded answers")


@on_each_board
def test_twenty_drawn_frames(board: Board, bundle: Path, report: Report) -> None:
    words = ("run", "--camera", "fake:?frames=20", "--json", "--frames", str(FRAMES))
    there = rows(board.eyas(*words, "--bundle", "/bundle", bundle=bundle))
    here = rows(eyas_here(*words, "--bundle", str(bundle)))
    assert len(there) == len(here) == FRAMES
    limit = INT8_SHARE["litert"] * Bundle.open(bundle).manifest.golden_tolerance
    report(f"{board} litert: drawn frames, {same_answers(there, here, limit)}")


@with_each_runtime
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_twenty_images(board: Board, runtime: str, precision: str, bundle: Path, images: Path, report: Report) -> None:
    artefact = f"{artefact_runtime(runtime)}-{precision}"
    words = ("run", "--artefact", artefact, "--json", "--loop", "--frames", str(FRAMES))
    places = ("--bundle", "/bundle", "--camera", "folder:/images", "--runtime", runtime)
    there = rows(board.eyas(*words, *places, bundle=bundle, images=images))
    places = ("--bundle", str(bundle), "--camera", f"folder:{images}", "--runtime", artefact_runtime(runtime))
    here = rows(eyas_here(*words, *places))
    assert len(there) == len(here) == FRAMES
    tolerance = Bundle.open(bundle).manifest.golden_tolerance
    limit = FLOAT_DP if precision == "fp32" else INT8_SHARE[runtime] * tolerance
    report(f"{board} {runtime}: {artefact}, {same_answers(there, here, limit)}")


def test_opencv_5_stays_within_the_golden_tolerance(bundle: Path, report: Report) -> None:
    board = BOARDS[-1]
    done = board.eyas("check", "/bundle", "--runtime", "litert", "--json", opencv5=True, bundle=bundle)
    for row in rows(done):
        assert row["status"] == "ok"
        report(f"{board} litert: {row['artefact']}, OpenCV 5, {row['max_dp']:.4f} from the recorded answers")


@on_each_board
def test_doctor(board: Board, bundle: Path, report: Report) -> None:
    done = board.eyas("doctor", "--bundle", "/bundle", "--json", bundle=bundle)
    assert done.returncode in (0, EXIT_CHECK_FAILED), done.stderr  # the clock or the disk of this machine may be red
    found = {row["check"]: row for row in msgspec.json.decode(done.stdout)["findings"]}
    print(*(f"{row['status']:6} {check:18} {row['finding']}" for check, row in found.items()), sep="\n")
    for check in ("python", "userland", "libraries", "conflicts", "golden", *board.runtimes):
        assert found[check]["status"] == "green", found[check]
    report(f"{board}: doctor, {found['operating system']['finding']}; {found['golden']['finding']}")


@on_each_board
def test_a_wrong_answer_is_seen_there(board: Board, pristine_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(pristine_bundle, tmp_path / "bundle"))
    with np.load(bundle / GOLDEN) as data:
        arrays = dict(data)
    arrays["p.litert-fp32"] = arrays["p.litert-fp32"][::-1]
    del arrays["settings"]  # they would notice it before any model runs
    np.savez_compressed(bundle / GOLDEN, **arrays)
    manifest = msgspec.json.decode((bundle / MANIFEST).read_bytes(), type=Manifest)
    manifest = msgspec.structs.replace(manifest, golden=entry(bundle / GOLDEN))
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    done = board.eyas("check", "/bundle", "--runtime", "litert", bundle=bundle)
    assert done.returncode == EXIT_CHECK_FAILED, done.stderr
    assert "litert-fp32    FAILED" in done.stdout and "litert-int8    ok" in done.stdout
