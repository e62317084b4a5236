"""`python -m eyas_device` is `eyas-device`."""

import sys

from eyas_device.cli import main

sys.exit(main())
