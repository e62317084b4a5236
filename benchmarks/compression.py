"""Compression, measured: `python benchmarks/compression.py [--quick] [--json FILE] [--folds N]`.

- Accuracy: the demonstration in five folds (525 images each that its networks never saw), pruned to half the dense
  latency, then int8; what int8 and pruning lose is pooled over the folds. Long, and resumable: what is up to date is
  not run again. Beside it, from the same fp32 artefacts and calibration images: what other tools make of them.
- Speed: int8 against fp32, in turns, one thread; MobileNetV3-large, and small networks with what makes them faster.

`--quick` measures speeds of fewer networks in fewer rounds, and what int8 and pruning lose in folds that are already
there; it trains nothing and does not run other tools.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch

import quiet_first  # noqa: F401 - before the heavy imports
from common import Figure, finish
from eyas_host.pipeline.runner import RunContext
from eyas_host.recipe.load import load_recipe
from eyas_host.support.machine import cpu_pressure
from sides.compressed import accuracy, peers, read_fold
from sides.small_networks import FEW, VARIANTS, large_figures, small_figures

RECIPE = Path("models/solar-cells/recipe.toml")
RUNS = Path("runs")
FOLDS = 5
PRUNING = ("prune.target=latency", "prune.keep=0.5")


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="speeds, and losses of the folds that are there (minutes)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--folds", type=int, default=FOLDS, help=f"how many of the {FOLDS} folds to run")
    arguments = parser.parse_args()
    before, rounds = cpu_pressure(), 15 if arguments.quick else 60
    torch.set_num_threads(1)
    contexts = [RunContext(load_recipe(RECIPE, _settings(fold)), RUNS / _name(fold)) for fold in range(arguments.folds)]
    if not arguments.quick:
        for fold in range(arguments.folds):
            _distill(fold)
    folds = [read_fold(context) for context in contexts if (context.root / "report.json").exists()]
    figures: dict[str, Figure] = {}
    if folds:
        figures |= accuracy(folds)
    if folds and not arguments.quick:
        figures |= peers(folds, RUNS / "benchmark", rounds=rounds)
    figures |= large_figures(RUNS / "benchmark", rounds) | small_figures(
        RUNS / "benchmark", rounds, FEW if arguments.quick else VARIANTS
    )
    finish(figures, before, arguments.json)


def _name(fold: int) -> str:
    return f"solar-cells-fold{fold}"


def _settings(fold: int) -> list[str]:
    return [f"run.name={_name(fold)}", f"data.fold=[{fold}, {FOLDS}]", "student.labels_only=false", *PRUNING]


def _distill(fold: int) -> None:
    """Run a fold through the command line as far as it is not up to date."""
    sets = [word for setting in _settings(fold) for word in ("--set", setting)]
    subprocess.run([str(Path(sys.executable).with_name("eyas")), "distill", str(RECIPE), *sets], check=True)


if __name__ == "__main__":
    main()
