"""Plot style and SVG output: inline SVG that follows the page's light or dark colours.

Matplotlib draws with placeholder colours; each is replaced by a CSS variable of the page, so one plot serves both
themes. Text stays text, and no pyplot state is touched.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

INK, MUTED, GRID, PAPER = "#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04"
RUNTIMES = {"torch": "#0a0b05", "litert": "#0a0b06", "openvino": "#0a0b07", "onnx": "#0a0b08"}
TRAIN, VALIDATION = RUNTIMES["torch"], RUNTIMES["litert"]
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "line",
    PAPER: "card",
    RUNTIMES["torch"]: "torch",
    RUNTIMES["litert"]: "litert",
    RUNTIMES["openvino"]: "openvino",
    RUNTIMES["onnx"]: "onnx",
}
"""Placeholder colour -> CSS variable of the page."""

WIDE, SQUARE, SMALL = (11.4, 4.4), (5.4, 5.2), (3.6, 3.5)
"""Sizes of plots, inches: as wide as the page, half of it or a third of it at the same size of their text."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may hold a dollar sign
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": MUTED,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "none",
    "lines.linewidth": 1.8,
}


def svg(figure: Figure, alt: str) -> Markup:
    """The figure as inline SVG without prologue and metadata, as wide as its room, in the page's CSS variables."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": alt}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))
