"""`[cost]`: the cost of misclassifications."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from eyas_device.support.toml import Section

Price = Annotated[float, Meta(ge=0.0, le=1e12)]


class CostSection(Section, frozen=True):
    """`[cost]`: misclassification costs; with a table the prediction is the label of least expected cost."""

    table: dict[str, dict[str, Price]] = msgspec.field(default_factory=dict)
    """True label -> prediction -> cost of an image: { defective = { ok = 50000 }, ok = { defective = 5000 } }. A
    correct prediction costs 0 unless it is listed; empty: the label with the largest logit is predicted."""
    other: Price | None = None
    """Cost of every mistake missing from the table; without it the table must list them all."""
    currency: str = ""
    """Unit of the costs in the report, e.g. "EUR"."""
