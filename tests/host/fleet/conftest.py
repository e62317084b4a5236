"""Fixtures of the fleet's tests: a bundle, databases, and a device with an SSH server."""

from tests.support.device_fixtures import bundle_root, edit_manifest, pristine_bundle, weights  # noqa: F401 - fixtures
from tests.support.fleet_parts import open_folder  # noqa: F401 - fixture
from tests.support.package_index import index  # noqa: F401 - fixture
from tests.support.postgres import own_postgres, postgres, url  # noqa: F401 - fixtures
from tests.support.ssh_board import board, server, service  # noqa: F401 - fixtures
