"""Match the tensors of a float .tflite to the operations of the QAT model by their values on one image."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from ai_edge_litert.schema_py_generated import BuiltinOperator
from torch import Tensor, nn

from eyas_host.export.litert_names import modules_of
from eyas_host.quant.graph import layer_name
from eyas_host.quant.quantizers import Affine
from eyas_host.support.errors import CompileError

Array = npt.NDArray[np.float32]
Bounds = tuple[float, float]

PIXELS: Bounds = (0.0, 255.0)
_HARD_SIGMOID_TOP = 6.0
"""A hard-sigmoid compiles to relu6(x + 3) / 6: the inner tensor is six times the outer one."""
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
_SAME_AS_INPUT = frozenset({"PAD", "RESHAPE", "TRANSPOSE", "MAX_POOL_2D"})
_WITHOUT_DELEGATES = {"experimental_op_resolver_type": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
_KINDS = {code: name for name, code in vars(BuiltinOperator).items() if not name.startswith("_")}


class Recorder(nn.Module):
    """Passes a tensor through and records its value, its quantization range and the order of execution."""

    def __init__(self, grid: Affine, order: list[Recorder]) -> None:
        super().__init__()
        self.bounds = grid.bounds
        self.value = torch.empty(0)
        self._order = order

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` unchanged."""
        self.value = x.detach().clone()
        self._order.append(self)
        return x


def probe(size: int) -> Tensor:
    """Random probe image used to match tensors by value: float [1, 3, size, size], integers 0..255."""
    return torch.randint(0, 256, (1, 3, size, size), generator=torch.Generator().manual_seed(1)).float()


def channels_last(value: Tensor) -> Array:
    """A tensor in LiteRT's layout."""
    return np.asarray((value.permute(0, 2, 3, 1) if value.ndim == 4 else value).numpy())


def kind_of(model: Any, operator: Any) -> str:
    """Operator type: `CONV_2D`."""
    code = model.operatorCodes[operator.opcodeIndex]
    return str(_KINDS[max(code.builtinCode, code.deprecatedBuiltinCode)])


def output_name(model: Any, operator: Any) -> str:
    """Name of an operator's first output tensor."""
    return str(model.subgraphs[0].tensors[operator.outputs[0]].name.decode())


def tensor_values(content: bytes, pixels: Array) -> dict[str, Array]:
    """Name -> value of every activation of the float model on one image."""
    interpreter: Any = Interpreter(
        model_content=content, experimental_preserve_all_tensors=True, num_threads=1, **_WITHOUT_DELEGATES
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], pixels)
    interpreter.invoke()
    return {d["name"]: interpreter.get_tensor(d["index"]) for d in interpreter.get_tensor_details() if d["name"]}


def activation_ranges(
    model: Any,
    tensors: Mapping[str, Array],
    recorders: Mapping[str, Recorder],
    order: list[Recorder],
    paths: Mapping[str, str],
) -> dict[str, Bounds]:
    """Map each activation tensor with a learned range to that range.

    Among several equal values (all zeros after a dead activation) a tensor gets that of a module in its name, else the
    first one not taken yet, because both graphs run in the same order. `order` lists the recorders in order of
    execution, `paths` leads from names to modules (see `litert_names`).

    Raises `CompileError` for a learned range that matches no tensor.
    """
    graph = model.subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    operations = {id(recorder): operation for operation, recorder in recorders.items()}
    candidates = [c for recorder in order for c in _candidates(operations[id(recorder)], recorder)]
    taken: set[_Candidate] = set()
    matched = {names[graph.inputs[0]]: PIXELS}
    for operator in graph.operators:
        output = output_name(model, operator)
        if kind_of(model, operator) in _SAME_AS_INPUT:
            if names[operator.inputs[0]] in matched:
                matched[output] = matched[names[operator.inputs[0]]]
        elif equal := [candidate for candidate in candidates if candidate.has_value(tensors[output])]:
            modules = set(modules_of(output, paths))
            equal.sort(key=lambda candidate: layer_name(candidate.operation) not in modules)
            candidate = next((candidate for candidate in equal if candidate not in taken), equal[0])
            taken.add(candidate)
            matched[output] = candidate.bounds
    lost = sorted(set(recorders) - {candidate.operation for candidate in taken})
    if lost:
        raise CompileError(
            f"{len(lost)} of {len(recorders)} learned ranges match no tensor of the .tflite, "
            f"first {'; '.join(lost[:3])}"
        )
    return matched


@dataclass(frozen=True, eq=False)
class _Candidate:
    operation: str
    value: Array
    bounds: Bounds

    def has_value(self, other: Array) -> bool:
        """Whether a tensor has the same values up to float rounding."""
        if self.value.size != other.size:
            return False
        slack = 1e-4 * (1e-3 + np.abs(self.value).max())
        return bool(np.allclose(self.value.reshape(-1), other.reshape(-1), rtol=1e-3, atol=slack))


def _candidates(operation: str, recorder: Recorder) -> Iterator[_Candidate]:
    """The tensors an operation may correspond to in the .tflite, in order of execution."""
    value = channels_last(recorder.value)
    if "hardsigmoid" in operation:
        low, high = recorder.bounds
        yield _Candidate(operation, _HARD_SIGMOID_TOP * value, (_HARD_SIGMOID_TOP * low, _HARD_SIGMOID_TOP * high))
    yield _Candidate(operation, value, recorder.bounds)
