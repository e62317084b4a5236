"""Rules of `[augment] forbid`: a chest X-ray is never mirrored, text is never rotated.

`forbid` overrides every default. A recipe that enables what it forbids is an error, and so are two allowed
augmentations that compose to the forbidden one (a half turn and one flip make the other flip).
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
"""Setting of `[augment]` -> the value that disables it."""


def without_forbidden(augment: AugmentSection) -> AugmentSection:
    """Disable every augmentation that `forbid` names."""
    return msgspec.structs.replace(augment, **{name: OFF[name] for name in augment.forbid if name in OFF})


def augment_errors(augment: AugmentSection, section: object) -> Iterable[str]:
    """Contradictions between `forbid` and the keys in the file's `section`; a forbidden default is just disabled."""
    explicit = set(section) if isinstance(section, dict) else set()
    defaults = {name: OFF[name] for name in augment.forbid if name in OFF and name not in explicit}
    for contradiction in _contradictions(msgspec.structs.replace(augment, **defaults)):
        yield f"[augment] {contradiction}: ruled out by forbid = {list(augment.forbid)}; remove one of them"


def _contradictions(augment: AugmentSection) -> Iterable[str]:
    for name in augment.forbid:
        if name in OFF and getattr(augment, name) != OFF[name]:
            yield f"{name} = {str(getattr(augment, name)).lower()}"
    half_turn = "quarter_turns" if augment.quarter_turns else "rotate_degrees" if augment.rotate_degrees > 135 else ""
    for flip, other in (("horizontal_flip", "vertical_flip"), ("vertical_flip", "horizontal_flip")):
        if flip in augment.forbid and getattr(augment, other) and half_turn:
            yield f"{other} and {half_turn} (one flip and a half turn make the other flip)"
    if "quarter_turns" in augment.forbid and augment.horizontal_flip and augment.vertical_flip:
        yield "horizontal_flip and vertical_flip (together they make a half turn)"
    if "quarter_turns" in augment.forbid and augment.rotate_degrees > 45:
        yield f"rotate_degrees = {augment.rotate_degrees} (comes close to a quarter turn)"
