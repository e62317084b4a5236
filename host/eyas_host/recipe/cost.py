"""The recipe's section about what wrong answers cost."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from eyas_device.support.toml import Section

Price = Annotated[float, Meta(ge=0.0, le=1e12)]


class CostSection(Section, frozen=True):
    """`[cost]`: what a wrong answer costs; with a table the answer is the one that is expected to cost least."""

    table: dict[str, dict[str, Price]] = msgspec.field(default_factory=dict)
    """True label -> answer -> cost of an image: { defective = { ok = 50000 }, ok = { defective = 5000 } }. A right
    answer costs 0 unless it is named; empty: the likeliest label is the answer."""
    other: Price | None = None
    """Cost of every mistake that the table does not name; without it the table must name them all."""
    currency: str = ""
    """For the report: "EUR"."""
