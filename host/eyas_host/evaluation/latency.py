"""Latency on this machine: networks built as the device runs them, timed in turns at one thread."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import msgspec
import torch
from torch import nn

from eyas_device.bench.blocks import BlockTimes, block_times
from eyas_device.bench.result import quantiles
from eyas_device.bundle import GOLDEN, MANIFEST, SCHEMA, Bundle, Manifest, Precision, RuntimeName
from eyas_device.preprocess import Preprocessing
from eyas_device.runtimes import choose, open_runtime
from eyas_device.support.closing import Closing
from eyas_host.data.transforms import Batch
from eyas_host.evaluation.inference import to_tensor
from eyas_host.evaluation.turns import take_turns
from eyas_host.export.artefacts import artefact_files, artefact_name
from eyas_host.export.build import compile_artefact
from eyas_host.export.golden import golden_image, write_golden
from eyas_host.export.manifest import artefacts_of, file_entry
from eyas_host.models.factory import PixelClassifier
from eyas_host.quant.fold import fold_for_deployment
from eyas_host.quant.qat import prepare_qat

_BLOCK_SECONDS = 8.0
_SECONDS = 2.0
"""Timed seconds for each network."""
_MIN_ROUNDS = 10


class Stopwatch(Closing):
    """Compiles networks for one runtime in a temporary folder, and times them.

    `images` uint8 [n, size, size, 3] set the int8 ranges; speed does not depend on them.
    """

    def __init__(self, runtime: RuntimeName, spec: Preprocessing, images: Batch) -> None:
        self._runtime, self._spec, self._images = runtime, spec, images
        self._folder = tempfile.TemporaryDirectory(prefix="eyas-stopwatch-")
        self._built = 0

    def build(self, model: PixelClassifier, precision: Precision = "int8") -> Bundle:
        """Compile a network into a bundle of one artefact. Raises `CompressError` or `CompileError` if it cannot be."""
        folder = Path(self._folder.name) / str(self._built)
        folder.mkdir()
        self._built += 1
        model = copy.deepcopy(model).cpu().eval()
        deploy = fold_for_deployment(model)
        pixels = to_tensor(self._images, torch.device("cpu")).float()
        network: nn.Module = deploy
        if precision != "fp32":
            network = prepare_qat(deploy, [image[None] for image in pixels], input_size=self._spec.size)
        main = artefact_files(folder, self._runtime, precision)[0]
        compile_artefact(self._runtime, precision, network, main, self._spec.size)
        with torch.inference_mode():
            probabilities = model(pixels[:1]).softmax(1).numpy()
        name = artefact_name(self._runtime, precision)
        manifest = Manifest(
            schema=SCHEMA,
            name="stopwatch",
            version="0.0.0",
            labels=tuple(map(str, range(probabilities.shape[1]))),
            preprocessing=self._spec,
            artefacts=tuple(artefacts_of(folder, [(self._runtime, precision)])),
            use={self._runtime: name},
        )
        write_golden(folder / GOLDEN, [golden_image(self._images[0], self._spec, 1)], {name: probabilities}, manifest)
        manifest = msgspec.structs.replace(manifest, golden=file_entry(folder / GOLDEN, folder))
        (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return Bundle.open(folder)

    def blocks(self, bundle: Bundle) -> BlockTimes:
        """Block times of a built bundle; the full network is timed in processor time.

        Raises `BenchError` if the model cannot be cut or profiled.
        """
        chosen = choose(bundle, self._runtime)
        times = block_times(bundle, chosen, threads=1, seconds=_BLOCK_SECONDS, progress=lambda done: None)
        whole = quantiles(self._processor_times([bundle])[0])
        assert whole is not None
        return msgspec.structs.replace(
            times, whole=whole, notes=(*times.notes, "full network: processor time per call")
        )

    def medians(self, bundles: Sequence[Bundle]) -> list[float]:
        """Median milliseconds per image for each bundle, timed in short turns."""
        return [median(times) for times in self._processor_times(bundles)]

    def _processor_times(self, bundles: Sequence[Bundle]) -> list[list[float]]:
        """Milliseconds of processor time of many calls for each bundle.

        At one thread that is the latency without the time of other processes: on a busy machine calls of some
        milliseconds are interrupted and shorter ones are not, which would distort their ratio.
        """
        with ExitStack() as stack:
            runtimes = [stack.enter_context(open_runtime(bundle, self._runtime, threads=1)) for bundle in bundles]
            calls = {str(i): partial(runtime.infer, self._images[0]) for i, runtime in enumerate(runtimes)}
            times = take_turns(calls, _MIN_ROUNDS, seconds=_SECONDS * len(runtimes), warm_up=1, clock=time.process_time)
        return list(times.values())

    def close(self) -> None:
        """Remove the built bundles."""
        self._folder.cleanup()
