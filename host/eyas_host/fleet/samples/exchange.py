"""Labels and images to other tools and back: a table, class folders, and the JSON of Label Studio.

Every exported image is named by its sample, `DEVICE--SPOOL--SEQUENCE.jpg`, so that folders in which people moved images
can be read back.
"""

from __future__ import annotations

import base64
import csv
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec

from eyas_device.support.files import atomic_write
from eyas_host.fleet.drift.labelled import COLUMNS
from eyas_host.fleet.samples.records import OBJECTION, Key, Said, Sample, SampleError
from eyas_host.fleet.samples.rules import labels_of, verdicts

_DAY_S = 86400.0
_NAME = re.compile(r"(?P<device>[^/]+?)--(?P<spool>[0-9A-Za-z-]{1,36})--(?P<sequence>\d{1,18})\.jpe?g", re.IGNORECASE)
_MODE = 0o600
"""An image may show people: only who asked for it can read it."""
_OPEN = "unlabelled"
"""Folder of samples without a label."""
WITHOUT_CONSENT = "without consent to training"
"""Why an image is left out."""
_FROM, _TO = "label", "image"
"""Names of Label Studio's control and object."""


class Exported(msgspec.Struct, frozen=True, kw_only=True):
    """What was written."""

    images: int
    left_out: dict[str, int]
    """Why samples have no image there -> how many."""
    without_consent: int = 0
    """Images among them that their device does not allow to train on."""


def table(found: Sequence[Sample], *, people: int = 1) -> str:
    """The labels as CSV: device, spool, sequence, label, and what the model said; of labelled samples alone."""
    text = StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow((*COLUMNS, "predicted", "confidence", "why", "model", "people"))
    labels = labels_of(found, people=people)
    for sample in found:
        if (label := labels.get(sample.key)) is not None:
            event = sample.event
            names = " ".join(sorted(said.person for said in sample.said if said.label == label))
            rows.writerow((*sample.key, label, event.label, f"{event.confidence:.4f}", event.why, event.model, names))
    return text.getvalue()


def write_folders(
    found: Sequence[Sample],
    folder: Path,
    *,
    now: float,
    people: int = 1,
    every: bool = False,
    consented: bool = False,
) -> Exported:
    """Write the images into a folder for each label, below a new folder.

    Those whose device allowed their keeping for a number of days are left out after that. With `every`, samples without
    a label come into `unlabelled`, to be moved by hand and read back. With `consented`, those are left out whose device
    does not allow to train on them.

    Raises `SampleError` for a folder that is there already, and for a label that is no name of a folder.
    """
    left_out: Counter[str] = Counter()
    images: dict[str, bytes] = {}
    without_consent = 0
    states = verdicts(found, people=people)
    for sample in found:
        state, label = states[sample.key]
        if state != "labelled" and not every:
            left_out[state] += 1
            continue
        if (image := allowed_image(sample, now)) is None:
            left_out["no image" if sample.image() is None else "may not be kept any longer"] += 1
            continue
        if consented and not sample.may_train:
            left_out[WITHOUT_CONSENT] += 1
            continue
        without_consent += not sample.may_train
        if folder_problem(label):
            raise SampleError(f"{label!r}: no name of a folder; export a table instead")
        images[f"{label or _OPEN}/{name_of(sample)}"] = image
    _require_new(folder)
    write_images(images, folder)
    return Exported(images=len(images), left_out=dict(left_out), without_consent=without_consent)


def folder_problem(label: str) -> bool:
    """Whether a label cannot be the name of a folder."""
    return "/" in label or label.startswith(".") or len(label.encode()) > 200


def write_images(images: Mapping[str, bytes], folder: Path) -> None:
    """Write images by their paths below a folder, readable for this user alone."""
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / name, image, mode=_MODE)


def label_studio(found: Iterable[Sample], *, now: float, hide: bool = True) -> list[dict[str, Any]]:
    """Tasks of Label Studio with the images inside, the model's predictions, and what people said.

    With `hide`, the predictions of samples that have to judge them are left out (`Sample.hides_guess`): whoever sees a
    guess tends to agree with it.
    """
    tasks = []
    for sample in found:
        image = allowed_image(sample, now)
        if image is None:
            continue
        task: dict[str, Any] = {
            "data": {
                _TO: f"data:image/jpeg;base64,{base64.b64encode(image).decode()}",
                **dict(zip(COLUMNS, sample.key, strict=False)),
            }
        }
        if not (hide and sample.hides_guess):
            event = sample.event
            task["predictions"] = [
                {"model_version": event.model, "score": event.confidence, "result": [_choice(event.label)]}
            ]
        task["annotations"] = [
            {"completed_by": {"email": said.person}, "lead_time": said.seconds, "result": [_choice(said.label)]}
            for said in sample.said
            if said.source != OBJECTION
        ]
        tasks.append(task)
    return tasks


def read_table(path: Path, person: str, now: float) -> list[tuple[Key, Said]]:
    """Labels of a table, see `eyas_host.fleet.drift.labelled.read_labels`."""
    from eyas_host.fleet.drift.errors import DriftError
    from eyas_host.fleet.drift.labelled import read_labels

    try:
        labels = read_labels(path)
    except DriftError as error:
        raise SampleError(str(error)) from None
    return [(key, Said(label=label, person=person, at=now, source="table")) for key, label in labels.items()]


def read_folders(folder: Path, person: str, now: float) -> list[tuple[Key, Said]]:
    """Labels of class folders that were exported here, and in which people moved images.

    Images that lie in `unlabelled` say nothing. Raises `SampleError` for an image that was not exported here, and for
    one that lies in two folders.
    """
    found: dict[Key, Said] = {}
    for path in sorted(path for path in folder.glob("*/*") if path.is_file()):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise SampleError(f"{path}: not exported by eyas samples; its name has to stay DEVICE--SPOOL--SEQUENCE.jpg")
        key = (match["device"], match["spool"], int(match["sequence"]))
        label = path.parent.name
        if key in found and found[key].label != label:
            raise SampleError(f"{path}: it lies in {found[key].label}, too; keep it in one")
        if label != _OPEN:
            found[key] = Said(label=label, person=person, at=now, guess_shown=True, source="class folders")
    if not found:
        raise SampleError(f"{folder}: no labelled image; class folders are needed, e.g. {folder}/crack/…jpg")
    return list(found.items())


def read_label_studio(path: Path, person: str, now: float) -> list[tuple[Key, Said]]:
    """Labels of tasks that Label Studio exported as JSON; a task without an annotation says nothing.

    Raises `SampleError` for a file that is none, a task that is not of a sample, and an annotation without one choice.
    """
    try:
        tasks = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
    except (OSError, msgspec.MsgspecError) as error:
        raise SampleError(f"{path}: no export of Label Studio as JSON ({error})") from None
    return [
        word for number, task in enumerate(tasks, 1) for word in _words(task, f"{path}, task {number}", person, now)
    ]


def _words(task: dict[str, Any], where: str, person: str, now: float) -> Iterator[tuple[Key, Said]]:
    data = task.get("data")
    try:
        key = (str(data["device"]), str(data["spool"]), int(data["sequence"]))  # type: ignore[index]
    except (TypeError, KeyError, ValueError):
        raise SampleError(f"{where}: no device, spool and sequence in its data; export it by eyas samples") from None
    for annotation in task.get("annotations") or ():
        if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
            continue
        choices = [
            str(choice)
            for result in annotation.get("result") or ()
            if isinstance(result, dict) and isinstance(value := result.get("value"), dict)
            for choice in value.get("choices") or ()
        ]
        if not choices:
            continue
        if len(choices) > 1:
            raise SampleError(f"{where}: {len(choices)} choices, {', '.join(choices[:4])}; one is needed")
        by = annotation.get("completed_by")
        name = by.get("email") if isinstance(by, dict) else by
        seconds = annotation.get("lead_time")
        yield (
            key,
            Said(
                label=choices[0],
                person=str(name) if name else person,
                at=now,
                seconds=float(seconds) if isinstance(seconds, int | float) else 0.0,
                guess_shown=bool(task.get("predictions")),
                source="Label Studio",
            ),
        )


def allowed_image(sample: Sample, now: float | None = None) -> bytes | None:
    """The sample's image, if it may still be kept: by its time, or its arrival, of a device whose clock is ahead."""
    days = sample.event.image_policy.get("retention_days")
    taken = min(sample.event.time, sample.received or sample.event.time)
    late = (time.time() if now is None else now) - taken
    if isinstance(days, int | float) and not isinstance(days, bool) and days > 0 and late > days * _DAY_S:
        return None
    return sample.image()


def name_of(sample: Sample) -> str:
    """The name of its exported image."""
    device, spool, sequence = sample.key
    return f"{device}--{spool}--{sequence}.jpg"


def _choice(label: str) -> dict[str, Any]:
    return {"from_name": _FROM, "to_name": _TO, "type": "choices", "value": {"choices": [label]}}


def _require_new(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SampleError(f"{folder}: is there already; name a folder that is not, or an empty one")
