"""What can go wrong on a device, and what to do about it.

- `EyasError`: the root; every message says what was wrong, where, and what to do.
  - `BundleError`: a bundle is damaged, incomplete or written for another schema.
    - `CheckFailed`: a bundle does not answer here as it did on the host.
  - `CameraError`: a camera cannot be opened or stopped delivering.
    - `CameraLost`: a camera stopped delivering and did not come back in the time it was given.
    - `CameraSpecError`: what names a camera is mistaken, or cannot work on this machine: trying again does not help.
  - `ImageError`: bytes that are not an image, or pixels of a kind that cannot be prepared.
  - `RuntimeUnavailable`: an inference runtime is not installed or cannot run here.
  - `ConfigError`: the device's configuration file has faults.
  - `LinkError`: the telemetry link was refused or cannot be set up.

A mistake of the user ends the command with its message and exit code 2, without a traceback.
"""

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_CAMERA_LOST = 3


class EyasError(Exception):
    """Root of all errors that Eyas raises on purpose."""

    exit_code = EXIT_USER_ERROR
    """What a command ends with that cannot go on because of it."""


class BundleError(EyasError, ValueError):
    """A bundle is damaged, incomplete or written for another schema."""


class CheckFailed(BundleError):  # noqa: N818 - reads as the state it reports
    """A bundle does not answer here as it did on the host."""

    exit_code = EXIT_CHECK_FAILED


class CameraError(EyasError, OSError):
    """A camera cannot be opened or stopped delivering."""


class CameraLost(CameraError):  # noqa: N818 - reads as the state it reports
    """A camera stopped delivering and did not come back in the time it was given."""

    exit_code = EXIT_CAMERA_LOST


class CameraSpecError(CameraError):
    """What names a camera is mistaken, or cannot work on this machine: trying again does not help."""


class ImageError(EyasError, ValueError):
    """Bytes that are not an image, or pixels of a kind that cannot be prepared."""


class RuntimeUnavailable(EyasError, ImportError):  # noqa: N818 - reads as the state it reports
    """An inference runtime is not installed or cannot run here."""


class LinkError(EyasError, OSError):
    """The telemetry link was refused or cannot be set up."""


class ConfigError(EyasError, ValueError):
    """The device's configuration file has faults; the message lists all of them."""
