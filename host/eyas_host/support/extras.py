"""The optional packages of Eyas's extras, and how to install them: the one place of this half to change once Eyas is
published.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec

_FLEET = frozenset(("amqtt", "cryptography", "securesystemslib", "sqlalchemy"))
_TRAIN = frozenset(
    (
        *(
            "accelerate",
            "ai_edge_quantizer",
            "cleanlab",
            "fsspec",
            "jinja2",
            "litert_torch",
            "matplotlib",
            "nncf",
            "onnx",
            "onnxruntime",
        ),
        *("openvino", "optuna", "PIL", "safetensors", "scipy", "sklearn", "timm", "torch", "torch_pruning"),
        "torchvision",
    )
)

NEW = "pip install ./device '.[{extra}]'"
"""The line for a new environment, in a checkout; `pip install 'eyas[{extra}]'` once it is published."""


def install_line(extra: str) -> str:
    """The line that adds an extra to the environment of this program, which has Eyas: pip takes its own list for it."""
    return f"{sys.executable} -m pip install 'eyas[{extra}]'"


def extra_of(module: str) -> str | None:
    """The extra that contains a module, None if there is none."""
    name = module.partition(".")[0]
    return "train" if name in _TRAIN else "fleet" if name in _FLEET else None


def missing_modules(modules: Iterable[str]) -> list[str]:
    """Those of the extras' modules that are not installed here, in order."""
    return sorted(name for name in {*modules} if extra_of(name) and not _is_installed(name))


def _is_installed(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    return find_spec(module) is not None
