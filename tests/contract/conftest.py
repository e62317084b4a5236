"""Fixtures of the contract's tests: a tiny bundle."""

from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures
