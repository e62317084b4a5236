"""Imported before anything heavy: see `eyas_host.quiet`."""

from eyas_host.quiet import quiet_libraries

quiet_libraries()
