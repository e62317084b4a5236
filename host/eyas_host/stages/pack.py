"""The `pack` stage: the bundle of the artefacts that passed."""

from eyas_host.bundle.pack import pack_bundle as run

__all__ = ["run"]
