"""The operations of a folded network in order of execution, and which of them an int8 runtime rounds.

The rule comes from one table of operations; anything the table does not know is refused by name. A *layer* is an
operation with a weight of its own, under the path of its module: `backbone.blocks.0.0.conv_dw`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from nncf.torch.function_hook import build_graph
from torch import Tensor, nn

from eyas_host.support.errors import CompressError

CLASSIFIER = "linear"
"""The operation that makes the logits; it and what pools for it stay float."""

WEIGHTED = frozenset({"conv2d"})
"""Operations with a weight that is quantized per output channel, symmetric, -127..127."""

ROUNDED = frozenset({"sub", "add", "mul", "mean", "adaptive_avg_pool2d", "relu", "relu6", "hardswish", "hardsigmoid"})
"""Operations whose output is quantized per tensor."""

CLAMPS = frozenset({"relu", "relu6"})
"""Activations that int8 kernels fuse into the operation before them, so that only the clamped value is rounded."""

TRANSPARENT = frozenset({"flatten", "dropout", "pad", "reshape", "view", "contiguous", "max_pool2d"})
"""Operations that move or choose values without changing them: the range before is the range behind."""

FLOAT = frozenset({"hardswish"})
"""Operations that no runtime computes in integers: what they read need not be rounded for them."""

OUTPUT = "output"
"""Stands for the network's end among an operation's readers."""

_ALIASES = {"__add__": "add", "__iadd__": "add", "add_": "add", "__mul__": "mul", "__sub__": "sub", "relu_": "relu"}


@dataclass(frozen=True)
class Operation:
    """One call of a function in the network.

    Attributes:
        name: path of its module, function and number: `backbone/conv_stem/conv2d/0`.
        kind: the function under its usual name: `conv2d`, `add`.
        source: the operation that made its first argument, or "" for the network's input.
        readers: operations that read its output, seen through those that only move values; `OUTPUT` for the end.

    """

    name: str
    kind: str
    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """The quantizers of one network.

    Attributes:
        activations: operations whose output is quantized, in order of execution.
        weights: operations whose weight is quantized, in order of execution.
        added_activations: how many of `activations` NNCF had left out.
        added_weights: how many of `weights` NNCF had left out.

    """

    activations: tuple[str, ...]
    weights: tuple[str, ...]
    added_activations: int = 0
    added_weights: int = 0


@dataclass(frozen=True)
class WeightedLayer:
    """An operation whose weight can be quantized, and the activation quantizers around it.

    Attributes:
        name: path of its module, which is what `keep_float` takes.
        operation: its name among the operations, the key of `weight_quantizers`.
        reads: the operation whose quantizer rounds what the layer reads, a key of `activation_quantizers`.
        writes: the operation whose quantizer rounds what the layer, with its fused activation, writes.

    """

    name: str
    operation: str
    reads: str
    writes: str


def weighted_layers(model: nn.Module, example: Tensor) -> list[WeightedLayer]:
    """Return the layers of a folded network in order of execution, quantized already or not.

    `reads` and `writes` are those of the complete int8 network: where layers were left float, some of these quantizers
    are gone. The classifier is no layer: it is never quantized.

    Args:
        model: folded network or QAT model.
        example: float pixels ``[1, 3, H, W]``.

    Raises:
        CompressError: the network holds an operation that has no rule; the message names it.

    """
    placed = set(required_placement(model, example).activations)
    found = operations(model, example)
    return [
        WeightedLayer(
            name=layer_name(operation.name),
            operation=operation.name,
            reads=rounded_source(found, operation, placed),
            writes=operation.name if operation.name in placed else operation.readers[0],
        )
        for operation in found.values()
        if operation.kind in WEIGHTED
    ]


def layer_name(operation: str) -> str:
    """`backbone/conv_stem/conv2d/0` -> `backbone.conv_stem`."""
    return ".".join(operation.split("/")[:-2])


def required_placement(model: nn.Module, example: Tensor, keep_float: Collection[str] = ()) -> Placement:
    """Return every point at which an int8 runtime rounds, whatever is quantized now.

    The rule: each layer's weight; what each layer writes, and what an integer operation reads. A clamp is fused into
    the operation before it, so that only the clamped value is rounded; a hard-sigmoid likewise (int8 runtimes compute
    it as ``relu6(x + 3)``). The classifier stays float with what pools for it: it is a few kilobytes, and rounded
    logits would tie.

    Args:
        model: folded network, quantized already or not.
        example: float pixels ``[1, 3, H, W]``.
        keep_float: names of layers whose weight is not quantized; then what only they read is not rounded either.

    Raises:
        CompressError: the network holds an operation that has no rule, or no layer of such a name; the message says
            which.

    """
    found = operations(model, example)
    _check_rules(found)
    kept = {operation.name for operation in chosen_layers(found, keep_float)}
    integer = {name for name, operation in found.items() if operation.kind in WEIGHTED and name not in kept}
    weights = tuple(name for name in found if name in integer)
    activations = []
    for operation in reversed(found.values()):
        fused = _fused_activation(operation, found)
        if operation.kind in TRANSPARENT or operation.kind == CLASSIFIER:
            continue
        if fused:
            if operation.kind not in WEIGHTED and fused in integer:
                integer.add(operation.name)
            continue
        if operation.name in weights or _fused_into(operation, found) in weights or integer & set(operation.readers):
            activations.append(operation.name)
            if operation.kind not in WEIGHTED | FLOAT:
                integer.add(operation.name)
    return Placement(tuple(reversed(activations)), weights)


def chosen_layers(found: Mapping[str, Operation], names: Collection[str]) -> list[Operation]:
    """Return the operations of the layers ``names``. Raises `CompressError` for a name that no layer has."""
    known = [operation for operation in found.values() if operation.kind in WEIGHTED]
    paths = [layer_name(operation.name) for operation in known]
    for name in names:
        if name not in paths:
            close = get_close_matches(name, paths, n=4, cutoff=0.4)
            raise CompressError(
                f"keep_float: {name!r} is no layer of this network; close ones: {', '.join(close or paths[:4])}"
            )
    return [operation for operation, path in zip(known, paths, strict=True) if path in set(names)]


def rounded_source(found: Mapping[str, Operation], operation: Operation, placed: Collection[str]) -> str:
    """The operation of ``placed`` that rounds what ``operation`` reads."""
    source = operation.source
    while source not in placed:
        source = found[source].source
    return source


def operations(model: nn.Module, example: Tensor) -> dict[str, Operation]:
    """Return the operations of a network by name, in order of execution; quantizers are looked through.

    Args:
        model: folded network, quantized or not; it is run once.
        example: float pixels ``[1, 3, H, W]``.

    """
    graph = build_graph(model, example)
    names = {node: _node_name(data) for node, data in graph.nodes(data=True)}
    kinds = {node: _kind(data) for node, data in graph.nodes(data=True)}
    return {
        names[node]: Operation(
            name=names[node],
            kind=kinds[node],
            source=_source(graph, node, names),
            readers=tuple(_readers(graph, node, names, kinds)),
        )
        for node in graph.nodes
        if names[node] and names[node] != OUTPUT and not _is_hook(names[node])
    }


def _check_rules(found: Mapping[str, Operation]) -> None:
    for operation in found.values():
        known = WEIGHTED | ROUNDED | TRANSPARENT | {CLASSIFIER}
        if operation.kind not in known:
            raise CompressError(
                f"no quantization rule for operation {operation.kind!r} at {operation.name!r}; "
                f"known are {', '.join(sorted(known))}"
            )
        kinds = {found[reader].kind for reader in operation.readers if reader != OUTPUT}
        alone = len(operation.readers) == 1 and operation.kind in WEIGHTED
        if "hardsigmoid" in kinds and not alone:
            raise CompressError(f"the hard-sigmoid behind {operation.name!r} has no convolution to be fused into")


def _fused_activation(operation: Operation, found: Mapping[str, Operation]) -> str:
    """The activation that is computed together with an operation, or ""."""
    (reader, *others) = operation.readers
    if others or reader == OUTPUT or operation.kind in CLAMPS:
        return ""
    return reader if found[reader].kind in CLAMPS | {"hardsigmoid"} else ""


def _fused_into(activation: Operation, found: Mapping[str, Operation]) -> str:
    """The operation that an activation is computed together with, or ""."""
    source = found.get(activation.source)
    return source.name if source and _fused_activation(source, found) == activation.name else ""


def _node_name(data: Mapping[str, Any]) -> str:
    """The operation a graph's node stands for, `OUTPUT`, or "" for an input or a constant."""
    node_type = str(data["type"].value)
    return str(data["meta"].op_name) if node_type == "function_call" else node_type if node_type == OUTPUT else ""


def _kind(data: Mapping[str, Any]) -> str:
    """`backbone/conv_stem/conv2d/0` -> `conv2d`; ReLU6 is the hard-tanh between 0 and 6."""
    name = _node_name(data).split("/")[-2:][0]
    if name == "hardtanh":
        limits = data["meta"].kwargs
        return "relu6" if (limits.get("min_val"), limits.get("max_val")) == (0, 6) else name
    return _ALIASES.get(name, name)


def _is_hook(operation: str) -> bool:
    return "pre_hook__" in operation or "post_hook__" in operation


def _readers(graph: Any, node: int, names: Mapping[int, str], kinds: Mapping[int, str]) -> Iterator[str]:
    """The operations that read a node's output, seen through hooks and operations that only move values."""
    for reader in graph.successors(node):
        if _is_hook(names[reader]) or kinds[reader] in TRANSPARENT:
            yield from _readers(graph, reader, names, kinds)
        else:
            yield names[reader]


def _source(graph: Any, node: int, names: Mapping[int, str]) -> str:
    """The operation that a node's first argument comes from, seen through hooks; "" for the network's input."""
    _, source = min((data["meta"].input_port, source) for source, _, data in graph.in_edges(node, data=True))
    return _source(graph, source, names) if _is_hook(names[source]) else names[source]
