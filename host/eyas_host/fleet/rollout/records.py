"""Rollouts in the store: their states, their logs, and the lock of the engine that carries them out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
from msgspec.structs import replace
from sqlalchemy import delete, or_, select, update

from eyas_host.fleet.rollout.plan import RolloutError
from eyas_host.fleet.rollout.state import ACTIVE, Rollout, Step
from eyas_host.fleet.store.database import Store
from eyas_host.fleet.store.engine import insert_into
from eyas_host.fleet.store.tables import rollout_engine, rollout_steps, rollouts

_ENGINE = "engine"
_MAX_TEXT = 4000


class Changed(RolloutError):  # noqa: N818 - reads as the state it reports
    """Somebody else changed the rollout meanwhile; read it again."""


class Records:
    """Rollouts of a store. Every change is a transaction: state and log together, or neither."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, rollout: Rollout, step: Step) -> Rollout:
        """Store a new rollout under an id that no other has, and return it.

        Raises `RolloutError` while another one of the same model, channel and site goes on.
        """
        with self._store.begin(exclusive=True) as connection:
            rows = connection.execute(select(rollouts.c.id, rollouts.c.status, rollouts.c.payload)).all()
            for name, status, payload in rows:
                other = msgspec.json.decode(payload, type=Rollout)
                same = (other.model, other.channel, other.site) == (rollout.model, rollout.channel, rollout.site)
                if same and status in ACTIVE:
                    raise RolloutError(
                        f"{name} is {status} for {rollout.model} on channel {rollout.channel}: "
                        f"`eyas rollout abort {name}` comes first"
                    )
            rollout = replace(rollout, id=_free_name(rollout.id, {str(name) for name, *_ in rows}), revision=1)
            connection.execute(rollouts.insert(), {**_row(rollout), "created": rollout.created, "applied": 0})
            connection.execute(rollout_steps.insert(), _step_row(rollout.id, step))
        return rollout

    def get(self, name: str) -> Rollout:
        """A rollout by its id. Raises `RolloutError` that names those that there are."""
        found = self._read(rollouts.c.id == name)
        if not found:
            there = ", ".join(rollout.id for rollout in self.all()[:8])
            raise RolloutError(f"{name}: no such rollout; " + (f"there are: {there}" if there else "there is none yet"))
        return found[0]

    def all(self) -> list[Rollout]:
        """All rollouts, the newest first."""
        return self._read()

    def active(self) -> list[Rollout]:
        """Rollouts that go on, and those that the repository does not show yet as they ended; the oldest first."""
        return self._read(or_(rollouts.c.status.in_(ACTIVE), rollouts.c.applied != rollouts.c.revision))[::-1]

    def save(self, rollout: Rollout, steps: Iterable[Step]) -> Rollout:
        """Store another state of a rollout with what happened. Raises `Changed` if it is not the newest revision."""
        after = replace(rollout, revision=rollout.revision + 1)
        with self._store.begin(exclusive=True) as connection:
            same = (rollouts.c.id == rollout.id, rollouts.c.revision == rollout.revision)
            if connection.execute(update(rollouts).where(*same).values(**_row(after))).rowcount != 1:
                raise Changed(f"{rollout.id} was changed by somebody else meanwhile; look at `eyas rollout status`")
            if rows := [_step_row(rollout.id, step) for step in steps]:
                connection.execute(rollout_steps.insert(), rows)
        return after

    def applied(self, rollout: Rollout) -> None:
        """Note that the repository shows this revision."""
        with self._store.begin() as connection:
            same = (rollouts.c.id == rollout.id, rollouts.c.applied < rollout.revision)
            connection.execute(update(rollouts).where(*same).values(applied=rollout.revision))

    def steps(self, name: str, limit: int = 1000) -> list[Step]:
        """The log of a rollout, oldest first, its last `limit` entries."""
        c = rollout_steps.c
        query = select(c.what, c.why, c.at, c.actor).where(c.rollout == name).order_by(c.id.desc()).limit(limit)
        with self._store.reading() as connection:
            rows = connection.execute(query).all()
        return [Step(what=what, why=why, at=at, by=by) for what, why, at, by in reversed(rows)]

    def acquire(self, owner: str, now: float, for_s: float) -> bool:
        """Take or extend the lock of the engine; False while another owner holds it."""
        c = rollout_engine.c
        with self._store.begin(exclusive=True) as connection:
            insert = insert_into(connection.engine, rollout_engine)
            free = or_(c.owner == owner, c.until <= now, c.until > now + 10 * for_s)  # a clock that was wrong
            upsert = insert.on_conflict_do_update(
                index_elements=["name"], set_={"owner": owner, "until": now + for_s}, where=free
            )
            connection.execute(upsert, {"name": _ENGINE, "owner": owner, "until": now + for_s})
            return bool(connection.execute(select(c.owner)).scalar_one() == owner)

    def release(self, owner: str) -> None:
        """Give the lock of the engine back."""
        with self._store.begin() as connection:
            connection.execute(delete(rollout_engine).where(rollout_engine.c.owner == owner))

    def engine(self, now: float) -> str:
        """Who carries rollouts out at present; empty if nobody does."""
        c = rollout_engine.c
        with self._store.reading() as connection:
            owner = connection.execute(select(c.owner).where(c.until > now)).scalar_one_or_none()
        return "" if owner is None else str(owner)

    def _read(self, *conditions: object) -> list[Rollout]:
        query = select(rollouts.c.payload).where(*conditions).order_by(rollouts.c.created.desc(), rollouts.c.id)  # type: ignore[arg-type]
        with self._store.reading() as connection:
            rows: Sequence[str] = connection.execute(query).scalars().all()
        return [msgspec.json.decode(payload, type=Rollout) for payload in rows]


def _row(rollout: Rollout) -> dict[str, object]:
    return {
        "id": rollout.id,
        "status": rollout.state.status,
        "revision": rollout.revision,
        "payload": msgspec.json.encode(rollout).decode(),
    }


def _step_row(name: str, step: Step) -> dict[str, object]:
    texts = {"actor": step.by, "what": step.what, "why": step.why}
    cut = {key: text.replace("\x00", "\ufffd")[:_MAX_TEXT] for key, text in texts.items()}  # PostgreSQL stores no NUL
    return {"rollout": name, "at": step.at, **cut}


def _free_name(name: str, taken: set[str]) -> str:
    """The name, or the name with the first number that is free."""
    number, found = 1, name
    while found in taken:
        number += 1
        found = f"{name}-{number}"
    return found
