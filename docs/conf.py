"""Sphinx configuration: `make docs` builds docs/_build/html with warnings as errors."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(_ROOT / "docs" / "_ext"), str(_ROOT / "device"), str(_ROOT / "host")]

from eyas_device import __version__  # noqa: E402 - after the path

project = "Eyas"
author = "the Eyas developers"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Eyas {release}"
myst_heading_anchors = 3
default_role = "literal"
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
