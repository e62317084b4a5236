"""What a domain rules out: a chest X-ray is never mirrored, text is never turned.

`forbid` wins over every default; what a recipe itself switches on although it forbids it is a contradiction, and so are
two allowed augmentations that together make the forbidden one (half a turn and a flip are the other flip).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from eyas_host.recipe.augment import AugmentSection

OFF: dict[str, bool | int | float] = {
    "horizontal_flip": False,
    "vertical_flip": False,
    "quarter_turns": False,
    "rotate_degrees": 0.0,
    "crop_scale": 1.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "randaugment": 0,
    "cutmix": 0.0,
    "mixup": 0.0,
}
"""Setting of `[augment]` -> the value that leaves images as they are."""


def allowed(augment: AugmentSection) -> AugmentSection:
    """The same section with everything switched off that `forbid` names."""
    return msgspec.structs.replace(augment, **{name: OFF[name] for name in augment.forbid if name in OFF})


def forbidden(augment: AugmentSection, given: object) -> Iterable[str]:
    """Faults of a section of which the recipe file wrote the keys of `given`; a forbidden default is just off."""
    written = set(given) if isinstance(given, dict) else set()
    silent = {name: OFF[name] for name in augment.forbid if name in OFF and name not in written}
    for contradiction in _contradictions(msgspec.structs.replace(augment, **silent)):
        yield f"[augment] {contradiction}: ruled out by forbid = {list(augment.forbid)}; take one of them back"


def _contradictions(augment: AugmentSection) -> Iterable[str]:
    for name in augment.forbid:
        if name in OFF and getattr(augment, name) != OFF[name]:
            yield f"{name} = {str(getattr(augment, name)).lower()}"
    half_turn = "quarter_turns" if augment.quarter_turns else "rotate_degrees" if augment.rotate_degrees > 135 else ""
    for flip, other in (("horizontal_flip", "vertical_flip"), ("vertical_flip", "horizontal_flip")):
        if flip in augment.forbid and getattr(augment, other) and half_turn:
            yield f"{other} and {half_turn} (one flip and half a turn make the other flip)"
    if "quarter_turns" in augment.forbid and augment.horizontal_flip and augment.vertical_flip:
        yield "horizontal_flip and vertical_flip (together they are half a turn)"
    if "quarter_turns" in augment.forbid and augment.rotate_degrees > 45:
        yield f"rotate_degrees = {augment.rotate_degrees} (comes near a quarter turn)"
