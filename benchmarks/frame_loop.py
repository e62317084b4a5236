"""Cost of the device's frame loop, compared with alternatives.

    python benchmarks/frame_loop.py [--quick] [--json FILE]

The programs take turns on a number of frames, each in its own process with one inference thread and one OpenCV thread:
the device's loop with all its listeners; a plain OpenCV + interpreter script; MediaPipe Tasks' image classifier (in its
own environment, built once below runs/benchmark). Overhead is CPU time per frame minus decoding and inference, which
are measured in their own turns on the same frames.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import thread_time
from typing import Any

import cv2
import msgspec
import numpy as np
import numpy.typing as npt
from skimage import data

from common import Figure, finish
from compiled import network
from eyas_device.bundle import GOLDEN, MANIFEST, SCHEMA, Artefact, File, Manifest, sha256
from eyas_device.predict import Classifier
from eyas_device.preprocess import Preprocessing, decode, prepare
from eyas_device.runtimes.litert import LiteRT
from eyas_host.export.golden import golden_image, write_golden
from eyas_host.support.machine import cpu_pressure
from eyas_host.support.quiet import quiet_libraries

WORK = Path("runs/benchmark")
SIDES = Path(__file__).parent / "sides"
_OVERLOAD = 3
_TURN_S = 4.0
SMALL = Path("runs/solar-cells/bundle")


class Side:
    """A benchmarked program, which runs turns on request; see `sides/__init__.py`."""

    def __init__(self, python: Path | str, script: str, *arguments: object) -> None:
        command = [str(python), str(SIDES / script), *map(str, arguments)]
        self.name = script
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if self._read() != "ready":
            raise SystemExit(f"{script} did not start: {' '.join(command)}")

    def turn(self, *numbers: float) -> dict[str, Any]:
        """Run a turn of `frames`, or of `seconds` at `fps`, and return its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"turn {' '.join(map(str, numbers))}\n")
        self._process.stdin.flush()
        result: dict[str, Any] = json.loads(self._read())
        return result

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    quiet_libraries()
    cv2.setNumThreads(1)
    before = cpu_pressure()
    rounds = 8 if arguments.quick else 25
    WORK.mkdir(parents=True, exist_ok=True)
    small_frames, large_frames = WORK / "frames-480p.npz", WORK / "frames-720p.npz"
    write_frames(small_frames, 640, 480)
    write_frames(large_frames, 1280, 720)
    int8, fp32 = (network("mobilenetv3_large_100", precision, WORK) for precision in ("int8", "fp32"))
    fast = Preprocessing(size=224, interpolation="linear", decode="reduced")
    smooth = Preprocessing(size=224)
    heavy = network("resnet50", "fp32", WORK)
    bundles = {
        "int8": pack(WORK / "loop-int8", int8, "int8", fast),
        "int8-smooth": pack(WORK / "loop-int8-smooth", int8, "int8", smooth),
        "fp32": pack(WORK / "loop-fp32", fp32, "fp32", fast),
        "heavy": pack(WORK / "loop-heavy", heavy, "fp32", fast),
    }
    figures = overhead(bundles, int8, small_frames, rounds)
    figures |= small_student(small_frames, rounds)
    figures |= against_mediapipe("", "V3-large fp32 224 px", bundles["fp32"], fp32, small_frames, rounds)
    if (SMALL / "litert-fp32.tflite").exists():
        student = SMALL / "litert-fp32.tflite"
        packed = pack(
            WORK / "loop-student", student, "fp32", Preprocessing(size=128, interpolation="linear", decode="reduced")
        )
        figures |= against_mediapipe(
            "_student", "the demonstration's student, fp32 128 px", packed, student, small_frames, rounds
        )
    turns = 2 if arguments.quick else 6
    figures |= throughput(bundles["int8"], large_frames, turns)
    figures |= age("", "V3-large int8", bundles["int8"], small_frames, turns)
    figures |= age(
        "_slow_model", "ResNet50 fp32, as slow here as V3-large on a small board", bundles["heavy"], small_frames, turns
    )
    figures |= start(bundles["int8"], small_frames, times=5 if arguments.quick else 15)
    figures |= installed()
    finish(figures, before, arguments.json)


def overhead(bundles: dict[str, Path], model: Path, frames: Path, rounds: int) -> dict[str, Figure]:
    """Overhead of the loop and of a plain script: MobileNetV3-large int8 at 224 px, 480p MJPEG."""
    with ExitStack() as stack:
        loop = stack.enter_context(Side(sys.executable, "eyas_loop.py", bundles["int8"], frames))
        smooth = stack.enter_context(Side(sys.executable, "eyas_loop.py", bundles["int8-smooth"], frames))
        plain = stack.enter_context(Side(sys.executable, "plain_script.py", model, frames))
        fast_parts = stack.enter_context(parts(bundles["int8"], frames))
        full_parts = stack.enter_context(parts(bundles["int8-smooth"], frames))
        own, own_smooth, others, speed = [], [], [], []
        for _ in range(rounds):
            fast_decode, infer = fast_parts()
            full_decode, _ = full_parts()
            costs = [1000 * (t := side.turn(30))["cpu_s"] / t["frames"] for side in (loop, smooth, plain)]
            own.append((costs[0] - fast_decode - infer, infer))
            own_smooth.append((costs[1] - full_decode - infer, infer))
            others.append((costs[2] - full_decode - infer, infer))
            speed.append(costs[2] / costs[0])
    note = "V3-large int8 224 px, 480p MJPEG, CPU time outside of decoding and inference / inference"
    return {
        "loop_overhead": _percentage(own, bound=6, note=f"{note}; decode reduced, interpolation linear"),
        "loop_overhead_us": Figure(
            value=1000 * float(np.median([o for o, _ in own])), unit="us", note="the same, absolute, a frame"
        ),
        "loop_overhead_smooth": _percentage(own_smooth, note="with decode full, interpolation area (the default)"),
        "plain_overhead": _percentage(others, note="the same of a plain OpenCV + interpreter script"),
        "loop_against_plain": Figure(
            value=float(np.median(speed)), unit="x", spread=_spread(speed), note="frames a CPU second, decode included"
        ),
    }


def small_student(frames: Path, rounds: int) -> dict[str, Figure]:
    """Absolute overhead with the demonstration's small student."""
    if not (SMALL / MANIFEST).exists():
        return {"student_overhead_us": Figure(value=None, unit="us", note=f"{SMALL} does not exist: run make distill")}
    with Side(sys.executable, "eyas_loop.py", SMALL, frames) as loop, parts(SMALL, frames) as measured:
        own = []
        for _ in range(rounds):
            decode_ms, infer = measured()
            turn = loop.turn(100)
            own.append((1000 * turn["cpu_s"] / turn["frames"] - decode_ms - infer, infer))
    micros = [1000 * o for o, _ in own]
    note = f"the demonstration's student; inference {1000 * float(np.median([i for _, i in own])):.0f} us"
    return {"student_overhead_us": Figure(value=float(np.median(micros)), unit="us", spread=_spread(micros), note=note)}


def against_mediapipe(key: str, what: str, bundle: Path, model: Path, frames: Path, rounds: int) -> dict[str, Figure]:
    """Throughput compared with MediaPipe Tasks on the same fp32 model (it accepts no int8 input)."""
    python = mediapipe_python()
    if python is None:
        return {
            f"loop_against_mediapipe{key}": Figure(value=None, unit="x", bound=1.2, note="mediapipe does not install")
        }
    with (
        Side(sys.executable, "eyas_loop.py", bundle, frames) as loop,
        Side(python, "mediapipe_tasks.py", model, frames) as peer,
    ):
        wall, same = [], []
        for _ in range(rounds):
            ours, theirs = loop.turn(30), peer.turn(30)
            wall.append(theirs["wall_s"] / ours["wall_s"])
            same.append(float(np.mean(np.equal(ours["labels"], theirs["labels"]))))
    note = f"frames/s, {what}, 480p JPEG, 1 thread; same label on {np.mean(same):.0%}"
    return {
        f"loop_against_mediapipe{key}": Figure(
            value=float(np.median(wall)), unit="x", bound=1.2, spread=_spread(wall), note=note
        )
    }


def throughput(bundle: Path, frames: Path, turns: int) -> dict[str, Figure]:
    """Throughput at 720p on one core with a camera faster than the model, compared with a queue of decoded frames.

    Two busy threads share a core evenly, so a queue that decodes eagerly leaves half of it to inference: with decoding
    time d and inference time i, the latest-frame buffer is at most 2 i / (i + d) times as fast.
    """
    ratio = []
    with (
        Side(sys.executable, "overload.py", bundle, frames, "slot") as slot,
        Side(sys.executable, "overload.py", bundle, frames, "queue") as decoded,
        parts(bundle, frames) as measured,
    ):
        cost = np.median([measured() for _ in range(10)], axis=0)
        fps = round(_OVERLOAD * 1000 / cost.sum())
        for _ in range(turns):
            ours, theirs = slot.turn(_TURN_S, fps), decoded.turn(_TURN_S, fps)
            ratio.append(ours["answers"] / max(1, theirs["answers"]))
    max_ratio = 2 * cost[1] / cost.sum()
    return {
        "overload_throughput": Figure(
            value=float(np.median(ratio)),
            unit="x",
            bound=1.6,
            spread=_spread(ratio),
            note=f"against a queue of two decoded frames; V3-large int8, 720p at {fps} frames/s, {_OVERLOAD} times "
            f"its capacity, one core; the theoretical maximum is {max_ratio:.2f}",
        )
    }


def age(key: str, what: str, bundle: Path, frames: Path, turns: int) -> dict[str, Figure]:
    """Time from capture to prediction at 480p on one core with a camera faster than the model, in inference times."""
    ages, tails = [], []
    with Side(sys.executable, "overload.py", bundle, frames, "slot") as slot, parts(bundle, frames) as measured:
        cost = np.median([measured() for _ in range(5)], axis=0)
        fps = round(_OVERLOAD * 1000 / cost.sum())
        for _ in range(turns):
            measured_ages = slot.turn(_TURN_S, fps)["ages_ms"]
            ages.append(float(np.median(measured_ages)) / float(cost[1]))
            tails.append(float(np.quantile(measured_ages, 0.99)) / float(cost[1]))
    return {
        f"overload_age{key}": Figure(
            value=float(np.median(ages)),
            unit="inferences",
            bound=1.5,
            better="lower",
            spread=f"p99 {np.median(tails):.2f}",
            note=f"{what}; 480p at {fps} frames/s, {_OVERLOAD} times its capacity, one core; "
            f"inference {cost[1]:.1f} ms, decoding {cost[0]:.1f} ms",
        )
    }


def start(bundle: Path, frames: Path, times: int) -> dict[str, Figure]:
    """Time from import to the first prediction, and peak memory."""
    image = WORK / "frame.jpg"
    with np.load(frames) as loaded:
        image.write_bytes(loaded[loaded.files[0]].tobytes())
    command = [sys.executable, str(SIDES / "first.py"), str(bundle), str(image)]
    runs = [json.loads(subprocess.check_output(command, stderr=subprocess.DEVNULL)) for _ in range(times)]
    seconds, rss = [r["seconds"] for r in runs], [r["peak_rss_mb"] for r in runs]
    return {
        "first_answer_s": Figure(
            value=float(np.median(seconds)),
            unit="s",
            bound=1.0,
            better="lower",
            spread=_spread(seconds),
            note="import, verify the bundle, load, predict; V3-large int8, LiteRT",
        ),
        "peak_rss_mb": Figure(
            value=float(np.median(rss)), unit="MB", bound=150, better="lower", spread=_spread(rss), note="with OpenCV"
        ),
    }


def installed() -> dict[str, Figure]:
    """Size of an environment with only the base installation."""
    folder = WORK / "base"
    python = environment(folder, "--constraint", "constraints/device-numpy2.txt", ".")
    if python is None:
        return {"base_install_mb": Figure(value=None, unit="MB", bound=300, better="lower", note="it does not install")}
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file() and not f.is_symlink())
    heavy = [name for name in ("torch", "tensorflow") if list(folder.rglob(f"site-packages/{name}"))]
    note = f"virtual environment, Python itself not counted; {'holds ' + ', '.join(heavy) if heavy else 'no torch'}"
    return {"base_install_mb": Figure(value=size / 1e6, unit="MB", bound=300, better="lower", note=note)}


def mediapipe_python() -> Path | None:
    """Python of an environment with MediaPipe, built if missing; None if it cannot be installed."""
    return environment(WORK / "mediapipe", "mediapipe")


def environment(folder: Path, *packages: str) -> Path | None:
    """Python of a virtual environment with `packages`, built if missing; None if they cannot be installed."""
    python, stamp = folder / "bin" / "python", folder / ".complete"
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if not stamp.exists():
        shutil.rmtree(folder, ignore_errors=True)
        commands = (["venv", "--python", sys.executable, str(folder)], ["pip", "install", "--python", str(python)])
        for command, rest in zip(commands, ((), packages), strict=True):
            if uv is None or subprocess.run([uv, *command, *rest], capture_output=True, check=False).returncode != 0:
                return None
        stamp.touch()
    return python.absolute()


@contextmanager
def parts(bundle: Path, frames: Path) -> Iterator[Any]:
    """Yield a function that measures decoding and inference, CPU ms per frame."""
    with np.load(frames) as loaded:
        encoded = [loaded[name].tobytes() for name in sorted(loaded.files)][:30]
    with Classifier.open(bundle) as classifier:
        image = prepare(decode(encoded[0]), classifier.spec)
        classifier.runtime.infer(image)

        def measure() -> tuple[float, float]:
            started = thread_time()
            for data_ in encoded:
                decode(data_, spec=classifier.spec)
            decoded = thread_time()
            for _ in encoded:
                classifier.runtime.infer_in_place(lambda out: None)
            ended = thread_time()
            return 1000 * (decoded - started) / len(encoded), 1000 * (ended - decoded) / len(encoded)

        measure()
        yield measure


def write_frames(path: Path, width: int, height: int) -> None:
    """Write sixty JPEG frames: a camera that pans over three photographs."""
    if path.exists():
        return
    encoded = {}
    for number, image in enumerate((data.astronaut(), data.coffee(), data.chelsea())):
        wide = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (width * 3 // 2, height * 3 // 2))
        for step in range(20):
            view = np.ascontiguousarray(wide[height // 4 : height // 4 + height, step * 8 : step * 8 + width])
            quality = [cv2.IMWRITE_JPEG_QUALITY, 85]
            encoded[f"frame_{number * 20 + step:02d}"] = cv2.imencode(".jpg", view, quality)[1].ravel()
    np.savez(path, **encoded)  # type: ignore[arg-type]


def pack(root: Path, model: Path, precision: str, spec: Preprocessing) -> Path:
    """Pack a bundle of one compiled model with two labels; its golden outputs are computed here."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    name = f"litert-{precision}"
    shutil.copyfile(model, root / f"{name}.tflite")
    encoded = golden_image(np.ascontiguousarray(data.coffee()[..., ::-1]), spec, 1)
    frame = decode(encoded)
    with LiteRT(root / f"{name}.tflite", size=spec.size, classes=2, threads=1) as runtime:
        logits = runtime.infer(prepare(frame, spec)).astype(np.float64)
    p: npt.NDArray[np.float32] = (np.exp(logits) / np.exp(logits).sum()).astype(np.float32)

    def entry(path: Path) -> File:
        return File(path=path.name, sha256=sha256(path), size_bytes=path.stat().st_size)

    manifest = Manifest(
        schema=SCHEMA,
        name="benchmark",
        version="0.0.0",
        labels=("one", "other"),
        preprocessing=spec,
        artefacts=(Artefact(name, "litert", precision, (entry(root / f"{name}.tflite"),)),),
        use={"litert": name},
    )
    write_golden(root / GOLDEN, [encoded], {name: p[None]}, manifest)
    manifest = msgspec.structs.replace(manifest, golden=entry(root / GOLDEN))
    (root / MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return root


def _percentage(pairs: Sequence[tuple[float, float]], *, bound: float | None = None, note: str) -> Figure:
    values = [100 * own / infer for own, infer in pairs]
    return Figure(
        value=float(np.median(values)),
        unit="%",
        bound=bound,
        better="lower",
        spread=_spread(values),
        note=note,
    )


def _spread(values: Sequence[float]) -> str:
    low, high = np.quantile(values, [0.1, 0.9])
    return f"p10 {low:.3g}, p90 {high:.3g}"


if __name__ == "__main__":
    main()
