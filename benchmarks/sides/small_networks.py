"""Speed of int8 against fp32: MobileNetV3-large, and what makes a small pruned network faster.

Real graphs, untrained for the two classes: speed does not depend on it. All sides take turns at one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from rich.table import Table

from common import Figure, ratio
from compiled import network
from eyas_device.preprocess import Pixels
from eyas_device.runtimes.litert import LiteRT
from eyas_device.runtimes.openvino import OpenVINO
from eyas_host.evaluation.turns import take_turns
from eyas_host.support.progress import meter, show

SIZE = 224
KEPT = 0.7
"""Part of each layer's channels: 30 % pruned, about half of the multiply-accumulates."""


class _BFloat16(OpenVINO):
    """What OpenVINO's CPU plugin does without a hint, where the processor has bf16."""

    precision_hint = "bf16"


class Variant(NamedTuple):
    """A network that might be the student."""

    words: str
    model: str
    activation: Literal["default", "relu"] = "default"
    keep: float = 1.0


VARIANTS = (
    Variant("V3-small", "mobilenetv3_small_100"),
    Variant("V3-small, pruned", "mobilenetv3_small_100", keep=KEPT),
    Variant("V3-small, ReLU", "mobilenetv3_small_100", "relu"),
    Variant("V3-small, ReLU, pruned", "mobilenetv3_small_100", "relu", KEPT),
    Variant("V3-small minimal (ReLU, no SE, 3x3)", "tf_mobilenetv3_small_minimal_100"),
    Variant("V3-small minimal, pruned", "tf_mobilenetv3_small_minimal_100", keep=KEPT),
    Variant("V4-conv-small (ReLU, no SE)", "mobilenetv4_conv_small"),
    Variant("V4-conv-small, pruned", "mobilenetv4_conv_small", keep=KEPT),
)
FEW = tuple(variant for variant in VARIANTS if variant.words.startswith(("V3-small, pruned", "V4"))) + VARIANTS[:1]
"""Those of the quick form: the student and the network without squeeze-and-excitation, each whole and pruned."""


def large_figures(work: Path, rounds: int) -> dict[str, Figure]:
    """MobileNetV3-large at 224 px, not pruned, in LiteRT and OpenVINO."""
    image, name = _image(), "mobilenetv3_large_100"
    calls: dict[str, Callable[[], object]] = {}
    for precision in ("fp32", "int8"):
        tflite = network(name, precision, work, size=SIZE)
        ir = network(name, precision, work, size=SIZE, runtime="openvino")
        for key, opened in (
            (f"litert-{precision}", LiteRT(tflite, size=SIZE, classes=2, threads=1)),
            (f"openvino-{precision}", OpenVINO(ir, size=SIZE, classes=2, threads=1)),
            (f"openvino-{precision}-bf16", _BFloat16(ir, size=SIZE, classes=2, threads=1)),
        ):
            calls[key] = lambda opened=opened: opened.infer(image)  # type: ignore[misc]
    times = take_turns(calls, rounds)
    small, whole = (network(name, precision, work, size=SIZE).stat().st_size for precision in ("int8", "fp32"))
    return {
        "v3_large_litert": ratio(times["litert-fp32"], times["litert-int8"], bound=1.5, note="int8 against fp32"),
        "v3_large_openvino_f32_hint": ratio(times["openvino-fp32"], times["openvino-int8"], bound=1.3),
        "v3_large_openvino_bf16_hint": ratio(
            times["openvino-fp32-bf16"],
            times["openvino-int8-bf16"],
            note="both sides with the hint; without bf16 in the processor it changes nothing",
        ),
        "v3_large_size": Figure(
            value=small / 1e6,
            unit="MB",
            bound=whole / 4e6 + 0.4,
            better="lower",
            note=f"LiteRT int8; fp32 / 4 + 0.4 MB, fp32 is {whole / 1e6:.2f} MB",
        ),
    }


def small_figures(work: Path, rounds: int, variants: Sequence[Variant] = VARIANTS) -> dict[str, Figure]:
    """Small networks at 224 px in LiteRT, V3-small among them, and a table of them."""
    image = _image()
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    with meter("small networks", 2 * len(variants)) as bar:
        for variant in variants:
            for precision in ("fp32", "int8"):
                path = network(
                    variant.model, precision, work, size=SIZE, activation=variant.activation, keep=variant.keep
                )
                model = LiteRT(path, size=SIZE, classes=2, threads=1)
                key = f"{variant.words}, {precision}"
                calls[key] = lambda model=model: model.infer(image)  # type: ignore[misc]
                sizes[key] = path.stat().st_size
                bar.advance(key)
    times = take_turns(calls, rounds)
    table = Table(title=f"LiteRT, {SIZE} px, one thread", title_justify="left")
    table.add_column("network")
    for title in ("fp32 ms", "int8 ms", "fp32 / int8", "V3-small fp32 / int8", "int8 kB"):
        table.add_column(title, justify="right")
    figures = {}
    base = float(np.median(times["V3-small, fp32"]))
    for variant in variants:
        whole, small = times[f"{variant.words}, fp32"], times[f"{variant.words}, int8"]
        goal = 1.3 if variant.keep < 1 else None
        figures[f"{variant.words}: int8 against fp32"] = ratio(whole, small, bound=goal)
        table.add_row(
            variant.words,
            f"{np.median(whole):.3f}",
            f"{np.median(small):.3f}",
            f"{np.median(whole) / np.median(small):.2f}",
            f"{base / np.median(small):.2f}",
            f"{sizes[f'{variant.words}, int8'] / 1e3:.0f}",
        )
    show(table)
    return figures


def _image() -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
