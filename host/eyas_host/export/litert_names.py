"""Which module a tensor of a converted .tflite belongs to: the converter writes classes and attributes into its name.

`package.FromPixels/package.Network_network/torch.nn.modules.conv.Conv2d_stem;1` is the output of `network.stem`. Where
operators were fused, the name lists all of their modules, separated by semicolons, the one that computes first last.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def class_paths(root: nn.Module) -> dict[str, str]:
    """Path of classes as in tensor names -> path of the module below `root`, for every module of a network."""
    paths: dict[str, str] = {}

    def visit(module: nn.Module, classes: str, path: str) -> None:
        for name, child in module.named_children():
            below = f"{classes}/{_class_of(child)}_{name}"
            paths[below] = f"{path}{name}"
            visit(child, below, f"{path}{name}.")

    visit(root, _class_of(root), "")
    return paths


def modules_of(tensor: str, paths: Mapping[str, str]) -> list[str]:
    """Modules that a tensor's name lists, in its order."""
    return [paths[part] for part in tensor.split(";") if part in paths]


def _class_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
