"""An ONNX graph that is rewritten: its constants, and who writes and reads each value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import helper, numpy_helper

Array = npt.NDArray[Any]


class Graph:
    """The graph of an ONNX model, changed in place.

    Attributes:
        nodes: the nodes in order of execution, as they are now.

    """

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._constants = {tensor.name: tensor for tensor in graph.initializer}

    @property
    def nodes(self) -> list[Any]:
        return list(self._graph.node)

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the inputs."""
        return {
            value.name: tuple(dimension.dim_value for dimension in value.type.tensor_type.shape.dim)
            for value in self._graph.input
        }

    def writer(self, name: str) -> Any | None:
        """The node that computes a value, None for inputs and constants."""
        return next((node for node in self._graph.node if name in node.output), None)

    def readers(self, name: str) -> list[Any]:
        """The nodes that read a value."""
        return [node for node in self._graph.node if name in node.input]

    def only_reader(self, name: str) -> Any | None:
        """The node that reads a value, None if there are several or if it is an output of the graph."""
        readers = self.readers(name)
        return readers[0] if len(readers) == 1 and name not in {value.name for value in self._graph.output} else None

    def is_constant(self, name: str) -> bool:
        """Whether a value is a constant."""
        return name in self._constants

    def constant(self, name: str) -> Array:
        """The values of a constant."""
        values: Array = numpy_helper.to_array(self._constants[name])
        return values

    def add(self, name: str, values: Array) -> str:
        """Add a constant, unless it is there, and return its name."""
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name)
            self._graph.initializer.append(self._constants[name])
            self._constants[name] = self._graph.initializer[-1]
        return name

    def note(self, name: str, text: str) -> None:
        """Write a note beside a constant."""
        self._constants[name].doc_string = text

    def place(self, nodes: Sequence[Any], *, before: Any) -> None:
        """Insert nodes before another one."""
        position = self.nodes.index(before)
        for offset, node in enumerate(nodes):
            self._graph.node.insert(position + offset, node)

    def remove(self, *nodes: Any) -> None:
        """Remove nodes."""
        for node in nodes:
            self._graph.node.remove(node)

    def bypass(self, node: Any, source: str) -> None:
        """Let the readers of a node read `source` instead, and remove the node."""
        (name,) = node.output
        for reader in self.readers(name):
            for position, value in enumerate(reader.input):
                if value == name:
                    reader.input[position] = source
        self._graph.node.remove(node)

    def remove_unused(self) -> None:
        """Remove the nodes and the constants that nothing reads any more."""
        outputs = {value.name for value in self._graph.output}
        while unread := [
            node for node in self.nodes if not any(name in outputs or self.readers(name) for name in node.output)
        ]:
            self.remove(*unread)
        used = {name for node in self._graph.node for name in node.input}
        for tensor in [tensor for tensor in self._graph.initializer if tensor.name not in used]:
            self._graph.initializer.remove(tensor)
            del self._constants[tensor.name]


def attributes(node: Any) -> dict[str, Any]:
    """Name -> value of a node's attributes."""
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def set_attributes(node: Any, **values: Any) -> None:
    """Set attributes of a node."""
    kept = [attribute for attribute in node.attribute if attribute.name not in values]
    del node.attribute[:]
    node.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in values.items())])
