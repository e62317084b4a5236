"""Latency of pruned networks from a board's table: `python benchmarks/latency_table.py [--quick] [--json FILE]`.

The blocks of a dense int8 network are measured on this machine, written as `eyas-device bench --blocks FILE` writes
them, and read back as `[prune] table`. From this table alone the latency of pruned networks is predicted: random widths
for each group of channels, which neither the table nor the two constants of the prediction have seen. Then the dense
and the pruned networks are measured in turns, in processor time, so that other work on the machine counts little.

`--quick` takes one network and two pruned ones instead of three networks and four each.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish
from eyas_device.bench.result import write
from eyas_device.preprocess import Preprocessing
from eyas_host.compress.prune.channels import channel_groups, least_important_cuts, magnitude_importance
from eyas_host.compress.prune.latency_model import LatencyModel, layer_shapes, read_table
from eyas_host.evaluation.latency import Stopwatch
from eyas_host.models.factory import PixelClassifier, build
from eyas_host.models.pruned import cut_channels
from eyas_host.support.machine import cpu_pressure
from eyas_host.support.progress import say

NETWORKS = (("mobilenetv3_small_100", 160), ("mobilenetv3_large_100", 128), ("tf_efficientnet_lite0", 128))
"""Model and side of its input; the constants were fitted to MobileNetV3-small at 128 and 224 pixels."""
PRUNED, QUICK_PRUNED = 4, 2
BOUND = 10.0
_ROUND_TO = 8


def main() -> None:
    """Measure, predict, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, two pruned ones (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    arguments = parser.parse_args()
    before = cpu_pressure()
    torch.set_num_threads(1)
    figures: dict[str, Figure] = {}
    for name, size in NETWORKS[:1] if arguments.quick else NETWORKS:
        figures |= errors_of(name, size, QUICK_PRUNED if arguments.quick else PRUNED)
    finish(figures, before, arguments.json)


def errors_of(name: str, size: int, count: int) -> dict[str, Figure]:
    """The largest error of the predictions for one network, percent."""
    torch.manual_seed(0)
    dense = build(name, 4, "random")[0].eval()
    images = np.random.default_rng(0).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    errors, shown = [], []
    with Stopwatch("litert", Preprocessing(size=size), images) as stopwatch, tempfile.TemporaryDirectory() as folder:
        built = stopwatch.build(dense)
        table = Path(folder) / "board.json"
        write(table, stopwatch.blocks(built))
        latency = LatencyModel(read_table(table, ("litert",)), layer_shapes(dense, size=size))
        for number, network in enumerate(random_widths(dense, size, count)):
            dense_ms, pruned_ms = stopwatch.medians([built, stopwatch.build(network)])
            predicted = latency.ms(layer_shapes(network, size=size)) / latency.dense_ms
            measured = pruned_ms / dense_ms
            errors.append(100 * abs(predicted / measured - 1))
            shown.append(f"{predicted:.3f} for {measured:.3f}")
            say(f"  {name} at {size} px, pruned network {number + 1}: {shown[-1]} of the dense one's time")
    return {
        f"{name}_{size}_error": Figure(
            value=max(errors),
            unit="%",
            bound=BOUND,
            better="lower",
            spread="; ".join(shown),
            note=f"largest of {count} networks of random widths; predicted for measured fraction of the dense latency",
        )
    }


def random_widths(dense: PixelClassifier, size: int, count: int) -> Iterator[PixelClassifier]:
    """Copies of a network whose groups of channels keep 30 to 100 %, each another fraction."""
    groups = channel_groups(dense, size=size)
    importance = magnitude_importance(dense, groups)
    for number in range(count):
        fractions = np.random.default_rng(number).uniform(0.3, 1.0, len(groups))
        kept = [
            min(group.channels, max(1, round(group.channels * fraction / _ROUND_TO)) * _ROUND_TO)
            for group, fraction in zip(groups, fractions, strict=True)
        ]
        yield cut_channels(dense, least_important_cuts(groups, importance, kept), size=size)


if __name__ == "__main__":
    main()
