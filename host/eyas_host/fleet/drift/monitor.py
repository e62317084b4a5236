"""The monitor: reads new windows, lets every device's steps count, opens and closes alarms, and stores it all.

Nothing is lost when it is killed: it stores state and position together, and reads again from there. A store that was
restored from a backup has both of then; the monitor notices that it is not the state that it wrote, and reads it.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable

import msgspec
import numpy as np

from eyas_host.fleet.drift import explain
from eyas_host.fleet.drift.alarms import Alarm
from eyas_host.fleet.drift.calibration import Calibration
from eyas_host.fleet.drift.estimate import ModelReference
from eyas_host.fleet.drift.fleet_state import Model, Tuning
from eyas_host.fleet.drift.measures import MAX_LABELS, STEP_S, Floats, SmallWindow, most_frequent
from eyas_host.fleet.drift.reader import Counts, Row, Steps, decode, digest_of, newest, read_rows, step_of, sums
from eyas_host.fleet.drift.records import DriftRecords, Position, StoredDevice, StoredModel, Update, packed, unpacked
from eyas_host.fleet.drift.scope import place
from eyas_host.fleet.store.database import Store

HISTORY_S = 30 * 86_400.0
"""How far back from the newest window a first look goes, seconds."""
SETTLE_S = 3.0
"""Age of the newest windows that are read: other collectors may still be committing what arrived before."""
MAX_MODELS = 64
_STATE = np.dtype("<f4")


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What one update did."""

    time: float
    """When it began, seconds since 1970."""
    seconds: float
    """How long it took."""
    windows: int
    """Windows that were read."""
    steps: int
    """Steps of devices that counted."""
    devices: int
    """Devices that are followed."""
    left_out: Counts
    """Windows that do not count, by reason."""
    changed: tuple[Alarm, ...] = ()
    """Alarms that opened, were confirmed or closed."""
    more: bool = False
    """Whether there are more windows to read at once."""


class Monitor:
    """Follows all devices of a store.

    Args:
        store: The store that collectors fill.
        tuning: How long devices learn.
        clock: Seconds since 1970.

    """

    def __init__(self, store: Store, tuning: Tuning | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock, self.tuning = store, clock, tuning or Tuning()
        self._records = DriftRecords(store)
        self._position = Position("unread")
        self._read = 0.0
        self.models: dict[str, Model] = {}
        self.names: dict[str, str] = {}
        """Digest -> `name version`."""
        self.references: dict[str, ModelReference] = {}
        """Digest -> what its bundle recorded."""
        self.sites: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        """Device -> digest of the model whose row it has."""
        self.alarms: dict[str, Alarm] = {}
        """Device -> its open alarm."""
        self._steps = Steps()
        self._reasons: dict[str, str] = {}

    def turn(self, *, settle_s: float = SETTLE_S) -> Turn:
        """Read new windows once, and store what follows. Raises the database's error; the next turn goes on."""
        now, started = self._clock(), time.perf_counter()
        if self._records.position().token != self._position.token:
            self.load()
        counts, dirty = Counts(), set()
        changed: dict[str, Alarm] = {}
        since = self._read or self._position.position or newest(self._store) - HISTORY_S
        rows = read_rows(self._store, since, now - settle_s)
        self._add(rows, counts)
        read = max((row.received for row in rows), default=since)
        more = bool(rows) and len(rows) > 1000
        closed = self._steps.close(read if more else now)
        for alarm in self._advance(closed):
            changed[alarm.id] = alarm  # the last state of each: one may open and close, and another one open, at once
        dirty |= {device for device, _, _ in closed}
        self._read = read
        if closed:
            for alarm in self._update_alarms(now):
                changed[alarm.id] = alarm
            changed |= {alarm.id: alarm for alarm in self.alarms.values() if alarm.id in changed}  # explained by now
            if not self._save(dirty, changed.values(), now):
                self._position = Position("unread")
                changed = {}
        return Turn(
            time=now,
            seconds=time.perf_counter() - started,
            windows=counts.windows,
            steps=len(closed),
            devices=len(self.digests),
            left_out=counts,
            changed=tuple(changed.values()),
            more=more,
        )

    def catch_up(self, on_turn: Callable[[Turn], None] = lambda turn: None) -> list[Alarm]:
        """Take turns until there is nothing more to read; return the alarms that changed, the last state of each."""
        changed: dict[str, Alarm] = {}
        while True:
            turn = self.turn(settle_s=0.0)
            changed |= {alarm.id: alarm for alarm in turn.changed}
            on_turn(turn)
            if not turn.more:
                return list(changed.values())

    def load(self) -> None:
        """Read the stored state."""
        position, models, devices, alarms = self._records.load()
        self._position, self._read, self._steps = position, position.position, Steps()
        self.models, self.names, self.sites, self.digests, self.references = {}, {}, {}, {}, {}
        for one in models:
            if one.reference:
                self.references[one.digest] = msgspec.json.decode(one.reference, type=ModelReference)
            self.models[one.digest] = Model(one.digest, one.labels, Calibration.of(unpacked(one.calibration)))
            self.names[one.digest] = one.model
        by_model: dict[str, list[StoredDevice]] = defaultdict(list)
        for device in devices:
            if device.digest in self.models:
                by_model[device.digest].append(device)
        for digest, those in by_model.items():
            model = self.models[digest]
            model.add([device.device for device in those])
            for row, device in enumerate(those):
                self.sites[device.device], self.digests[device.device] = device.site, digest
                state = np.frombuffer(device.state, _STATE)
                model.restore(row, state, device.profile or b"")
            model.stored_profiles.clear()
        self.alarms = {alarm.device: alarm for alarm in alarms}

    def forget(self, device: str) -> None:
        """Let a device learn again: what it reports from now on is what is usual."""
        self.load()
        now = self._clock()
        changed: list[Alarm] = []
        if device in self.digests:
            model = self.models[self.digests[device]]
            model.forget(np.array([model.row_of[device]]))
        if device in self.alarms:
            closed = explain.closed(self.alarms.pop(device), now, "what it reports was accepted as usual")
            changed.append(closed)
        self._save({device} & set(self.digests), changed, now)

    def _add(self, rows: list[Row], counts: Counts) -> None:
        """Sort windows into steps."""
        windows = [(row, decode(row)) for row in rows if not self._too_many(row, counts)]
        self._learn_labels([window for _, window in windows if window is not None])
        self._add_devices(windows)
        for row, window in windows:
            counts.windows += 1
            if window is None:
                counts.refused += 1
            elif window.arm:
                counts.arms += 1
            elif (model := self._model_of(row, window)) is not None:
                step = step_of(row)
                number = model.row_of[row.device]
                if step <= model.view("last_step")[number]:
                    counts.late += 1
                elif self._steps.is_full(row.device, step):
                    counts.flooded += 1
                elif (found := sums(window, model.labels)) is None:
                    counts.refused += 1
                else:
                    self._steps.add(row.device, step, row.received, found)
                    self._reasons[row.device] = window.ood_reason[:300]

    def _add_devices(self, windows: list[tuple[Row, SmallWindow | None]]) -> None:
        """Make room for all new devices at once: one by one, the arrays would be copied for each."""
        devices: dict[str, list[str]] = defaultdict(list)
        for row, window in windows:
            if window is not None and not window.arm:
                devices[digest_of(window)].append(row.device)
        for digest, names in devices.items():
            if digest in self.models:
                self.models[digest].add(names)

    def _too_many(self, row: Row, counts: Counts) -> bool:
        if self._steps.is_full(row.device, step_of(row)):
            counts.windows += 1
            counts.flooded += 1
            return True
        return False

    def _learn_labels(self, windows: list[SmallWindow]) -> None:
        """Follow the labels that windows of each model have, the most frequent ones first."""
        seen: dict[str, Counter[str]] = defaultdict(Counter)
        for window in windows:
            digest = digest_of(window)
            model = self.models.get(digest)
            if model is None or len(model.labels) < MAX_LABELS:
                seen[digest].update(window.counts)
            self.names.setdefault(digest, window.model)
        for digest, counts in seen.items():
            if (model := self.models.get(digest)) is not None:
                further = [label for label in most_frequent(counts) if label not in model.labels]
                model.labels = (*model.labels, *further)[:MAX_LABELS]
            elif len(self.models) < MAX_MODELS:
                self.models[digest] = Model(digest, most_frequent(counts), self._inherited(digest))

    def _inherited(self, digest: str) -> Calibration | None:
        """The calibration of the last version of the same model: what chance does changes little."""
        name = self.names.get(digest, "").partition(" ")[0]
        for other, model in reversed(self.models.items()):
            if self.names.get(other, "").partition(" ")[0] == name:
                return Calibration.of({key: array.copy() for key, array in model.calibration.arrays().items()})
        return None

    def _model_of(self, row: Row, window: SmallWindow) -> Model | None:
        """The model that a device runs; one that runs another one than before learns again."""
        digest = digest_of(window)
        model = self.models.get(digest)
        if model is None:
            return None
        self.sites[row.device] = row.site
        if self.digests.get(row.device) != digest:
            self._steps.forget(row.device)
            if row.device in model.row_of:
                model.forget(np.array([model.row_of[row.device]]))
            else:
                model.add([row.device])
            self.digests[row.device] = digest
        return model

    def _advance(self, closed: list[tuple[str, int, Floats]]) -> list[Alarm]:
        """Let closed steps count, all devices of a model at once; return the alarms that opened or closed."""
        rounds: dict[str, dict[int, list[tuple[int, int, Floats]]]] = defaultdict(lambda: defaultdict(list))
        numbers: Counter[str] = Counter()
        for device, step, total in closed:
            digest = self.digests[device]
            rounds[digest][numbers[device]].append((self.models[digest].row_of[device], step, total))
            numbers[device] += 1
        changed: list[Alarm] = []
        for digest, of_model in rounds.items():
            model = self.models[digest]
            for number in sorted(of_model):
                rows, steps, totals = zip(*of_model[number], strict=True)
                index, when = np.array(rows), np.array(steps)
                opened, ended = model.advance(index, when, np.stack(totals), self.tuning)
                changed += [self._open(model, row) for row in opened]
                changed += [one for row in ended if (one := self._end(model, row)) is not None]
        return changed

    def _open(self, model: Model, row: int) -> Alarm:
        device = model.devices[row]
        alarm = explain.opened(model, row, id=str(uuid.uuid4()))
        alarm = msgspec.structs.replace(
            alarm, site=self.sites.get(device, ""), model=self.names.get(model.digest, ""), digest=model.digest
        )
        self.alarms[device] = alarm
        return alarm

    def _end(self, model: Model, row: int) -> Alarm | None:
        alarm = self.alarms.pop(model.devices[row], None)
        at = float(model.view("last_step")[row] + 1) * STEP_S
        return None if alarm is None else explain.closed(alarm, at, "its measures were as usual for a day")

    def _update_alarms(self, now: float) -> list[Alarm]:
        """Say of every open alarm how it stands; return those whose state changed, and those of models that left."""
        changed = []
        for device, alarm in list(self.alarms.items()):
            if self.digests.get(device) != alarm.digest:
                changed.append(explain.closed(self.alarms.pop(device), now, "the device runs another model now"))
        standing = explain.standing(self.models, self.alarms, self._reasons)
        placed = place(standing, self.sites)
        for device, alarm in placed.items():
            before, self.alarms[device] = self.alarms[device], alarm
            if alarm.state != before.state:
                changed.append(alarm)
        return changed

    def _save(self, dirty: set[str], changed: object, now: float) -> bool:
        devices = []
        for device in sorted(dirty):
            model = self.models[self.digests[device]]
            row = model.row_of[device]
            profile = model.profiles.packed(row) if row in model.stored_profiles else None
            state = model.rows[row].astype(_STATE).tobytes()
            devices.append(StoredDevice(device, self.sites.get(device, ""), model.digest, state, profile))
        digests = sorted({one.digest for one in devices})
        models = [
            StoredModel(
                digest,
                self.names.get(digest, ""),
                self.models[digest].labels,
                packed(self.models[digest].calibration.arrays()),
            )
            for digest in digests
        ]
        alarms = {alarm.id: alarm for alarm in [*self.alarms.values(), *changed]}  # type: ignore[misc]
        after = self._records.save(
            Update(
                before=self._position,
                position=self._steps.position(self._read),
                now=now,
                models=models,
                devices=devices,
                alarms=list(alarms.values()),
                hours=[hour for model in self.models.values() for hour in model.hours],
            )
        )
        if after is None:
            return False
        self._position = after
        for digest in digests:
            self.models[digest].stored_profiles.clear()
        for model in self.models.values():
            model.hours.clear()
        return True
