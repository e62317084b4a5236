"""Samples of the store and what people said about them: never changed, but undone and said again."""

from __future__ import annotations

import base64
import binascii
from collections import defaultdict
from collections.abc import Iterable, Sequence

import msgspec
from sqlalchemy import exists, func, select, update

from eyas_device.errors import EyasError
from eyas_device.telemetry.messages import Event
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.tables import drift_models, messages, sample_labels

UNKNOWN = "?"
"""What a person says who cannot tell: the sample counts as seen, and as nothing else."""
OBJECTION = "eyas samples check"
"""Source, and person, of an objection: a label that may be wrong is disputed until a person says more."""
_MAX_CHARS = 200
_JPEG = b"\xff\xd8\xff"

CONSENT = "training"
"""Key of an event's image policy: the device's `[privacy] training`."""
Key = tuple[str, str, int]
"""Device, spool, sequence: the identity of a sample."""


class SampleError(EyasError, ValueError):
    """A label, a sample or a file of labels is not what is needed."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """What one person said about a sample."""

    label: str
    """One of the classes, or `?`."""
    person: str
    at: float
    """Seconds since 1970."""
    seconds: float = 0.0
    """How long it took; 0 if nobody measured."""
    guess_shown: bool = False
    """Whether the model's prediction was seen before."""
    source: str = ""
    """Where it came from: `eyas samples label`, a table, class folders, Label Studio; `OBJECTION`."""
    order: int = 0
    """Grows with each word in the store, whatever clocks say; 0 before it is there."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction that a device sent, and what people said about it."""

    event: Event
    site: str
    received: float = 0.0
    """When it arrived by the collector's clock, seconds since 1970; 0 if nobody knows."""
    said: tuple[Said, ...] = ()
    """The last of each person, oldest first; without what was undone."""

    @property
    def key(self) -> Key:
        """Its identity."""
        return (self.event.device, self.event.spool, self.event.sequence)

    @property
    def is_random(self) -> bool:
        """Whether it was drawn at random: only such samples tell the accuracy."""
        return self.event.why == "sampled"

    @property
    def hides_guess(self) -> bool:
        """Whether people should not see the prediction, because their word has to judge it: they tend to agree."""
        return self.is_random or self.event.why == "disagreement"

    @property
    def may_train(self) -> bool:
        """Whether its device allows its image to be trained on (`[privacy] training`); without the flag it does not."""
        return self.event.image_policy.get(CONSENT) is True

    def image(self) -> bytes | None:
        """Its image as JPEG; None if the device sent none, or something else."""
        try:
            image = base64.b64decode(self.event.image, validate=True)
        except (binascii.Error, ValueError):
            return None
        return image if image.startswith(_JPEG) else None


def samples(store: Store, *, device: str = "", since: float = 0.0, labelled: bool = False) -> list[Sample]:
    """All samples from `since` on (seconds since 1970), oldest first; those of a newer schema are left out.

    With `labelled` only those about which people said something: few of many, each of which has an image.
    """
    c = messages.c
    query = select(c.spool, c.sequence, c.device, c.site, c.payload, c.time, c.corrected, c.received).where(
        c.kind == "event", c.problem == "", c.time >= since
    )
    query = query.where(c.device == device) if device else query
    if labelled:
        s = sample_labels.c
        same = (s.device == c.device, s.spool == c.spool, s.sequence == c.sequence, s.undone == 0)
        query = query.where(exists().where(*same))
    said = _said(store)
    found = []
    with store.reading() as connection:
        for spool, sequence, name, site, payload, moment, corrected, received in connection.execute(
            query.order_by(c.time)
        ):
            event = msgspec.json.decode(payload, type=Event)
            event = msgspec.structs.replace(event, device=str(name), spool=str(spool), sequence=int(sequence))
            event = msgspec.structs.replace(event, time=float(moment)) if corrected else event
            words = said.get((str(name), str(spool), int(sequence)), ())
            found.append(Sample(event=event, site=str(site), received=float(received), said=words))
    return found


def _said(store: Store) -> dict[Key, tuple[Said, ...]]:
    """Sample -> the last of each person."""
    c = sample_labels.c
    columns = (c.id, c.device, c.spool, c.sequence, c.label, c.person, c.at, c.seconds, c.guess_shown, c.source)
    last: defaultdict[Key, dict[str, Said]] = defaultdict(dict)
    with store.reading() as connection:
        for row in connection.execute(select(*columns).where(c.undone == 0).order_by(c.id)):
            order, device, spool, sequence, label, person, at, seconds, shown, source = row
            people = last[str(device), str(spool), int(sequence)]
            people.pop(str(person), None)  # the order is that of the last words
            people[str(person)] = Said(
                label=str(label),
                person=str(person),
                at=float(at),
                seconds=float(seconds),
                guess_shown=bool(shown),
                source=str(source),
                order=int(order),
            )
    return {key: tuple(people.values()) for key, people in last.items()}


def count_words(store: Store) -> tuple[int, int]:
    """How much was said about samples, and how much of it was undone: both only grow."""
    c = sample_labels.c
    with store.reading() as connection:
        said = connection.execute(select(func.count()).select_from(sample_labels)).scalar_one()
        undone = connection.execute(select(func.count()).select_from(sample_labels).where(c.undone != 0)).scalar_one()
    return int(said), int(undone)


def classes(store: Store) -> dict[str, tuple[str, ...]]:
    """First digits of a model's digest, as events have it -> its classes, of the models that are known."""
    with store.reading() as connection:
        rows = connection.execute(select(drift_models.c.digest, drift_models.c.labels)).all()
    return {str(digest)[:12]: tuple(msgspec.json.decode(labels, type=list[str])) for digest, labels in rows if labels}


def say(store: Store, words: Iterable[tuple[Key, Said]], *, allowed: Sequence[str] = ()) -> int:
    """Store what people said, all of it or nothing; returns how much of it was new.

    What the same person said before about a sample, in the same words, is not stored again.

    Args:
        store: The store.
        words: Samples, and what was said about each.
        allowed: The classes; empty: any.

    Raises:
        SampleError: a sample is not in the store, or a label is none of the classes.

    """
    given = list(words)
    for key, said in given:
        if not said.label or len(said.label) > _MAX_CHARS or not said.label.isprintable():
            raise SampleError(f"{_name(key)}: {said.label[:40]!r} is no label; {UNKNOWN} says that nobody can tell")
        if allowed and said.label not in (*allowed, UNKNOWN):
            raise SampleError(
                f"{_name(key)}: {said.label!r} is none of the classes {', '.join(allowed)}; a new one needs --new-class"
            )
        if not said.person:
            raise SampleError(f"{_name(key)}: nobody is named who says it")
    missing = sorted({key for key, _ in given} - _there(store, {key for key, _ in given}))
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise SampleError(f"{_name(missing[0])}: no such sample in the store{more}; its message may have expired")
    before = _said(store)
    new = [(key, one) for key, one in given if _last(before.get(key, ()), one.person) != one.label]
    if new:
        with store.begin() as connection:
            connection.execute(
                sample_labels.insert(),
                [
                    {"device": key[0], "spool": key[1], "sequence": key[2], "undone": 0.0}
                    | {name: value for name, value in msgspec.structs.asdict(one).items() if name != "order"}
                    | {"guess_shown": int(one.guess_shown)}
                    for key, one in new
                ],
            )
    return len(new)


def undo(store: Store, person: str, *, now: float, count: int = 1) -> list[tuple[Key, str]]:
    """Undo the last words of a person; returns the samples and what had been said, the last one first."""
    c = sample_labels.c
    query = select(c.id, c.device, c.spool, c.sequence, c.label).where(c.undone == 0, c.person == person)
    with store.begin(exclusive=True) as connection:
        rows = connection.execute(query.order_by(c.id.desc()).limit(count)).all()
        if rows:
            ids = [row.id for row in rows]
            connection.execute(update(sample_labels).where(c.id.in_(ids)).values(undone=now))
    return [((str(row.device), str(row.spool), int(row.sequence)), str(row.label)) for row in rows]


def _there(store: Store, keys: set[Key]) -> set[Key]:
    c, found = messages.c, set()
    with store.reading() as connection:
        for device in sorted({key[0] for key in keys}):
            query = select(c.spool, c.sequence).where(c.device == device, c.kind == "event")
            found |= {(device, str(spool), int(sequence)) for spool, sequence in connection.execute(query)}
    return found & keys


def _last(said: Sequence[Said], person: str) -> str:
    return next((one.label for one in said if one.person == person), "")


def _name(key: Key) -> str:
    return f"{key[0]} {key[1][:8]} {key[2]}"
