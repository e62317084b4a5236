"""The likely cause of an alarm, from what moved, where and how; and what to do about it.

Which measures moved tells what changed: images alone (light, season, a moved camera), images that also vary less or
more, the model's certainty without the images (the task changed), or the classes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from eyas_host.fleet.drift.alarms import Alarm

GRADUAL_S = 6 * 3600.0
"""Devices of one cause whose drift began further apart did not change at one moment."""

DIRTY = "dirty, moved or defocused lens"
NEW_CLASS = "new kind of object in the view"
CLASSES = "other mix of classes"
SEASON = "season or weather"
SHIFT = "shift of the whole fleet"
SITE = "change at the site"
PERIODIC = "pattern of the day that the first days did not have"
CERTAINTY = "predictions changed, images did not"
UNKNOWN = "unknown"

ADVICE = {
    DIRTY: "look at its image (`eyas send {device} snapshot`), clean the lens, check view and focus",
    NEW_CLASS: "label uncertain samples of it; if the object is to be told apart, add a class and retrain",
    CLASSES: "check that the mix is real; nothing is wrong with the camera. Compare the accuracy on labelled samples",
    SEASON: "label a random share of recent images and retrain with old and new data",
    SHIFT: "look for what changed everywhere at that time: a release, a setting, a supplier; roll back or retrain",
    SITE: "look for what changed at the site at that time: light, material, a moved line",
    PERIODIC: "retrain with images of these hours, or take it as usual: `eyas drift --accept {device}`",
    CERTAINTY: "label a random share: the labels may have changed their meaning",
    UNKNOWN: "look at its image (`eyas send {device} snapshot`) and label a random share",
}

CALLS_FOR_RETRAINING = frozenset({NEW_CLASS, SEASON, SHIFT, PERIODIC})
"""Causes that new images help against: the world changed. A dirty lens needs a cloth, a site somebody who looks."""


def advise(alarm: Alarm, group: Sequence[Alarm]) -> Alarm:
    """The alarm with its cause and advice.

    Args:
        alarm: The alarm, with its scope.
        group: The alarms that are taken together with it, itself among them.

    """
    cause = cause_of(alarm, group)
    return replace(alarm, cause=cause, advice=ADVICE[cause].format(device=alarm.device))


def cause_of(alarm: Alarm, group: Sequence[Alarm]) -> str:
    """One of the causes above."""
    moved = set(alarm.families)
    images, certainty = "images" in moved, "certainty" in moved
    if alarm.course == "periodic":
        return PERIODIC
    if certainty and "spread" in moved and is_mixture(alarm):
        return NEW_CLASS
    if alarm.scope == "fleet":
        return SEASON if images and is_gradual(group) else SHIFT
    if alarm.scope == "site":
        return SEASON if images and is_gradual(group) else SITE
    if images:
        return DIRTY
    if "classes" in moved and not certainty:
        return CLASSES
    return CERTAINTY if certainty else UNKNOWN


def is_gradual(group: Sequence[Alarm]) -> bool:
    """Whether the devices did not begin at one moment."""
    began = sorted(alarm.since for alarm in group)
    middle = began[len(began) // 4 : len(began) - len(began) // 4] or began
    return middle[-1] - middle[0] > GRADUAL_S


def is_mixture(alarm: Alarm) -> bool:
    """Whether images vary more than before: some are of another kind, while the others are as they were."""
    return any(change.measure == "spread" and change.deviations > 0 for change in alarm.changes)
