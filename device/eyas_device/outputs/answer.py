"""What an output delivers: the state that its rule gives, and since when."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["on", "off", "safe", "offline"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """State of an output, as JSON in the topic `eyas/<site>/<device>/answer` and in the body of a webhook."""

    device: str = ""
    site: str = ""
    state: State = "safe"
    """`on`, `off`, `safe` (the device cannot say: see `reason`) or `offline` (the agent has ended)."""
    reason: str = ""
    """Why the state is `safe`."""
    label: str = ""
    """On: the label that switched it on; off: the last prediction's; otherwise empty."""
    confidence: float = 0.0
    """Calibrated confidence of the last prediction with that label, 0..1."""
    since: float = 0.0
    """Start of this state and label, seconds since 1970, by the device's clock."""
    model: str = ""
    """`name version` of the bundle."""
    digest: str = ""
    """First 12 hex digits of the sha256 of its manifest."""
    time: float = 0.0
    """When it was decided, seconds since 1970, by the device's clock."""
    active: bool = False
    """Level of the output: true for `on`; for `safe` and `offline` the configured safe level."""
