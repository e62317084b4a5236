"""First weights for students that ship with Eyas: made by `eyas pretrain`, no download needed.

Beside each `NETWORK.safetensors` (fp16, timm's names, with `mean` and `std`) lie its card `NETWORK.md` and the
settings and figures of its training, `NETWORK.json`.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGED = Path(__file__).with_name("pretrained_weights")
_FOLDER = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "models" / "weights"
"""`models/weights` of the repository, or its copy in an installed wheel."""
TRAINED_AT = 128
"""Side of the images that they were trained with last, pixels."""


def networks() -> list[str]:
    """The networks (names of timm's) that have one."""
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def start_file(network: str) -> Path | None:
    """The weights of a network, or None where none are shipped for it."""
    path = _FOLDER / f"{network}.safetensors"
    return path if network in networks() else None


def chosen(network: str, weights: str, *, trained: bool) -> Path | None:
    """What a recipe's `weights` take of here when no other weights were found, or None.

    `trained`: `auto` may not fall back on it, as for a teacher.
    """
    return start_file(network) if weights == "pretrained" or (weights == "auto" and not trained) else None


def card_file(network: str) -> Path:
    """What is said of a network's start, for people."""
    return _FOLDER / f"{network}.md"


def record_file(network: str) -> Path:
    """What is said of a network's start, as JSON: `settings` and `result` of its training."""
    return _FOLDER / f"{network}.json"
