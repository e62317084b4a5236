"""The host's tests; libraries are made quiet before anything heavy is imported."""

from eyas_host.support.quiet import quiet_libraries

quiet_libraries()
