"""Base class for resources that hold a device, a model or a connection."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

Self = TypeVar("Self", bound="Closing")


class Closing:
    """A resource that is a context manager: leaving the `with` block closes it."""

    def close(self) -> None:
        """Release the resource. Closing twice is allowed. Does nothing by default."""

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
