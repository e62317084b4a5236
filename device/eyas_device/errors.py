"""What can go wrong on a device, and what to do about it.

- `EyasError`: the root; every message says what was wrong, where, and what to do.
  - `BundleError`: a bundle is damaged, incomplete or written for another schema.
  - `CameraError`: a camera cannot be opened or stopped delivering.
  - `PictureError`: bytes that are not a picture, or pixels of a kind that cannot be prepared.
  - `RuntimeUnavailable`: an inference runtime is not installed or cannot run here.
  - `LinkError`: the telemetry link was refused or cannot be set up.

A mistake of the user ends the command with its message and exit code 2, without a traceback.
"""

EXIT_USER_ERROR = 2


class EyasError(Exception):
    """Root of all errors that Eyas raises on purpose."""


class BundleError(EyasError, ValueError):
    """A bundle is damaged, incomplete or written for another schema."""


class CameraError(EyasError, OSError):
    """A camera cannot be opened or stopped delivering."""


class PictureError(EyasError, ValueError):
    """Bytes that are not a picture, or pixels of a kind that cannot be prepared."""


class RuntimeUnavailable(EyasError, ImportError):  # noqa: N818 - reads as the state it reports
    """An inference runtime is not installed or cannot run here."""


class LinkError(EyasError, OSError):
    """The telemetry link was refused or cannot be set up."""
