"""Export to OpenVINO IR, with uint8 pixels as input (PrePostProcessor)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from nncf.torch.function_hook import is_wrapped
from openvino.frontend import OpConversionFailure
from openvino.preprocess import PrePostProcessor
from torch import nn

from eyas_device.bundle import Precision
from eyas_host.quant.qdq import round_weights
from eyas_host.support.errors import CompileError
from eyas_host.support.quiet import quiet_tools


def compile_openvino(model: nn.Module, path: Path, *, input_size: int, precision: Precision) -> str:
    """Write `path` (.xml) and its .bin: uint8 [1, size, size, 3] BGR pixels in, float32 logits [1, classes] out.

    `model` is the folded network (fp32) or the QAT model (int8). Returns a note on the file. Raises `CompileError` if
    the conversion fails or an int8 model has lost its quantizers.
    """
    example = torch.zeros(1, 3, input_size, input_size)
    network = round_weights(model) if is_wrapped(model) else model.eval()
    try:
        with quiet_tools():  # the tracer warns about the quantizers' levels, which are constants
            converted: Any = ov.convert_model(network, example_input=example, input=[1, 3, input_size, input_size])
    except (RuntimeError, OpConversionFailure) as error:
        reason = str(error).strip().splitlines()[-1]  # names the operations; source locations come first
        raise CompileError(f"{path.name}: OpenVINO cannot convert the network: {reason}") from None
    steps = PrePostProcessor(converted)
    steps.input(0).tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input(0).model().set_layout(ov.Layout("NCHW"))
    converted = steps.build()
    converted.inputs[0].get_tensor().set_names({"pixels"})
    converted.outputs[0].get_tensor().set_names({"logits"})
    quantizers = sum(op.get_type_name() == "FakeQuantize" for op in converted.get_ops())
    if (precision == "int8") != bool(quantizers):
        raise CompileError(f"{path.name}: {quantizers} quantizers in an {precision} model")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        ov.save_model(converted, written, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            written.with_suffix(suffix).replace(path.with_suffix(suffix))
    return f"{quantizers} quantizers" if quantizers else ""
