"""Exceptions of Eyas.

- `EyasError`: the base class; every message says what was wrong, where, and what to do.
  - `BundleError`: a bundle is damaged, incomplete or written for another schema.
    - `CheckFailed`: a model's predictions here differ from those recorded on the host.
  - `CameraError`: a camera cannot be opened or stopped delivering.
    - `CameraLost`: a camera stopped delivering and did not recover in time.
    - `CameraRefused`: a camera refused the login: retry rarely, because cameras lock users out.
    - `CameraSpecError`: a camera specification is wrong: do not retry.
  - `ImageError`: bytes that are not an image, or pixels of an unsupported type or shape.
  - `RuntimeUnavailable`: an inference runtime is not installed or cannot run here.
  - `ConfigError`: the device's configuration file has errors; exit code 78.
  - `LinkError`: the telemetry link was refused or cannot be set up.

An error made by the user ends the command with its message and its `exit_code`, without a traceback.
"""

EXIT_CHECK_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_CAMERA_LOST = 3
EXIT_OUTPUT = 74
"""`EX_IOERR` of sysexits.h: standard output did not take everything, because of a full disk for example."""
EXIT_CONFIG = 78
"""`EX_CONFIG` of sysexits.h: starting again cannot help, so the service does not."""

EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells count: 128 and the number of the signal."""


class EyasError(Exception):
    """Base class of all errors that Eyas raises on purpose."""

    exit_code = EXIT_USER_ERROR
    """Exit code of a command that ends with this error."""


class BundleError(EyasError, ValueError):
    """A bundle is damaged, incomplete or written for another schema."""


class CheckFailed(BundleError):  # noqa: N818 - reads as the state it reports
    """A model's predictions here differ from those recorded on the host."""

    exit_code = EXIT_CHECK_FAILED


class CameraError(EyasError, OSError):
    """A camera cannot be opened or stopped delivering."""

    started_s = 0.0
    """Time that starting a process for the camera took in vain, seconds."""


class CameraLost(CameraError):  # noqa: N818 - reads as the state it reports
    """A camera stopped delivering and did not recover in time."""

    exit_code = EXIT_CAMERA_LOST


class CameraRefused(CameraError):  # noqa: N818 - reads as the state it reports
    """A camera refused the login: retry rarely, because cameras lock users out."""


class CameraSpecError(CameraError):
    """A camera specification is wrong: do not retry."""


class ImageError(EyasError, ValueError):
    """Bytes that are not an image, or pixels of an unsupported type or shape."""


class RuntimeUnavailable(EyasError, ImportError):  # noqa: N818 - reads as the state it reports
    """An inference runtime is not installed or cannot run here."""


class LinkError(EyasError, OSError):
    """The telemetry link was refused or cannot be set up."""


class ConfigError(EyasError, ValueError):
    """The device's configuration file has errors; the message lists all of them."""

    exit_code = EXIT_CONFIG
