"""The operations of a folded network in order of execution, and where an int8 runtime quantizes.

The rule is one table of operations; an operation that is not in the table is refused by name. A *layer* is an operation
with a weight, named by the path of its module: `backbone.blocks.0.0.conv_dw`.
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
"""The operation that computes the logits; it and its pooling stay in float."""

WEIGHTED = frozenset({"conv2d"})
"""Operations whose weight is quantized: per output channel, symmetric, -127..127."""

QUANTIZED = frozenset({"sub", "add", "mul", "mean", "adaptive_avg_pool2d", "relu", "relu6", "hardswish", "hardsigmoid"})
"""Operations whose output is quantized per tensor."""

CLAMPS = frozenset({"relu", "relu6"})
"""Activations that int8 kernels fuse into the previous operation, so that only the clamped value is quantized."""

TRANSPARENT = frozenset({"flatten", "dropout", "pad", "reshape", "view", "contiguous", "max_pool2d"})
"""Operations that only move or select values: the output range equals the input range."""

FLOAT = frozenset({"hardswish"})
"""Operations executed in float; their inputs need no activation quantizer."""

OUTPUT = "output"
"""Marks the network's output among an operation's readers."""

_ALIASES = {"__add__": "add", "__iadd__": "add", "add_": "add", "__mul__": "mul", "__sub__": "sub", "relu_": "relu"}


@dataclass(frozen=True)
class Operation:
    """One function call in the network.

    Attributes:
        name: path of its module, function and number: `backbone/conv_stem/conv2d/0`.
        kind: canonical name of the function: `conv2d`, `add`.
        source: the operation that computed its first argument, or "" for the network's input.
        readers: operations that read its output, transparent ones skipped; `OUTPUT` for the network's output.

    """

    name: str
    kind: str
    source: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Placement:
    """Positions of the quantizers in a network.

    Attributes:
        activations: operations whose output is quantized, in order of execution.
        weights: operations whose weight is quantized, in order of execution.
        added_activations: how many of `activations` NNCF did not place.
        added_weights: how many of `weights` NNCF did not place.

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
        operation: name of its operation, a key of `weight_quantizers`.
        reads: the operation whose quantizer applies to the layer's input, a key of `activation_quantizers`.
        writes: the operation whose quantizer applies to the layer's output, fused activation included.

    """

    name: str
    operation: str
    reads: str
    writes: str


def weighted_layers(model: nn.Module, example: Tensor) -> list[WeightedLayer]:
    """Return the layers of a folded network in order of execution, quantized or not.

    `reads` and `writes` refer to the complete int8 network: where layers are kept in float, some of these quantizers do
    not exist. The classifier is excluded: it is never quantized.

    Args:
        model: folded network or QAT model.
        example: float pixels ``[1, 3, H, W]``.

    Raises:
        CompressError: an operation of the network has no rule; the message names it.

    """
    placed = set(required_placement(model, example).activations)
    found = operations(model, example)
    return [
        WeightedLayer(
            name=layer_name(operation.name),
            operation=operation.name,
            reads=quantized_source(found, operation, placed),
            writes=operation.name if operation.name in placed else operation.readers[0],
        )
        for operation in found.values()
        if operation.kind in WEIGHTED
    ]


def layer_name(operation: str) -> str:
    """`backbone/conv_stem/conv2d/0` -> `backbone.conv_stem`."""
    return ".".join(operation.split("/")[:-2])


def required_placement(model: nn.Module, example: Tensor, keep_float: Collection[str] = ()) -> Placement:
    """Return every point at which an int8 runtime quantizes, whatever is quantized now.

    The rule: each layer's weight, each layer's output, and the inputs of integer operations. A clamp is fused into the
    previous operation, so that only the clamped value is quantized; a hard-sigmoid likewise (int8 runtimes compute it
    as ``relu6(x + 3)``). The classifier and its pooling stay in float: they are a few kilobytes, and quantized logits
    would tie.

    Args:
        model: folded network, quantized or not.
        example: float pixels ``[1, 3, H, W]``.
        keep_float: names of layers to keep in float; tensors that only they read are not quantized either.

    Raises:
        CompressError: an operation has no rule, or a layer does not exist; the message names it.

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
    """Return the operations of the layers ``names``. Raises `CompressError` for an unknown layer."""
    known = [operation for operation in found.values() if operation.kind in WEIGHTED]
    paths = [layer_name(operation.name) for operation in known]
    for name in names:
        if name not in paths:
            close = get_close_matches(name, paths, n=4, cutoff=0.4)
            raise CompressError(
                f"keep_float: {name!r} is not a layer of this network; similar names: {', '.join(close or paths[:4])}"
            )
    return [operation for operation, path in zip(known, paths, strict=True) if path in set(names)]


def quantized_source(found: Mapping[str, Operation], operation: Operation, placed: Collection[str]) -> str:
    """The nearest operation in ``placed`` upstream of ``operation``: its quantizer applies to the input."""
    source = operation.source
    while source not in placed:
        source = found[source].source
    return source


def operations(model: nn.Module, example: Tensor) -> dict[str, Operation]:
    """Return the operations of a network by name, in order of execution; quantizers are skipped.

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
        known = WEIGHTED | QUANTIZED | TRANSPARENT | {CLASSIFIER}
        if operation.kind not in known:
            raise CompressError(
                f"no quantization rule for operation {operation.kind!r} at {operation.name!r}; "
                f"allowed: {', '.join(sorted(known))}"
            )
        kinds = {found[reader].kind for reader in operation.readers if reader != OUTPUT}
        fusible = len(operation.readers) == 1 and operation.kind in WEIGHTED
        if "hardsigmoid" in kinds and not fusible:
            raise CompressError(f"the hard-sigmoid after {operation.name!r} has no convolution to be fused into")


def _fused_activation(operation: Operation, found: Mapping[str, Operation]) -> str:
    """The activation fused into an operation, or ""."""
    (reader, *others) = operation.readers
    if others or reader == OUTPUT or operation.kind in CLAMPS:
        return ""
    return reader if found[reader].kind in CLAMPS | {"hardsigmoid"} else ""


def _fused_into(activation: Operation, found: Mapping[str, Operation]) -> str:
    """The operation that an activation is fused into, or ""."""
    source = found.get(activation.source)
    return source.name if source and _fused_activation(source, found) == activation.name else ""


def _node_name(data: Mapping[str, Any]) -> str:
    """Name of a graph node's operation, `OUTPUT`, or "" for an input or a constant."""
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
    """The operations that read a node's output; hooks and transparent operations are skipped."""
    for reader in graph.successors(node):
        if _is_hook(names[reader]) or kinds[reader] in TRANSPARENT:
            yield from _readers(graph, reader, names, kinds)
        else:
            yield names[reader]


def _source(graph: Any, node: int, names: Mapping[int, str]) -> str:
    """The operation that computed a node's first argument, hooks skipped; "" for the network's input."""
    _, source = min((data["meta"].input_port, source) for source, _, data in graph.in_edges(node, data=True))
    return _source(graph, source, names) if _is_hook(names[source]) else names[source]
