"""A tiny real bundle for the tests of this room."""

from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures
