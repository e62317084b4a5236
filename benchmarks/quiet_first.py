"""Imported before anything heavy: see `eyas_host.support.quiet`."""

from eyas_host.support.quiet import quiet_libraries

quiet_libraries()
