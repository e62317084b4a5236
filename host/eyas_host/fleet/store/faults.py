"""What a database error means: a value that it rejects, a database that cannot write now, or tables that do not fit."""

from __future__ import annotations

import sqlite3
from enum import Enum

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, SQLAlchemyError

from eyas_device.errors import EyasError


class StoreError(EyasError, RuntimeError):
    """The store cannot be used: an invalid URL, a missing driver, foreign or damaged tables, another version."""


class Fault(Enum):
    """Kinds of faults; each has one right reaction."""

    ROW = "row"
    """The database rejects a value: it would do so again, and the other rows may be stored."""
    UNAVAILABLE = "unavailable"
    """It cannot write now (lost link, full disk, lock, deadlock, time limit, restart): try again."""
    SCHEMA = "schema"
    """A table or column is missing, or may not be written: somebody has to repair the database."""


def classify(error: Exception) -> Fault | None:
    """Classify an error of a write to the store; None for one that no database raised.

    A lost connection comes first: drivers report it under several classes.
    """
    if isinstance(error, (OverflowError, UnicodeError)):
        return Fault.ROW  # a driver cannot represent the value
    if not isinstance(error, SQLAlchemyError):
        return None
    if not isinstance(error, DBAPIError) or error.connection_invalidated:
        return Fault.UNAVAILABLE
    if isinstance(error, (DataError, IntegrityError)):
        return Fault.ROW
    missing = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR  # e.g. no such table
    return Fault.SCHEMA if missing or isinstance(error, ProgrammingError) else Fault.UNAVAILABLE


def first_line(error: BaseException) -> str:
    """First line of a database error, without the SQL statement and its values."""
    return (str(getattr(error, "orig", None) or error).splitlines() or [type(error).__name__])[0]
