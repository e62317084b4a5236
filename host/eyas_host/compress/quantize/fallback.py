"""Float fallback: the fewest layers to keep in float so that int8 stays within the bound on balanced accuracy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import msgspec
import numpy as np
from rich.markup import escape
from torch import nn

from eyas_host.compress.quantize.mixed import Degradation, MixedPrecision
from eyas_host.data.transforms import Batch
from eyas_host.evaluation.bootstrap import Ints
from eyas_host.evaluation.inference import logits_of, pick_device
from eyas_host.recipe import Recipe
from eyas_host.support.progress import say, track

SAMPLE = 256
"""Images that layers are ranked on; a likelihood needs fewer of them than an accuracy."""


class Fallback(msgspec.Struct, frozen=True):
    """Layers to keep in float, with the measurements behind the choice."""

    layers: tuple[str, ...]
    """Layers kept in float, the most sensitive first; the best set tried if none is within the bound."""
    drop: float
    """Balanced accuracy lost with these in float."""
    drops: tuple[float, ...]
    """Balanced accuracy lost with the 0, 1, 2, ... most sensitive layers in float."""
    max_drop: float
    """The bound on `drop`."""

    @property
    def enough(self) -> bool:
        """Whether the loss is within the bound."""
        return self.drop <= self.max_drop

    def __str__(self) -> str:
        lost = f"int8 loses {self.drops[0]:.3f} balanced accuracy (bound {self.max_drop:g})"
        kept = f"{self.drop:.3f} with quantize.keep_float = {list(self.layers)}"
        if self.enough:
            return f"{lost}; {kept}" if self.layers else f"{lost}: no layer needs to stay in float"
        if len(self.drops) == 1:
            return f"{lost}, and no layer may stay in float"
        best = f"the best is {kept}" if self.layers else "none improves it"
        return f"{lost}, and even {len(self.drops) - 1} float layers are not enough: {best}"


def choose_fallback(
    ranked: Iterable[str], drop: Callable[[tuple[str, ...]], float], *, max_drop: float, max_layers: int
) -> Fallback:
    """The fewest layers, the most sensitive first, that bring the loss of balanced accuracy within `max_drop`.

    Layers are added in the order of `ranked` (read lazily, at most `max_layers`) until `drop(layers)`, with all of them
    in float, is within the bound; then layers that turn out unnecessary are removed, the least sensitive first. If no
    set is within the bound, the best one tried is returned.
    """
    chosen: tuple[str, ...] = ()
    tried = [(drop(chosen), chosen)]
    candidates = islice(ranked, max_layers)
    while tried[-1][0] > max_drop and (name := next(candidates, None)) is not None:
        chosen = (*chosen, name)
        tried.append((drop(chosen), chosen))
    drops = tuple(lost for lost, _ in tried)
    lost, chosen = min(tried, key=lambda trial: (trial[0] > max_drop, trial[0], len(trial[1])))
    if lost <= max_drop:
        for name in chosen[-2::-1]:  # without the last one the bound is missed
            fewer = tuple(other for other in chosen if other != name)
            if (reduced := drop(fewer)) <= max_drop:
                lost, chosen = reduced, fewer
    return Fallback(chosen, lost, drops, max_drop)


def fallback_layers(model: nn.Module, deploy: nn.Module, pixels: Batch, targets: Ints, recipe: Recipe) -> Fallback:
    """The layers of a trained QAT model to keep in float, so that it loses at most `gate.max_drop` against `deploy`.

    Measured on prepared validation pixels uint8 [n, size, size, 3] with labels [n]; at most `quantize.fallback` layers
    are kept in float, none if the model is within the bound. Prints the result.
    """
    device = pick_device(recipe.run.device)
    student = logits_of(copy.deepcopy(deploy).to(device), pixels, device)
    mixed = MixedPrecision(model, pixels, targets, device=device, reference=student)

    def ranked() -> Iterator[str]:
        rows = balanced_rows(targets, SAMPLE, recipe.run.seed)
        sample = MixedPrecision(model, pixels[rows], targets[rows], device=device)
        yield from most_sensitive(
            {name: sample.only_int8(name) for name in track(list(sample.layers), "layer by layer")}
        )

    fallback = choose_fallback(
        ranked(),
        lambda names: mixed.all_but(names).drop,
        max_drop=recipe.gate.max_drop,
        max_layers=recipe.quantize.fallback,
    )
    say(f"  {escape(str(fallback))}")
    return fallback


def most_sensitive(only_int8: dict[str, Degradation]) -> list[str]:
    """Layers by the increase of the NLL when only that layer is quantized, the most sensitive first."""
    return sorted(only_int8, key=lambda name: -only_int8[name].nll_increase)


def balanced_rows(targets: Ints, count: int, seed: int) -> Ints:
    """At most `count` rows of labels [n], drawn from the classes in turn; fewer rows are a prefix of more."""
    order = np.random.default_rng((seed, 11)).permutation(len(targets))
    turn = np.zeros(len(targets), dtype=np.int64)
    for label in np.unique(targets):
        own = targets[order] == label
        turn[own] = np.arange(own.sum())
    return np.asarray(order[np.argsort(turn, kind="stable")][:count], dtype=np.int64)
