"""How long networks really take here: built as the device runs them, one thread, artefacts that take turns."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import msgspec
import numpy as np
import torch
from torch import nn

from eyas_device.bench.blocks import BlockTimes, block_times
from eyas_device.bench.result import quantiles
from eyas_device.bundle import GOLDEN, MANIFEST, SCHEMA, Bundle, Manifest, Precision, RuntimeName
from eyas_device.preprocess import Preprocessing
from eyas_device.runtimes import choose, open_runtime
from eyas_device.support.closing import Closing
from eyas_host.data.transforms import Batch
from eyas_host.evaluate.inference import to_tensor
from eyas_host.export.build import artefact_files, artefact_name, compile_artefact
from eyas_host.export.manifest import artefacts_of, file_entry
from eyas_host.models.factory import PixelClassifier
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import prepare_qat

_BLOCK_SECONDS = 8.0
_SECONDS = 2.0
"""Of calls for each network."""
_LEAST_CALLS = 50
_TURN = 5


class Stopwatch(Closing):
    """Builds networks for one runtime in a temporary folder, and times them.

    `images` uint8 [n, size, size, 3] set the ranges of int8; speed does not depend on them.
    """

    def __init__(self, runtime: RuntimeName, spec: Preprocessing, images: Batch) -> None:
        self._runtime, self._spec, self._images = runtime, spec, images
        self._folder = tempfile.TemporaryDirectory(prefix="eyas-stopwatch-")
        self._made = 0

    def build(self, model: PixelClassifier, precision: Precision = "int8") -> Bundle:
        """A bundle of this one artefact. Raises `CompressError` or `CompileError` where it cannot be built."""
        folder = Path(self._folder.name) / str(self._made)
        folder.mkdir()
        self._made += 1
        model = copy.deepcopy(model).cpu().eval()
        deploy = fold_for_deployment(model)
        pixels = to_tensor(self._images, torch.device("cpu")).float()
        network: nn.Module = deploy
        if precision != "fp32":
            network = prepare_qat(deploy, [image[None] for image in pixels], input_size=self._spec.size)
        main = artefact_files(folder, self._runtime, precision)[0]
        compile_artefact(self._runtime, precision, network, main, self._spec.size)
        with torch.inference_mode():
            answer = model(pixels[:1]).softmax(1).numpy()
        name = artefact_name(self._runtime, precision)
        np.savez(folder / GOLDEN, **{"frame_00": self._images[0], f"p.{name}": answer})
        manifest = Manifest(
            schema=SCHEMA,
            name="stopwatch",
            version="0.0.0",
            labels=tuple(map(str, range(answer.shape[1]))),
            preprocessing=self._spec,
            artefacts=tuple(artefacts_of(folder, [(self._runtime, precision)])),
            use={self._runtime: name},
            golden=file_entry(folder / GOLDEN, folder),
        )
        (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return Bundle.open(folder)

    def blocks(self, bundle: Bundle) -> BlockTimes:
        """The latency table of what `build` made, its whole in processor time.

        Raises `BenchError` if the model cannot be cut or profiled.
        """
        chosen = choose(bundle, self._runtime)
        times = block_times(bundle, chosen, threads=1, seconds=_BLOCK_SECONDS, progress=lambda done: None)
        whole = quantiles(self._calls([bundle])[0])
        assert whole is not None
        return msgspec.structs.replace(times, whole=whole, notes=(*times.notes, "the whole: processor time of a call"))

    def medians(self, bundles: Sequence[Bundle]) -> list[float]:
        """Milliseconds of one image for each: medians of calls in short turns."""
        return [median(calls) for calls in self._calls(bundles)]

    def _calls(self, bundles: Sequence[Bundle]) -> list[list[float]]:
        """Processor milliseconds of many calls for each.

        At one thread that is the latency, except that the time of other processes is left out: on a busy machine calls
        of some milliseconds are interrupted and shorter ones are not, and their ratio would mean nothing.
        """
        times: list[list[float]] = [[] for _ in bundles]
        with ExitStack() as stack:
            runtimes = [stack.enter_context(open_runtime(bundle, self._runtime, threads=1)) for bundle in bundles]
            ends = time.perf_counter() + _SECONDS * len(runtimes)
            while time.perf_counter() < ends or len(times[0]) < _LEAST_CALLS:
                for runtime, own in zip(runtimes, times, strict=True):
                    runtime.infer(self._images[0])  # warms the caches
                    for _ in range(_TURN):
                        started = time.process_time()
                        runtime.infer(self._images[0])
                        own.append(1000 * (time.process_time() - started))
        return times

    def close(self) -> None:
        """Remove what was built."""
        self._folder.cleanup()
