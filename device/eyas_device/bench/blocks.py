"""Where the time goes inside of a model: a latency table, block by block or operator by operator.

- LiteRT and tflite: the model is cut after each block and the prefixes take turns; a block's time is the difference of
  the medians of two neighbouring prefixes. Nothing inside of the runtime has to help, and operators of one block are
  still fused.
- OpenVINO and ONNX Runtime: the times of each executed operator, from their own profilers. Shapes are those of the
  model's own graph, not of the layouts that a runtime chose for this processor.

The sum of the blocks is compared with the time of the whole, measured in the same turns without any of this.
"""

from __future__ import annotations

import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from eyas_device.bench.measure import Progress, prepared_image
from eyas_device.bench.onnx_graph import OnnxGraph, Ports, Shapes, read_nodes
from eyas_device.bench.result import SCHEMA, BenchError, CpuPressure, Quantiles, quantiles
from eyas_device.bench.show import table
from eyas_device.bench.tflite_cut import Graph, Part
from eyas_device.board import Board, read_board, read_pressure
from eyas_device.bundle import Bundle
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import Runtime, Selection, artefact_runtime, load, open_runtime
from eyas_device.support.closing import Closing

_CALLS = 5
_LEAST_ROUNDS = 5
_PROFILED = 200
"""Most profiled runs: their records are kept until the end."""
_CLOSE = 0.1
_COMMONEST = 6


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table."""

    name: str
    operators: tuple[str, ...]
    """Their kinds, in order."""
    inputs: Shapes
    outputs: Shapes
    ms: float
    """Median; a difference of two measurements may be slightly below 0 where a block costs next to nothing."""
    p10: float
    p90: float


class BlockTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The latency table of one artefact on one board."""

    schema: int = SCHEMA
    time: float = 0.0
    board: Board
    pressure: CpuPressure = CpuPressure()
    bundle: str
    bundle_version: str
    runtime: str
    runtime_version: str
    artefact: str
    precision: str
    threads: int
    method: str
    """How the times were made."""
    blocks: tuple[Block, ...]
    whole: Quantiles
    """The model uncut and not profiled, milliseconds."""
    sum_ms: float
    notes: tuple[str, ...] = ()


def block_times(bundle: Bundle, chosen: Selection, *, threads: int, seconds: float, progress: Progress) -> BlockTimes:
    """Measure for about `seconds`. Raises `BenchError` if the model cannot be cut or profiled."""
    pixels = prepared_image(bundle)
    methods = {"litert": _prefixes, "openvino": _openvino, "onnx": _onnx}
    before, began = read_pressure(), time.time()
    with open_runtime(bundle, chosen.runtime, chosen.artefact.name, threads=threads) as runtime:
        measured = methods[artefact_runtime(chosen.runtime)](
            bundle.path(chosen.artefact), runtime, pixels, threads, _Rounds(seconds, progress)
        )
        version = runtime.version
    method, blocks, whole = measured
    total = round(sum(block.ms for block in blocks), 4)
    notes = []
    if abs(total / whole.p50 - 1) > _CLOSE:
        notes.append(
            f"the sum of the blocks is {total / whole.p50:.2f} x the whole: "
            "take the shares, not the milliseconds (a profiler costs time itself, a busy machine scatters)"
        )
    if any(block.ms < 0 for block in blocks):
        notes.append("a block below 0 costs less than the measurement scatters")
    return BlockTimes(
        time=began,
        board=read_board(),
        pressure=CpuPressure(before=before, after=read_pressure()),
        bundle=bundle.manifest.name,
        bundle_version=bundle.manifest.version,
        runtime=chosen.runtime,
        runtime_version=version,
        artefact=chosen.artefact.name,
        precision=chosen.artefact.precision,
        threads=threads,
        method=method,
        blocks=tuple(blocks),
        whole=whole,
        sum_ms=total,
        notes=tuple(notes),
    )


def lines(times: BlockTimes) -> Iterator[str]:
    """The table as text."""
    yield (
        f"{times.board.model}: {times.bundle} {times.bundle_version}, {times.artefact} on {times.runtime} "
        f"{times.runtime_version}, {times.threads} thread{'s' * (times.threads > 1)}"
    )
    yield times.method
    rows = [["block", "in", "out", "ms", "p10", "p90", "share %", "operators"]]
    for block in times.blocks:
        kinds: dict[str, int] = {}
        for kind in block.operators:
            kinds[kind] = kinds.get(kind, 0) + 1
        words = [f"{count} {kind}" if count > 1 else kind for kind, count in list(kinds.items())[:_COMMONEST]]
        share = 100 * block.ms / times.sum_ms if times.sum_ms > 0 else 0.0
        figures = [f"{block.ms:.4f}", f"{block.p10:.4f}", f"{block.p90:.4f}", f"{share:.1f}"]
        rows.append([block.name, _shown(block.inputs), _shown(block.outputs), *figures, ", ".join(words)])
    yield from table(rows)
    yield (
        f"sum of the blocks {times.sum_ms:.4f} ms, the whole {times.whole.p50:.4f} ms "
        f"({times.whole.p10:.4f} to {times.whole.p90:.4f}): {100 * times.sum_ms / times.whole.p50:.1f} %"
    )
    yield from times.notes


class _Rounds:
    """Lets the whole and something else take turns until the time is over."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self._seconds, self._progress = seconds, progress

    def __call__(
        self, whole: Callable[[], object], turn: Callable[[], object], *, most: int | None = None
    ) -> Quantiles:
        """Call `turn` once a round, `most` times at most; the durations of `whole`."""
        times = array("d")
        started, number = time.perf_counter(), 0
        while True:
            times.extend(timed(whole))
            turn()
            number += 1
            done = (time.perf_counter() - started) / self._seconds
            if most is not None:
                done = max(done, number / most)
            self._progress(min(done, 1.0))
            if done >= 1 and number >= _LEAST_ROUNDS:
                break
        found = quantiles(times)
        assert found is not None
        return found


def timed(call: Callable[[], object]) -> list[float]:
    """Milliseconds of a few calls; one before them warms the caches and is not counted."""
    call()
    times = []
    for _ in range(_CALLS):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return times


def _prefixes(
    path: Path, runtime: Runtime, pixels: Pixels, threads: int, rounds: _Rounds
) -> tuple[str, list[Block], Quantiles]:
    graph = Graph(path)
    interpreters = [_load(graph.prefix(part), part, runtime, pixels, threads) for part in graph.parts]
    times: list[array[float]] = [array("d") for _ in interpreters]
    medians: list[array[float]] = [array("d") for _ in interpreters]

    def turn() -> None:
        for interpreter, all_times, per_round in zip(interpreters, times, medians, strict=True):
            measured = timed(interpreter.invoke)
            all_times.extend(measured)
            per_round.append(median(measured))

    whole = rounds(_load(path.read_bytes(), graph.parts[-1], runtime, pixels, threads).invoke, turn)
    blocks = []
    before, before_rounds = 0.0, np.zeros(len(medians[0]))
    for number, part in enumerate(graph.parts):
        after, after_rounds = median(times[number]), np.asarray(medians[number])
        p10, p90 = np.quantile(after_rounds - before_rounds, (0.1, 0.9))
        blocks.append(
            Block(
                name=f"block-{number:02d}",
                operators=part.operators,
                inputs=(part.inputs,),
                outputs=(part.outputs,),
                ms=round(after - before, 4),
                p10=round(float(p10), 4),
                p90=round(float(p90), 4),
            )
        )
        before, before_rounds = after, after_rounds
    method = (
        "prefixes that take turns: a block is the difference of the medians of two neighbours (p10, p90: of a round's)"
    )
    return method, blocks, whole


def _load(model: bytes, part: Part, runtime: Runtime, pixels: Pixels, threads: int) -> Any:
    """An interpreter of a model that ends with `part`, the image in it. Raises `BenchError` if it is refused."""
    make: Any = getattr(runtime, "interpreter")  # noqa: B009 - not part of the protocol of all runtimes
    try:
        interpreter = make(model_content=model, num_threads=threads)
        interpreter.allocate_tensors()
        entry = interpreter.get_input_details()[0]
        kind = np.dtype(entry["dtype"])
        image = (pixels.astype(np.int16) - 128 if kind == np.int8 else pixels).astype(kind)
        interpreter.set_tensor(entry["index"], image[np.newaxis])
        interpreter.invoke()
    except (ValueError, RuntimeError) as error:
        raise BenchError(
            f"the model cannot be cut behind operator {part.end - 1} ({part.operators[-1]}): {error}; "
            "its blocks were not measured"
        ) from None
    return interpreter


def _openvino(
    path: Path, runtime: Runtime, pixels: Pixels, threads: int, rounds: _Rounds
) -> tuple[str, list[Block], Quantiles]:
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # as eyas_device.runtimes.openvino
        "INFERENCE_NUM_THREADS": threads,
        "PERF_COUNT": True,
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    request = compiled.create_infer_request()
    request.set_input_tensor(openvino.Tensor(pixels[np.newaxis].copy()))
    times: dict[tuple[str, str], list[float]] = {}

    def turn() -> None:
        for _ in range(2):  # the first one warms the caches
            request.infer()
        for node in request.get_profiling_info():
            if node.status == openvino.ProfilingInfo.Status.EXECUTED:
                spent = 1000 * node.real_time.total_seconds()
                times.setdefault((node.node_name, node.node_type), []).append(spent)

    whole = rounds(lambda: runtime.infer(pixels), turn)
    shapes = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    rows = []
    for (name, kind), measured in times.items():
        op = shapes.get(name)
        sides = [[] if op is None else [_openvino_shape(port) for port in ports] for ports in _ports(op)]
        rows.append(_profiled(name, kind, sides[0], sides[1], measured))
    return "OpenVINO's profile of each operator that was executed (whole microseconds)", rows, whole


def _ports(op: Any) -> tuple[Sequence[Any], Sequence[Any]]:
    return ((), ()) if op is None else (op.inputs(), op.outputs())


def _openvino_shape(port: Any) -> tuple[int, ...]:
    return tuple(int(side) for side in port.get_shape())


def _onnx(
    path: Path, runtime: Runtime, pixels: Pixels, threads: int, rounds: _Rounds
) -> tuple[str, list[Block], Quantiles]:
    kind: Any = load(runtime.name)
    feed = {"pixels": pixels[np.newaxis].copy()}
    with _OnnxProfile(path, kind.providers, threads) as profile:

        def turn() -> None:
            for _ in range(2):
                profile.session.run(None, feed)

        whole = rounds(lambda: runtime.infer(pixels), turn, most=_PROFILED)
        events = profile.events()
    with _OnnxProfile(path, ("CPUExecutionProvider",), threads, optimise=False) as profile:
        profile.session.run(None, feed)
        graph = OnnxGraph(read_nodes(path), {name: _onnx_ports(ran[0]) for name, ran in profile.events().items()})
    rows = []
    for name, ran in events.items():
        operator = str(ran[0]["args"].get("op_name", ""))
        ports = graph.ports(name, operator, _onnx_ports(ran[0]))
        rows.append(_profiled(name, operator, *ports, [event["dur"] / 1000 for event in ran[1::2]]))
    return "ONNX Runtime's profile of each operator that was executed (whole microseconds)", rows, whole


class _OnnxProfile(Closing):
    """A session that records each operator that it executes."""

    def __init__(self, path: Path, providers: Sequence[str], threads: int, *, optimise: bool = True) -> None:
        from eyas_device.runtimes.onnx import open_session

        self._folder = tempfile.TemporaryDirectory(prefix="eyas-profile-")
        profile = str(Path(self._folder.name) / "profile")
        self.session = open_session(path, providers, threads=threads, profile=profile, optimise=optimise)

    def events(self) -> dict[str, list[dict[str, Any]]]:
        """What was executed by operator name, in order; the session records nothing from here on."""
        ran: dict[str, list[dict[str, Any]]] = {}
        for event in msgspec.json.decode(Path(self.session.end_profiling()).read_bytes(), type=list[dict[str, Any]]):
            if event.get("cat") == "Node" and str(event.get("name")).endswith("_kernel_time"):
                ran.setdefault(str(event["name"]).removesuffix("_kernel_time"), []).append(event)
        return ran

    def close(self) -> None:
        """Free the session and remove what it wrote."""
        self.session = None
        self._folder.cleanup()


def _onnx_ports(event: dict[str, Any]) -> Ports:
    return Ports(
        *(
            tuple(tuple(shape) for port in event["args"].get(key, ()) for shape in port.values())
            for key in ("input_type_shape", "output_type_shape")
        )
    )


def _profiled(
    name: str, kind: str, inputs: Sequence[tuple[int, ...]], outputs: Sequence[tuple[int, ...]], times: Sequence[float]
) -> Block:
    p10, p50, p90 = (round(float(part), 4) for part in np.quantile(times, (0.1, 0.5, 0.9)))
    return Block(name=name, operators=(kind,), inputs=tuple(inputs), outputs=tuple(outputs), ms=p50, p10=p10, p90=p90)


def _shown(shapes: Shapes) -> str:
    """The first shape; weights and scales that follow it are left out."""
    return "x".join(map(str, shapes[0])) if shapes else ""
