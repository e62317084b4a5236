"""Fixtures of the fleet's tests: a bundle, and databases."""

from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.fleet_parts import open_folder  # noqa: F401 - fixture
from tests.support.postgres import own_postgres, postgres, url  # noqa: F401 - fixtures
