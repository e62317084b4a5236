"""Why a repository, or what it says, is refused: an error class for each reason, below `UpdateError`.

None of them changes what runs. `reason` is the same in one word, for telemetry and `--json`.

- `RootError`: no root of trust is pinned on this device, or it is damaged.
- `BusyError`: another process reads the repository.
- `UnreachableError`: the repository does not answer.
- `MissingError`: a file that has to be there is not.
- `SlowDataError`, `EndlessDataError`: too few bytes in the time, or more of them than a file may have.
- `UnsignedError`: metadata without the signatures that it needs.
- `TamperedError`: metadata or a file was changed after it was signed.
- `ForeignError`: metadata signed by keys that the pinned root does not know.
- `ExpiredError`: metadata that nobody has renewed in time.
- `ClockAheadError`: metadata looks expired because of a clock that is ahead.
- `RolledBackError`: metadata older than what this device has seen.
- `MixedError`: metadata of different states of the repository.
"""

from __future__ import annotations

from typing import ClassVar

from eyas_device.updates.release import UpdateError


class TrustError(UpdateError):
    """A repository, or what it says, is refused."""

    reason: ClassVar[str] = "refused"
    """The reason in one word."""


class RootError(TrustError):
    """No root of trust is pinned on this device, or it is damaged."""

    reason = "root"


class BusyError(TrustError):
    """Another process reads the repository for this device."""

    reason = "busy"


class UnreachableError(TrustError):
    """The repository does not answer, or answers with an error."""

    reason = "unreachable"


class MissingError(UnreachableError):
    """A file that the repository has to have is not there."""

    reason = "missing"


class SlowDataError(TrustError):
    """Too few bytes arrive in the time: a server could hold a device back for ever."""

    reason = "slow"


class EndlessDataError(TrustError):
    """A file is larger than it may be, or than what was signed."""

    reason = "endless"


class UnsignedError(TrustError):
    """Metadata without the signatures that it needs."""

    reason = "unsigned"


class TamperedError(TrustError):
    """Metadata or a file was changed after it was signed."""

    reason = "tampered"


class ForeignError(TrustError):
    """Metadata signed by keys that the pinned root does not know."""

    reason = "foreign"


class ExpiredError(TrustError):
    """Metadata that nobody has renewed in time: the repository is abandoned, or an old state is served."""

    reason = "expired"


class ClockAheadError(ExpiredError):
    """Metadata looks expired because this device's clock is ahead."""

    reason = "clock"


class RolledBackError(TrustError):
    """Metadata older than what this device has already seen."""

    reason = "rolled-back"


class MixedError(TrustError):
    """Metadata of different states of the repository, put together by somebody else."""

    reason = "mixed"
