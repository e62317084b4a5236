"""Bring the tables of an older store to this version's; its rows stay."""

from __future__ import annotations

import uuid

from sqlalchemy import Connection, func, inspect, select

from eyas_host.fleet.store.tables import MIGRATIONS, metadata, version


def migrate(connection: Connection) -> int:
    """Migrate step by step and return the version that was reached; another process may have done it meanwhile."""
    found = int(connection.execute(select(func.max(version.c.version))).scalar_one())
    while found in MIGRATIONS:
        for table, name, definition in MIGRATIONS[found]:
            if name not in {column["name"] for column in inspect(connection).get_columns(table)}:
                connection.exec_driver_sql(f"ALTER TABLE {table} ADD COLUMN {name} {definition}")
        metadata.create_all(connection)
        found += 1
        connection.execute(version.update().values(version=found))
    connection.execute(version.update().where(version.c.id == "").values(id=str(uuid.uuid4())))
    return found
