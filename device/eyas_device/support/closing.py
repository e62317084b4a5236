"""What everything that holds a device, a model or a connection shares: leaving its `with` block closes it."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

Self = TypeVar("Self", bound="Closing")


class Closing:
    """A resource that is its own context manager."""

    def close(self) -> None:
        """Give back what is held; closing twice is fine. Nothing is held unless a subclass says so."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
