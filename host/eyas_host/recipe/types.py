"""Bounded numbers and enumerations shared by several sections."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Positive = Annotated[float, Meta(gt=0.0, le=1000.0)]
Rate = Annotated[float, Meta(gt=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0)]
AtLeastOne = Annotated[int, Meta(ge=1)]
Progressive = Annotated[float, Meta(ge=0.0, le=0.9)]
Gamma = Annotated[float, Meta(ge=0.0, le=10.0)]

Weights = Literal["auto", "hub", "packaged", "file", "pretrained", "random"]
LossName = Literal["cross_entropy", "bce", "focal"]
SamplerName = Literal["shuffled", "balanced"]
