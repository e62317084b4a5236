"""Pretrained student weights that ship with Eyas, made by `eyas pretrain`; no download needed.

Beside each `NETWORK.safetensors` (fp16, timm's names, with `mean` and `std`) lie its card `NETWORK.md` and the
settings and metrics of its training, `NETWORK.json`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGED = Path(__file__).with_name("pretrained_weights")
_WEIGHTS_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "models" / "weights"
"""`models/weights` of the repository, or its copy in an installed wheel."""
TRAINED_AT = 128
"""Image side at the end of their training, pixels."""


def networks() -> list[str]:
    """Timm's names of the networks with pretrained weights."""
    return sorted(path.stem for path in _WEIGHTS_FOLDER.glob("*.safetensors"))


def weights_file(network: str) -> Path | None:
    """The weights of a network, or None if none ship for it."""
    path = _WEIGHTS_FOLDER / f"{network}.safetensors"
    return path if network in networks() else None


def pretrained_file(network: str, weights: str, *, trained: bool) -> Path | None:
    """The pretrained weights for a recipe's `weights` setting after all other origins failed, or None.

    `trained`: `auto` must not fall back to them, as for a teacher.
    """
    return weights_file(network) if weights == "pretrained" or (weights == "auto" and not trained) else None


def card_file(network: str) -> Path:
    """The model card of a network's weights."""
    return _WEIGHTS_FOLDER / f"{network}.md"


def record_file(network: str) -> Path:
    """`settings` and `result` of a network's pretraining, as JSON."""
    return _WEIGHTS_FOLDER / f"{network}.json"
