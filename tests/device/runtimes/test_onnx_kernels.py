"""ONNX Runtime's int8 kernels: the exact ones only where the others saturate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from eyas_device.runtimes.onnx import open_session, saturates


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", ["fpu avx2 avx512f avx512_vnni"], False),
        ("x86_64", ["fpu avx2 avx_vnni"] * 2, False),
        ("AMD64", ["fpu avx2 avx512_vnni"], False),
        ("x86_64", ["fpu avx2 avx512f"], True),
        ("x86_64", ["fpu avx2 avx_vnni", "fpu avx2"], True),
        ("x86_64", [], True),
        ("aarch64", [], False),
    ],
)
def test_exact_kernels_where_a_core_has_no_vnni(machine: str, flags: list[str], expected: bool, tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "".join(f"processor\t: {n}\nvmx flags\t: x\nflags\t\t: {one}\n\n" for n, one in enumerate(flags))
    )
    assert saturates(machine, cpuinfo) is expected


def test_exact_kernels_where_the_flags_are_unknown(tmp_path: Path) -> None:
    assert saturates("x86_64", tmp_path / "none")
    assert not saturates("aarch64", tmp_path / "none")


@pytest.mark.parametrize(
    ("channels", "filters", "group", "kernel", "size"),
    [
        (64, 64, 1, 1, 8),  # pointwise
        (64, 64, 1, 1, 1),  # a matrix times a vector
        (24, 8, 1, 1, 8),  # too few filters for the fast pointwise kernel
        (12, 32, 1, 3, 8),
        (3, 16, 1, 3, 9),
        (64, 64, 64, 3, 8),  # depthwise
        (72, 72, 72, 5, 8),  # depthwise, not a multiple of 16
    ],
)
def test_sums_of_the_largest_products_do_not_saturate(
    channels: int, filters: int, group: int, kernel: int, size: int, tmp_path: Path
) -> None:
    """Whichever kernels this processor gets: two products of 255 and 127 exceed 16 bits."""
    rng = np.random.default_rng(0)
    depth = channels // group * kernel * kernel
    weights = rng.choice(np.array([-127, 127, 127], np.int8), (filters, channels // group, kernel, kernel))
    pixels = rng.choice(np.array([0, 254, 255, 255], np.uint8), (1, channels, size, size))
    constants = {
        "x_scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w": weights,
        "w_scale": np.ones(filters, np.float32),
        "w_zero": np.zeros(filters, np.int8),
        "y_scale": np.float32(depth * 127),
        "y_zero": np.uint8(0),
    }
    out = size - kernel + 1
    graph = helper.make_graph(
        [helper.make_node("QLinearConv", ["x", *constants], ["y"], group=group)],
        "sums",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, pixels.shape)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, (1, filters, out, out))],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    path = tmp_path / "sums.onnx"
    path.write_bytes(model.SerializeToString())
    found = open_session(path, ["CPUExecutionProvider"], threads=1).run(None, {"x": pixels})[0]
    windows = np.lib.stride_tricks.sliding_window_view(pixels[0].astype(np.int64), (kernel, kernel), axis=(1, 2))
    kernels = weights.astype(np.int64)
    per_filter = channels // group
    sums = np.stack(
        [
            np.einsum("chwij,cij->hw", windows[start : start + per_filter], kernels[number])
            for number, start in ((n, n // (filters // group) * per_filter) for n in range(filters))
        ]
    )
    expected = np.clip(np.rint(sums / (depth * 127)), 0, 255)
    assert sums.max() > 2**15
    np.testing.assert_array_equal(found[0], expected)
