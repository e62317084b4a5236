"""The tiny bundle, which packing tests share with the device's."""

from __future__ import annotations

from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures
