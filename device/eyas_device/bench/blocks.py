"""Latency of a model's blocks or operators.

- LiteRT and tflite: the model is cut after each block, and the prefixes are measured in turns; a block's time is the
  difference between the medians of two neighbouring prefixes. This needs no support by the runtime, and the operators
  of a block are still fused.
- OpenVINO and ONNX Runtime: the time of each executed operator, from their own profilers. Shapes are those of the
  model's graph, not of the layouts that a runtime chose for this processor.

The sum of the blocks is compared with the time of the uncut, unprofiled model, measured in the same rounds.
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
from eyas_device.bench.tflite_cut import Graph, GraphBlock
from eyas_device.board import Board, read_board, read_pressure
from eyas_device.bundle import Bundle
from eyas_device.preprocess import Pixels
from eyas_device.runtimes import Runtime, Selection, artefact_runtime, load, open_runtime
from eyas_device.support.closing import Closing

_CALLS = 5
_MIN_ROUNDS = 5
_MAX_PROFILED = 200
"""Maximum number of profiled rounds: their records are kept until the end."""
_TOLERANCE = 0.1
_MAX_SHOWN_KINDS = 6


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """Latency of one block or operator."""

    name: str
    operators: tuple[str, ...]
    """Types of the operators, in order."""
    inputs: Shapes
    outputs: Shapes
    ms: float
    """Median; as a difference of two measurements, it may be slightly below 0 for a very cheap block."""
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
    """How the times were measured."""
    blocks: tuple[Block, ...]
    whole: Quantiles
    """The uncut, unprofiled model, milliseconds."""
    sum_ms: float
    notes: tuple[str, ...] = ()


def block_times(
    bundle: Bundle, selection: Selection, *, threads: int, seconds: float, progress: Progress
) -> BlockTimes:
    """Measure the blocks of a model for about `seconds`. Raises `BenchError` if it cannot be cut or profiled."""
    pixels = prepared_image(bundle)
    methods = {"litert": _prefixes, "openvino": _openvino, "onnx": _onnx}
    before, began = read_pressure(), time.time()
    with open_runtime(bundle, selection.runtime, selection.artefact.name, threads=threads) as runtime:
        measured = methods[artefact_runtime(selection.runtime)](
            bundle.path(selection.artefact), runtime, pixels, threads, _Rounds(seconds, progress)
        )
        version = runtime.version
    method, blocks, whole = measured
    total = round(sum(block.ms for block in blocks), 4)
    notes = []
    if abs(total / whole.p50 - 1) > _TOLERANCE:
        notes.append(
            f"the sum of the blocks is {total / whole.p50:.2f} x the time of the whole model: "
            "use the percentages, not the milliseconds (a profiler takes time, a busy machine adds noise)"
        )
    if any(block.ms < 0 for block in blocks):
        notes.append("a block below 0 takes less time than the measurement noise")
    return BlockTimes(
        time=began,
        board=read_board(),
        pressure=CpuPressure(before=before, after=read_pressure()),
        bundle=bundle.manifest.name,
        bundle_version=bundle.manifest.version,
        runtime=selection.runtime,
        runtime_version=version,
        artefact=selection.artefact.name,
        precision=selection.artefact.precision,
        threads=threads,
        method=method,
        blocks=tuple(blocks),
        whole=whole,
        sum_ms=total,
        notes=tuple(notes),
    )


def table_lines(times: BlockTimes) -> Iterator[str]:
    """Lines of the table as text."""
    yield (
        f"{times.board.model}: {times.bundle} {times.bundle_version}, {times.artefact} on {times.runtime} "
        f"{times.runtime_version}, {times.threads} thread{'s' * (times.threads > 1)}"
    )
    yield times.method
    rows = [["block", "in", "out", "ms", "p10", "p90", "%", "operators"]]
    for block in times.blocks:
        kinds: dict[str, int] = {}
        for kind in block.operators:
            kinds[kind] = kinds.get(kind, 0) + 1
        operators = [f"{count} {kind}" if count > 1 else kind for kind, count in list(kinds.items())[:_MAX_SHOWN_KINDS]]
        percent = 100 * block.ms / times.sum_ms if times.sum_ms > 0 else 0.0
        times_ms = [f"{block.ms:.4f}", f"{block.p10:.4f}", f"{block.p90:.4f}", f"{percent:.1f}"]
        rows.append(
            [block.name, _format_shape(block.inputs), _format_shape(block.outputs), *times_ms, ", ".join(operators)]
        )
    yield from table(rows)
    yield (
        f"sum of the blocks {times.sum_ms:.4f} ms, the whole model {times.whole.p50:.4f} ms "
        f"({times.whole.p10:.4f} to {times.whole.p90:.4f}): {100 * times.sum_ms / times.whole.p50:.1f} %"
    )
    yield from times.notes


class _Rounds:
    """Measures the whole model in rounds with something else, until the time is over."""

    def __init__(self, seconds: float, progress: Progress) -> None:
        self._seconds, self._progress = seconds, progress

    def __call__(
        self, whole: Callable[[], object], turn: Callable[[], object], *, max_rounds: int | None = None
    ) -> Quantiles:
        """Call `turn` once per round, at most `max_rounds` times; returns the durations of `whole`."""
        times = array("d")
        started, number = time.perf_counter(), 0
        while True:
            times.extend(timed(whole))
            turn()
            number += 1
            done = (time.perf_counter() - started) / self._seconds
            if max_rounds is not None:
                done = max(done, number / max_rounds)
            self._progress(min(done, 1.0))
            if done >= 1 and number >= _MIN_ROUNDS:
                break
        durations = quantiles(times)
        assert durations is not None
        return durations


def timed(call: Callable[[], object]) -> list[float]:
    """Milliseconds of a few calls; a first one warms the caches and is not counted."""
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
    interpreters = [_load(graph.prefix(block), block, runtime, pixels, threads) for block in graph.blocks]
    times: list[array[float]] = [array("d") for _ in interpreters]
    medians: list[array[float]] = [array("d") for _ in interpreters]

    def turn() -> None:
        for interpreter, all_times, per_round in zip(interpreters, times, medians, strict=True):
            measured = timed(interpreter.invoke)
            all_times.extend(measured)
            per_round.append(median(measured))

    whole = rounds(_load(path.read_bytes(), graph.blocks[-1], runtime, pixels, threads).invoke, turn)
    blocks = []
    before, before_rounds = 0.0, np.zeros(len(medians[0]))
    for number, block in enumerate(graph.blocks):
        after, after_rounds = median(times[number]), np.asarray(medians[number])
        p10, p90 = np.quantile(after_rounds - before_rounds, (0.1, 0.9))
        blocks.append(
            Block(
                name=f"block-{number:02d}",
                operators=block.operators,
                inputs=(block.inputs,),
                outputs=(block.outputs,),
                ms=round(after - before, 4),
                p10=round(float(p10), 4),
                p90=round(float(p90), 4),
            )
        )
        before, before_rounds = after, after_rounds
    method = "interleaved prefixes: the difference between the medians of two neighbours (p10, p90: per round)"
    return method, blocks, whole


def _load(model: bytes, block: GraphBlock, runtime: Runtime, pixels: Pixels, threads: int) -> Any:
    """Load a model that ends with `block`, with the image as input. Raises `BenchError` if that fails."""
    interpreter_class: Any = getattr(runtime, "interpreter")  # noqa: B009 - not part of the protocol of all runtimes
    try:
        interpreter = interpreter_class(model_content=model, num_threads=threads)
        interpreter.allocate_tensors()
        entry = interpreter.get_input_details()[0]
        kind = np.dtype(entry["dtype"])
        image = (pixels.astype(np.int16) - 128 if kind == np.int8 else pixels).astype(kind)
        interpreter.set_tensor(entry["index"], image[np.newaxis])
        interpreter.invoke()
    except (ValueError, RuntimeError) as error:
        raise BenchError(
            f"the model cannot be cut after operator {block.end - 1} ({block.operators[-1]}): {error}; "
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
                duration_ms = 1000 * node.real_time.total_seconds()
                times.setdefault((node.node_name, node.node_type), []).append(duration_ms)

    whole = rounds(lambda: runtime.infer(pixels), turn)
    shapes = {op.get_friendly_name(): op for op in compiled.get_runtime_model().get_ordered_ops()}
    rows = []
    for (name, kind), measured in times.items():
        op = shapes.get(name)
        port_shapes = [[] if op is None else [_openvino_shape(port) for port in ports] for ports in _ports(op)]
        rows.append(_profiled(name, kind, port_shapes[0], port_shapes[1], measured))
    return "OpenVINO's profile of each executed operator (resolution 1 µs)", rows, whole


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

        whole = rounds(lambda: runtime.infer(pixels), turn, max_rounds=_MAX_PROFILED)
        events = profile.events()
    with _OnnxProfile(path, ("CPUExecutionProvider",), threads, optimise=False) as profile:
        profile.session.run(None, feed)
        graph = OnnxGraph(
            read_nodes(path), {name: _onnx_ports(recorded[0]) for name, recorded in profile.events().items()}
        )
    rows = []
    for name, recorded in events.items():
        operator = str(recorded[0]["args"].get("op_name", ""))
        ports = graph.ports(name, operator, _onnx_ports(recorded[0]))
        rows.append(_profiled(name, operator, *ports, [event["dur"] / 1000 for event in recorded[1::2]]))
    return "ONNX Runtime's profile of each executed operator (resolution 1 µs)", rows, whole


class _OnnxProfile(Closing):
    """A session that records each executed operator."""

    def __init__(self, path: Path, providers: Sequence[str], threads: int, *, optimise: bool = True) -> None:
        from eyas_device.runtimes.onnx import open_session

        self._folder = tempfile.TemporaryDirectory(prefix="eyas-profile-")
        profile = str(Path(self._folder.name) / "profile")
        self.session = open_session(path, providers, threads=threads, profile=profile, optimise=optimise)

    def events(self) -> dict[str, list[dict[str, Any]]]:
        """End the recording; returns the events by operator name, in order."""
        events: dict[str, list[dict[str, Any]]] = {}
        for event in msgspec.json.decode(Path(self.session.end_profiling()).read_bytes(), type=list[dict[str, Any]]):
            if event.get("cat") == "Node" and str(event.get("name")).endswith("_kernel_time"):
                events.setdefault(str(event["name"]).removesuffix("_kernel_time"), []).append(event)
        return events

    def close(self) -> None:
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
    p10, p50, p90 = (round(float(value), 4) for value in np.quantile(times, (0.1, 0.5, 0.9)))
    return Block(name=name, operators=(kind,), inputs=tuple(inputs), outputs=tuple(outputs), ms=p50, p10=p10, p90=p90)


def _format_shape(shapes: Shapes) -> str:
    """Format the first shape, without those of weights and scales that follow."""
    return "x".join(map(str, shapes[0])) if shapes else ""
